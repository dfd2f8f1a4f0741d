"""Bits, and how far a result is from the true one."""

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    """The bit patterns of x, all NaNs alike: which NaN comes out is not promised."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# Mantissa bits, and the smallest exponent of a normal number.
_FORMAT = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126), torch.float64: (52, -1022)}


def error(result: Tensor, expected: Tensor) -> float:
    """How far a result is from float64, in units of what is allowed: 1 is the limit.

    float32: a relative L2 error of 1e-6; float64: of 1e-14. 16 bits: half a unit in the last place, for the one
    rounding, beside the error of the float32 value that is rounded.
    """
    got = result.double()
    norm = expected.norm().item() if expected.numel() else 0.0
    if result.dtype in (torch.float32, torch.float64):
        allowed = 1e-6 if result.dtype == torch.float32 else 1e-14
        return float((got - expected).norm()) / max(allowed * norm, 1e-38)
    mantissa, smallest = _FORMAT[result.dtype]
    exponent = torch.frexp(expected.abs()).exponent - 1
    unit = torch.ldexp(torch.ones_like(expected), exponent.clamp(min=smallest) - mantissa)
    allowed_each = 0.5 * unit + 1e-6 * norm
    return float(((got - expected).abs() / allowed_each).max()) if expected.numel() else 0.0
