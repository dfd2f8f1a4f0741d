"""Packages and the native build; everything else stands in pyproject.toml, sources and flags in CMakeLists.txt.

torch is not a build requirement: an isolated build would fetch gigabytes of it. `pip install --no-build-isolation .`
builds the native library against the installed torch; anything that is missing (torch, a compiler) costs the native
library, not the install, and is written down in fastpool/native_build.json, which `fastpool env` shows.

FASTPOOL_NATIVE=0 skips the native build, FASTPOOL_NATIVE=1 makes its failure an error.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("torch is not installed where the build runs; pip install --no-build-isolation . uses yours")
    return Path(spec.submodule_search_locations[0])


class NativeBuild(build_ext):
    """Runs CMake; notes what became of it."""

    def run(self) -> None:
        inplace = bool(self.inplace)
        package = ROOT / "python" / "fastpool" if inplace else Path(self.build_lib).absolute() / "fastpool"
        package.mkdir(parents=True, exist_ok=True)
        try:
            self.build_native(package)
            report = {"built": True, "reason": ""}
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            report = {"built": False, "reason": str(error)}
            for stale in (*package.glob("libfastpool*.so"), *package.glob("_native*.so")):
                stale.unlink()
            if os.environ.get("FASTPOOL_NATIVE") == "1":
                raise
            print(f"fastpool: installing without the native library: {error}", file=sys.stderr)
        (package / "native_build.json").write_text(json.dumps(report) + "\n")

    def build_native(self, package: Path) -> None:
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
        build = Path(self.build_temp).absolute() / "cmake"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh",
            f"-DTORCH_DIR={torch}",
            f"-DTORCH_VERSION_STRING={version['__version__']}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
        ]  # fmt: skip
        self.command(configure)
        self.command(["cmake", "--build", str(build), "--target", "install"])

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
    + [f"fastpool.{name}" for name in find_packages("python/fastpool")],
    package_dir={"fastpool": "python/fastpool", "fastpool.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("fastpool._native", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
