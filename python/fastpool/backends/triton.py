"""Triton kernels for CUDA and ROCm tensors; with TRITON_INTERPRET=1 for CPU tensors, by Triton's interpreter."""

import importlib.util
import os
from functools import cache
from types import ModuleType

from torch import Tensor

from ..segments import NormalizeCall, PoolCall

_FOUND = importlib.util.find_spec("triton") is not None
# Triton reads it as kernels are defined, so it must be set before they are imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return None if _FOUND else "triton is not installed"


def refuses(tensor: Tensor) -> str | None:
    """Why this backend cannot serve calls on that tensor, or None."""
    if not _FOUND:
        return unavailable()
    kind = tensor.device.type
    if _INTERPRETED:
        return None if kind == "cpu" else f"TRITON_INTERPRET=1 runs Triton kernels on CPU tensors, not {kind}"
    return None if kind == "cuda" else f"Triton kernels are for CUDA and ROCm tensors, not {kind}"


@cache
def _launch() -> ModuleType:
    from ..triton_kernels import launch  # imports triton, which takes a while

    module: ModuleType = launch
    return module


def pool(call: PoolCall) -> Tensor:
    result: Tensor = _launch().pool(call)
    return result


def l2_normalize(call: NormalizeCall) -> Tensor:
    result: Tensor = _launch().l2_normalize(call)
    return result
