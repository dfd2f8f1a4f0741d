"""e^x, in IEEE additions and multiplications, so that every backend has the same bits: no library's exp, log or tanh is
the same everywhere. x is float32 or float64."""

import torch
from torch import Tensor

from ..constants import EXP2, LOG2_E

# Of each dtype: an integer type as wide, bits of the mantissa, and how many of them the upper half of a number lacks.
_FORMATS = {torch.float32: (torch.int32, 23, 12), torch.float64: (torch.int64, 52, 27)}


def _power_of_two(k: Tensor) -> Tensor:
    """2^k for an integer k among the exponents of normal numbers."""
    integer, mantissa, _ = _FORMATS[k.dtype]
    bias = 2 ** (62 - mantissa if integer is torch.int64 else 30 - mantissa) - 1
    bits: Tensor = (k.to(integer) + bias) << mantissa
    return bits.view(k.dtype)


def _upper_half(x: Tensor) -> Tensor:
    """x without its last bits."""
    integer, _, bits = _FORMATS[x.dtype]
    return (x.view(integer) & -(1 << bits)).view(x.dtype)


def times_power_of_two(x: Tensor, k: Tensor) -> Tensor:
    """x * 2^k, rounded once, for an integer k of any size. Two factors reach every number that there is."""
    most = 1000.0 if k.dtype == torch.float64 else 100.0
    k = k.clamp(-2 * most, 2 * most)
    first = k.clamp(-most, most)
    return (x * _power_of_two(first)) * _power_of_two(k - first)


def exponential(x: Tensor) -> tuple[Tensor, Tensor]:
    """p and an integer n with e^x = p 2^n; p is between 0.7 and 1.42. Where x is so large that n is beyond all
    exponents, p is coarse. -inf: 0 and -inf; NaN and inf: NaN and -inf."""
    double = x.dtype == torch.float64
    integers, largest = (2.0**52, 2.0**1023) if double else (2.0**23, 2.0**127)
    high, low = LOG2_E[double]
    there = x.isfinite()
    s = torch.where(there, x, 0).clamp(-largest, largest)
    t = s * (high + low)
    magic = torch.where(t < 0, -integers, integers)  # whose neighbours are integers
    small = t.abs() < integers
    n = torch.where(small, (t + magic) - magic, t)
    upper = _upper_half(s)
    f = (upper * high - n) + ((s - upper) * high + s * low)
    f = torch.where(small, f, 0)
    p = torch.zeros_like(f)
    for coefficient in EXP2[double]:
        p = p * f + coefficient
    p = 1 + f * p
    none = torch.where(x == float("-inf"), 0.0, float("nan"))
    return torch.where(there, p, none.to(p.dtype)), torch.where(there, n, float("-inf"))


def exp(x: Tensor) -> Tensor:
    """e^x, to 2 units in the last place."""
    p, n = exponential(x)
    over = torch.where(x == float("inf"), x, p)
    return times_power_of_two(over, torch.where(n == float("-inf"), 0, n))
