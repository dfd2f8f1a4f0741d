"""Triton kernels for CUDA and ROCm tensors. This version has none yet."""

from torch import Tensor


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return "this version has no Triton kernels"


def refuses(tensor: Tensor) -> str | None:
    return unavailable()
