"""Marks that need something, and what tests share."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Triton reads it once. Without a GPU, its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastpool
from fastpool.backends import native


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Threads, instruction set and validation as they were, whatever a test does."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fastpool.validate(False)
    if native.info is not None:
        native.info.use_isa()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1" and not torch.cuda.is_available():
        sys.exit("FAIL_WITHOUT_CUDA=1, and torch sees no GPU")
    if native.unavailable() is None:
        return
    # A suite that has lost the native library must not pass by testing the reference against itself.
    if os.environ.get("FASTPOOL_TEST_WITHOUT_NATIVE") != "1":
        sys.exit(f"the native library is not available: {native.unavailable()}")
