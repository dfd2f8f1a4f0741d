"""What calls share: the accumulator's dtype, and what a gradient tells."""

import torch
from torch import Tensor


def columns_of(gradient: Tensor) -> int | None:
    """The columns that a gradient [..., D] says were used."""
    return gradient.shape[-1] if gradient.dim() > 0 and gradient.shape[-1] > 0 else None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, divisions and norms happen in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
