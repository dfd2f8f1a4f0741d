"""e^x, ln(1 + x) and tanh(x), in IEEE additions, multiplications and divisions, so that every backend has the same
bits: no library's exp, log or tanh is the same everywhere. Each is at most 2 units in the last place from the true
value. x is float32 or float64."""

import torch
from torch import Tensor

from ..constants import EXP2, LN_2, LOG, LOG2_E, SQRT_HALF, TANH, TANH_SMALL

# Of each dtype: an integer type as wide, bits of the mantissa, how many of them the upper half of a number lacks, and
# an exponent that normal numbers have with both signs.
_FORMATS = {torch.float32: (torch.int32, 23, 12, 100.0), torch.float64: (torch.int64, 52, 27, 1000.0)}


def _polynomial(x: Tensor, coefficients: tuple[tuple[float, ...], ...]) -> Tensor:
    """Those of x's dtype, from the highest on."""
    p = torch.zeros_like(x)
    for coefficient in coefficients[x.dtype == torch.float64]:
        p = p * x + coefficient
    return p


def _power_of_two(k: Tensor) -> Tensor:
    """2^k for an integer k among the exponents of normal numbers."""
    integer, mantissa, _, _ = _FORMATS[k.dtype]
    bias = 2 ** (62 - mantissa if integer is torch.int64 else 30 - mantissa) - 1
    bits: Tensor = (k.to(integer) + bias) << mantissa
    return bits.view(k.dtype)


def _upper_half(x: Tensor) -> Tensor:
    """x without its last bits."""
    integer, _, bits, _ = _FORMATS[x.dtype]
    return (x.view(integer) & -(1 << bits)).view(x.dtype)


def times_power_of_two(x: Tensor, k: Tensor) -> Tensor:
    """x * 2^k, rounded once, for an integer k of any size. Two factors reach every number that there is."""
    most = _FORMATS[k.dtype][3]
    k = k.clamp(-2 * most, 2 * most)
    first = k.clamp(-most, most)
    return (x * _power_of_two(first)) * _power_of_two(k - first)


def exponential(x: Tensor) -> tuple[Tensor, Tensor]:
    """p and an integer n with e^x = p 2^n; p is between 0.7 and 1.42. Its error grows with x: p is as if x had been
    moved by less than a unit in its last place, and is 1 from |x| = 5.8e6 on (3.1e15 in float64); beyond 2^127 (2^1023)
    all x are alike. -inf: 0 and -inf; NaN and inf: NaN and -inf."""
    double = x.dtype == torch.float64
    integers, largest = (2.0**52, 2.0**1023) if double else (2.0**23, 2.0**127)
    high, low = LOG2_E[double]
    there = x.isfinite()
    s = torch.where(there, x, 0).clamp(-largest, largest)
    t = s * (high + low)
    magic = torch.where(t < 0, torch.full_like(t, -integers), integers)  # whose neighbours are integers
    small = t.abs() < integers
    n = torch.where(small, (t + magic) - magic, t)
    upper = _upper_half(s)
    f = (upper * high - n) + ((s - upper) * high + s * low)
    f = torch.where(small, f, 0)
    p = 1 + f * _polynomial(f, EXP2)
    none = torch.where(x == float("-inf"), 0.0, float("nan"))
    return torch.where(there, p, none.to(p.dtype)), torch.where(there, n, float("-inf"))


def exp(x: Tensor) -> Tensor:
    """e^x. -inf: 0; inf: inf; NaN: NaN."""
    p, n = exponential(x)
    over = torch.where(x == float("inf"), x, p)
    return times_power_of_two(over, torch.where(n == float("-inf"), 0, n))


def log1p(x: Tensor) -> Tensor:
    """ln(1 + x) for x >= 0. 0 and -0: 0; inf: inf; below 0 and NaN: NaN."""
    integer, mantissa, _, most = _FORMATS[x.dtype]
    double = x.dtype == torch.float64
    high, low = LN_2[double]
    there = (x >= 0) & (x < float("inf"))
    s = torch.where(there, x, 0)
    # 1 + x = 2^k (1 + f), with f rounded once: x 2^-k is exact, and so is 2^-k - 1 unless it is lost in any case.
    exponent = ((1 + s).view(integer) - SQRT_HALF[double]) >> mantissa
    k = exponent.to(x.dtype)
    f = (s.view(integer) - (exponent << mantissa)).view(x.dtype) + (_power_of_two(-k.clamp(max=most)) - 1)
    quotient = f / (2 + f)
    square, half = quotient * quotient, 0.5 * f * f
    # f - f^2 / 2 + what is left of the logarithm, which the smaller terms are added up for first.
    rest = quotient * (half + square * _polynomial(square, LOG)) + k * low
    result = k * high + (f - (half - rest))
    return torch.where(there, result, torch.where(x == float("inf"), x, float("nan")))


def tanh(x: Tensor) -> Tensor:
    """tanh(x), an odd function in every bit. NaN: NaN."""
    magnitude = x.abs()
    square = magnitude * magnitude
    near = magnitude + magnitude * square * _polynomial(square, TANH)
    divisor = exp(2 * magnitude) + 1
    far = 1 - torch.full_like(x, 2) / divisor  # torch turns 2 / x into another operation
    return torch.where(magnitude < TANH_SMALL, near, far).copysign(x)
