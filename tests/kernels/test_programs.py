"""The C++ test programs: the CPU kernels without torch, and CUDA's launch plans of calls drawn at random."""

import subprocess

import pytest
from helpers import cmake, cuda_host


def test_kernels_agree() -> None:
    """tests/cpp/test_kernels.cpp, which `make sanitize` runs under sanitizers. Not optimised here, which compiles in
    seconds; everything else runs what is."""
    program = cmake.build("kernels", "-DCMAKE_BUILD_TYPE=Debug") / "test_kernels"
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": ok\n")


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_sound(seed: int) -> None:
    """tests/cpp/test_plans.cpp."""
    program = cuda_host.build("cuda_host").with_name("test_plans")
    done = subprocess.run([program, "100000", str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "200000 plans are sound\n"
