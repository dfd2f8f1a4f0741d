"""What calls share: the accumulator's dtype, and what a gradient tells."""

import torch
from torch import Tensor


def columns_of(gradient: Tensor) -> int | None:
    """The columns that a gradient [..., D] says were used."""
    return gradient.shape[-1] if gradient.dim() > 0 and gradient.shape[-1] > 0 else None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, divisions and norms happen in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# How torch begins to say that it has no memory on a CPU, and that no memory could hold so much.
_NO_MEMORY = ("DefaultCPUAllocator: ", "Storage size calculation overflowed ")


def out_of_memory(op: str, error: RuntimeError) -> torch.OutOfMemoryError | None:
    """The error with the op's name where torch had no memory; None where it is another one, or has the name already."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return None if said.startswith(op) else torch.OutOfMemoryError(f"{op}: not enough memory: {said}")
    for begins in _NO_MEMORY:
        if begins in said:
            return torch.OutOfMemoryError(f"{op}: not enough memory: {said[said.index(begins) :].splitlines()[0]}")
    return None
