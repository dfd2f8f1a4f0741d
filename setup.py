"""Packages and the native build; everything else stands in pyproject.toml, sources and flags in CMakeLists.txt.

torch is not a build requirement: an isolated build would fetch gigabytes of it. `pip install --no-build-isolation .`
builds the native library against the installed torch; anything that is missing (torch, a compiler) costs the native
library, not the install, and is written down in fastpool/native_build.json, which `fastpool env` shows.

FASTPOOL_NATIVE=0 skips the native build, FASTPOOL_NATIVE=1 makes its failure an error. FASTPOOL_CUDA does the same for
the CUDA part, which needs nvcc, but neither a GPU nor a torch with CUDA; FASTPOOL_CUDA_ARCHITECTURES="90" builds it for
these GPUs alone, in seconds.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("torch is not installed where the build runs; pip install --no-build-isolation . uses yours")
    return Path(spec.submodule_search_locations[0])


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None:
        raise RuntimeError(f"no nvcc in PATH or {home}/bin")
    return nvcc


def asked_architectures() -> str:
    """The GPUs to build for, as 80,90; nothing: all that nvcc knows of ours."""
    return os.environ.get("FASTPOOL_CUDA_ARCHITECTURES", "").replace(";", ",")


class NativeBuild(build_ext):
    """Runs CMake; notes what became of it."""

    def run(self) -> None:
        inplace = bool(self.inplace)
        package = ROOT / "python" / "fastpool" if inplace else Path(self.build_lib).absolute() / "fastpool"
        package.mkdir(parents=True, exist_ok=True)
        try:
            cuda = self.build_with_cuda(package)
            report: dict[str, Any] = {"built": True, "reason": "", "cuda": cuda}
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            report = {"built": False, "reason": str(error), "cuda": {"built": False, "reason": str(error)}}
            for stale in (*package.glob("libfastpool*.so"), *package.glob("_native*.so")):
                stale.unlink()
            if os.environ.get("FASTPOOL_NATIVE") == "1":
                raise
            print(f"fastpool: installing without the native library: {error}", file=sys.stderr)
        (package / "native_build.json").write_text(json.dumps(report) + "\n")

    def build_with_cuda(self, package: Path) -> dict[str, Any]:
        """Builds everything, or all but the CUDA part where that fails; says what became of the latter."""
        requested = os.environ.get("FASTPOOL_CUDA")
        reason = ""
        try:
            if requested == "0":
                raise RuntimeError("FASTPOOL_CUDA=0")
            self.build_native(package, ["-DFASTPOOL_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"])
        except RuntimeError as error:
            if requested == "1":
                raise
            reason = str(error)
            for stale in package.glob("libfastpool_cuda*.so"):
                stale.unlink()
            self.build_native(package, ["-DFASTPOOL_CUDA=OFF"])
            print(f"fastpool: installing without the CUDA library: {reason}", file=sys.stderr)
        return {"built": not reason, "reason": reason, "architectures": asked_architectures()}

    def build_native(self, package: Path, options: list[str]) -> None:
        if os.environ.get("FASTPOOL_NATIVE") == "0":
            raise RuntimeError("FASTPOOL_NATIVE=0")
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            raise RuntimeError(
                f"native kernels need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
            )
        import pybind11

        torch = find_torch()
        version: dict[str, str] = {}
        exec((torch / "version.py").read_text(), version)
        build = self.build_folder(str(torch), version["__version__"])
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *([] if self.inplace else ["--fresh"]),
            f"-DTORCH_DIR={torch}",
            f"-DTORCH_VERSION_STRING={version['__version__']}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DFASTPOOL_CUDA_ARCHITECTURES={asked_architectures().replace(',', ';')}",
            *options,
        ]  # fmt: skip
        self.command(configure)
        self.command(["cmake", "--build", str(build), "--target", "install"])

    def build_folder(self, *settings: str) -> Path:
        """An editable install finds its objects again, so that only what has changed is compiled; in a folder for each
        environment and compiler, which CMake keeps to once they are chosen. Any other install starts anew."""
        if not self.inplace:
            return Path(self.build_temp).absolute() / "cmake"
        names = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH")
        variables = [os.environ.get(name, "") for name in names]
        tools = [shutil.which(name) or "" for name in ("cmake", "ninja", "c++", "nvcc")]
        key = "\0".join((str(ROOT), sys.executable, *settings, *variables, *tools))
        return ROOT / "build" / f"editable-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    @staticmethod
    def command(arguments: list[str]) -> None:
        done = subprocess.run(arguments, capture_output=True, text=True)
        sys.stderr.write(done.stdout + done.stderr)
        if done.returncode != 0:
            # cmake explains itself on stderr, the compiler behind ninja on stdout.
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
            raise RuntimeError(f"{arguments[0]} failed: {' '.join(lines[first : first + 4])}")

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fastpool"
        names = ("libfastpool*.so", "_native*.so", "native_build.json")
        return [str(path) for name in names for path in package.glob(name)]


setup(
    packages=["fastpool.triton_kernels"]
    + ["fastpool"]
    + [f"fastpool.{name}" for name in find_packages("python/fastpool", exclude=["triton_kernels"])],  # a link to it
    package_dir={"fastpool": "python/fastpool", "fastpool.triton_kernels": "triton_kernels"},
    package_data={
        "fastpool": ["py.typed"],
        "fastpool.doctor": ["*.tsv"],
        "fastpool.triton_kernels": ["tuned/*.json"],
    },
    ext_modules=[Extension("fastpool._native", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
