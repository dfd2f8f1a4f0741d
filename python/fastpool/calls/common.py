"""What calls share: the accumulator's dtype, and what a gradient tells."""

import re

import torch
from torch import Tensor


def columns_of(gradient: Tensor) -> int | None:
    """The columns that a gradient [..., D] says were used."""
    return gradient.shape[-1] if gradient.dim() > 0 and gradient.shape[-1] > 0 else None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, divisions and norms happen in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# How torch says that it has no memory: on a CPU, on a GPU, and where no memory could hold so much.
_NO_MEMORY = (
    re.compile(r"^\[enforce fail at alloc_cpu\.cpp.*DefaultCPUAllocator: can't allocate memory: (.*)"),
    re.compile(r"^((?:CUDA|HIP) out of memory.*)", re.DOTALL),
)
_UNCOUNTABLE = re.compile("^Storage size calculation overflowed with sizes=")


def why_no_memory(error: RuntimeError) -> str | None:
    """How much was asked for, where torch had no memory; None where it is another error."""
    if type(error) not in (RuntimeError, torch.OutOfMemoryError):
        return None
    said = str(error)
    if _UNCOUNTABLE.match(said):
        return f"more than {2**63 - 1} bytes were asked for"
    return next((found[1] for pattern in _NO_MEMORY if (found := pattern.match(said))), None)
