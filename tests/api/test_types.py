"""What a type checker knows of the package once it is installed: in an environment that has its wheel and torch."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fastpool.modes import MODES, Mode
from fastpool.signatures import AttentionPooling, Pooling, ScoredPooling, WeightedPooling
from fastpool.testing import function_of

ROOT = Path(__file__).parents[2]

# Each line with "# error" must be one, and no other line.
USE = """
import torch
import fastpool

hidden = torch.ones(1, 2, 3)
pooled: torch.Tensor = fastpool.mean(hidden, normalize=True, truncate_dim=2, out_dtype=torch.float32)
pooled = fastpool.weighted_mean(hidden, weights=torch.ones(1, 2))
pooled = fastpool.softmax_mean(hidden, scores=torch.ones(1, 2))
pooled = fastpool.attention(hidden, torch.ones(3), scale=0.5)
pooled = fastpool.l2_normalize(pooled)
pooled = fastpool.nn.Pooling("mean", normalize=True)(hidden)
fastpool.mean(hidden, normalize="yes")  # error
fastpool.mean(hidden, weights=torch.ones(1, 2))  # error
fastpool.softmax_mean(hidden, weights=torch.ones(1, 2))  # error
fastpool.attention(hidden, torch.ones(3), scale="1")  # error
fastpool.max(hidden, dim=1)  # error
fastpool.l2_normalize(hidden, truncate_dim="2")  # error
with fastpool.backend("native"):
    length: int = fastpool.mean(hidden)  # error
""" + "".join(f'fastpool.{mode}("hidden")  # error\n' for mode in MODES)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, without the native library."""
    folder = tmp_path_factory.mktemp("built")
    sources = folder / "sources"
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("python", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = f"from setuptools.build_meta import *; build_wheel({str(folder)!r}); build_sdist({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=sources,
        capture_output=True,
        text=True,
        env={**os.environ, "FASTPOOL_NATIVE": "0"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_wheel_has_types(built: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (tmp_path / "use.py").write_text(USE)
    checker = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        str(tmp_path / "venv" / "bin" / "python"),
    ]
    done = subprocess.run([*checker, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    wrong = {int(line) for line in re.findall(r"^use\.py:(\d+): error", done.stdout, re.M)}
    expected = {number for number, line in enumerate(USE.splitlines(), 1) if line.endswith("# error")}
    assert wrong == expected, done.stdout + done.stderr


def test_a_source_distribution_has_the_mark(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        assert [name for name in archive.getnames() if name.endswith("python/fastpool/py.typed")]


@pytest.mark.parametrize(
    "mode", [mode for mode in MODES.values() if not mode.of_logits], ids=lambda mode: mode.name
)  # splade's signature is its own
def test_functions_are_what_is_said_of_them(mode: Mode) -> None:
    """Names, kinds, defaults and types; `**unknown`, which is there to refuse well, is nobody's to give."""
    takers = {"weights": WeightedPooling, "scores": ScoredPooling, "query": AttentionPooling}
    said = inspect.signature(next((takers[own] for own in takers if mode.takes(own)), Pooling).__call__)
    there = inspect.signature(function_of(mode.name))
    arguments = [one for one in there.parameters.values() if one.kind is not one.VAR_KEYWORD]
    assert arguments == list(said.parameters.values())[1:]
    assert there.return_annotation == said.return_annotation
