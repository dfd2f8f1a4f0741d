"""Every way to install, from a copy of the sources, into environments of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.install

CHECK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, fastpool, fastpool.triton_kernels
from fastpool.env import collect
assert torch.equal(fastpool.mean(torch.ones(1, 2, 3)), torch.ones(1, 3))
assert torch.equal(torch.ops.fastpool.l2_normalize(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
try:
    import triton_kernels
    sys.exit("a top-level triton_kernels was installed")
except ImportError:
    pass
print(json.dumps(collect()["backends"]["native"]))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The tracked and new files of the checkout, without what was built in it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    copy = tmp_path / "sources"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that sees this one's packages (torch, the build tools), but not its fastpool."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # A plain line in a .pth file adds the folder without reading the .pth files in it, so no editable install shows.
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return tmp_path / "venv" / "bin" / "python"


def pip(python: Path, sources: Path, *arguments: str, **variables: str) -> str:
    # The environment's tools, and the outer one's cmake and ninja.
    path = f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(python), "-m", "pip", *arguments, "-v", "--no-deps"],
        cwd=sources,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "FASTPOOL_CUDA_ARCHITECTURES": "90", **variables},  # one will do
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def install(python: Path, sources: Path, *options: str, **variables: str) -> str:
    return pip(python, sources, "install", "--force-reinstall", *options, **variables)


def native(python: Path, folder: Path) -> dict[str, Any]:
    """Pools, and returns what `fastpool env` says of the native backend."""
    done = subprocess.run([str(python), "-c", CHECK], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# `make test` itself begins with an editable install, and the wheel of test_types.py is built without compiling.
@pytest.mark.wide
def test_a_wheel_holds_fastpool_only_and_installs(sources: Path, environment: Path, tmp_path: Path) -> None:
    """What `pip install --no-build-isolation .` builds and installs, in its two steps."""
    pip(environment, sources, "wheel", "--no-build-isolation", "-w", str(tmp_path), ".", FASTPOOL_NATIVE="1")
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extract("fastpool/libfastpool.so", tmp_path)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastpool"}
    for needed in ("triton_kernels/__init__.py", "libfastpool.so", "native_build.json", "demo/__init__.py"):
        assert f"fastpool/{needed}" in names
    assert ("fastpool/libfastpool_cuda.so" in names) == (shutil.which("nvcc") is not None)
    assert not [name for name in names if "test" in name and not name.startswith("fastpool/testing/")]
    # The promise of one build for every torch from 2.10 on.
    audit = subprocess.run(
        [str(Path(sys.executable).parent / "torch-abi-audit"), str(tmp_path / "fastpool" / "libfastpool.so")],
        capture_output=True,
        text=True,
    )
    assert "unstable=0" in audit.stdout, audit.stdout + audit.stderr
    assert "min-torch=2.10.0" in audit.stdout
    install(environment, sources, str(wheel))
    assert native(environment, tmp_path)["available"]


@pytest.mark.wide
def test_an_editable_install_without_isolation_builds_everything(
    sources: Path, environment: Path, tmp_path: Path
) -> None:
    quick = {"CMAKE_BUILD_TYPE": "Debug", "FASTPOOL_CUDA": "0"}
    install(environment, sources, "--no-build-isolation", "-e", ".", **quick)
    assert native(environment, tmp_path)["available"]


@pytest.mark.parametrize(
    "options", [(".",), pytest.param(("-e", "."), marks=pytest.mark.wide)], ids=["install", "editable"]
)
def test_with_isolation_installs_python_and_says_so(
    options: tuple[str, ...], sources: Path, environment: Path, tmp_path: Path
) -> None:
    said = install(environment, sources, *options)
    assert "installing without the native library: torch is not installed where the build runs" in said
    found = native(environment, tmp_path)
    assert not found["available"]
    assert "torch is not installed where the build runs" in found["reason"]


def test_without_a_compiler_installs_python_and_says_so(sources: Path, environment: Path, tmp_path: Path) -> None:
    said = install(environment, sources, "--no-build-isolation", ".", CXX="/nonexistent/c++")
    assert "installing without the native library" in said
    found = native(environment, tmp_path)
    assert not found["available"]
    assert "the native library was not built: cmake failed" in found["reason"]
    assert "nonexistent" in found["reason"]
