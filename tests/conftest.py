"""Marks that need something, and what tests share."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Of several processes that share the tests (pytest -n), each has its share of the cores, and so has what it starts.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(min(share, torch.get_num_threads()))
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, str(share))

# Triton reads it once. Without a GPU, its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

from helpers import cuda_host, on_gpu

import fastpool
from fastpool import known
from fastpool.backends import native

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from helpers import interpreter

    interpreter.quicken()


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Threads, instruction set and validation as they were, whatever a test does, and nothing known of its calls."""
    threads = torch.get_num_threads()
    yield
    known.forget()
    torch.set_num_threads(threads)
    fastpool.validate(False)
    if native.info is not None:
        native.info.use_isa()


@pytest.fixture
def host() -> Iterator[cuda_host.Host]:
    """The CUDA kernels on a CPU. New memory is full of NaN and large numbers, so that what is read before it is written
    shows."""
    torch.use_deterministic_algorithms(True)
    yield cuda_host.shared()
    torch.use_deterministic_algorithms(False)
    cuda_host.shared().reset()


@pytest.fixture(params=on_gpu.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Asks for one backend of the GPU throughout a test."""
    with fastpool.backend(request.param):
        found = fastpool.explain(torch.zeros(1, 1, 8, device=on_gpu.DEVICE))
        if found.backend is None:
            lost = os.environ.get("FAIL_WITHOUT_CUDA") == "1"  # a suite that has lost a backend must not pass
            (pytest.fail if lost else pytest.skip)(found.reasons[request.param])
        yield request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wide", action="store_true", help="what is marked wide, instead of everything else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wide = config.getoption("--wide")
    chosen, others = [], []
    for item in items:
        (chosen if (item.get_closest_marker("wide") is not None) == wide else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1" and not torch.cuda.is_available():
        sys.exit("FAIL_WITHOUT_CUDA=1, and torch sees no GPU")
    if native.unavailable() is None:
        return
    # A suite that has lost the native library must not pass by testing the reference against itself.
    if os.environ.get("FASTPOOL_TEST_WITHOUT_NATIVE") != "1":
        sys.exit(f"the native library is not available: {native.unavailable()}")
