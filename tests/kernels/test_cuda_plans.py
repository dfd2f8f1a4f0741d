"""CUDA's launch plans of calls drawn at random, by tests/cpp/test_plans.cpp."""

import subprocess

import pytest
from helpers import cuda_host


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_sound(seed: int) -> None:
    program = cuda_host.build("cuda_host").with_name("test_plans")
    done = subprocess.run([program, "100000", str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "200000 plans are sound\n"
