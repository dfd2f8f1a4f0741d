"""e^x, in IEEE additions and multiplications: the bits of python/fastpool/reference/elementary.py. x is float32 or
float64, of any shape."""

import triton
import triton.language as tl

from ..constants import EXP2 as _EXP2
from ..constants import LOG2_E as _LOG2_E

EXP2 = tl.constexpr(_EXP2)
LOG2_E = tl.constexpr(_LOG2_E)


@triton.constexpr_function
def is_double(dtype):
    """Which of a constant's two forms is for this dtype."""
    return 1 if dtype == tl.float64 else 0


@triton.constexpr_function
def integer_of(dtype):
    return tl.int64 if dtype == tl.float64 else tl.int32


@triton.constexpr_function
def mantissa_of(dtype):
    """How many of a number's bits are behind its exponent."""
    return 52 if dtype == tl.float64 else 23


@triton.constexpr_function
def bias_of(dtype):
    """The exponent's bits of 1."""
    return 1023 if dtype == tl.float64 else 127


@triton.jit
def polynomial(x, coefficients: tl.constexpr):
    """Those of x's dtype, from the highest on."""
    p = tl.zeros_like(x)
    for i in tl.static_range(len(coefficients[is_double(x.dtype)])):
        p = p * x + coefficients[is_double(x.dtype)][i]
    return p


@triton.jit
def power_of_two(k):
    """2^k for an integer k among the exponents of normal numbers."""
    bits = (k.to(integer_of(k.dtype)) + bias_of(k.dtype)) << mantissa_of(k.dtype)
    return bits.to(k.dtype, bitcast=True)


@triton.jit
def times_power_of_two(x, k):
    """x * 2^k, rounded once, for an integer k of any size. Two factors reach every number that there is."""
    most: tl.constexpr = 1000.0 if k.dtype == tl.float64 else 100.0
    k = tl.where(k < -2 * most, -2 * most, k)
    k = tl.where(k > 2 * most, 2 * most, k)
    first = tl.where(k < -most, -most, k)
    first = tl.where(first > most, most, first)
    return (x * power_of_two(first)) * power_of_two(k - first)


@triton.jit
def power_between(smaller, larger):
    """2^(smaller - larger), for integers of any size or -inf; 1 where they are equal."""
    difference = tl.where(smaller == larger, 0.0, smaller - tl.where(smaller == larger, 0.0, larger))
    return times_power_of_two(tl.full(difference.shape, 1.0, difference.dtype), difference)


@triton.jit
def upper_half(x):
    """x without its last bits."""
    lost: tl.constexpr = 27 if x.dtype == tl.float64 else 12
    return (x.to(integer_of(x.dtype), bitcast=True) & -(1 << lost)).to(x.dtype, bitcast=True)


@triton.jit
def exponential(x):
    """p and an integer n with e^x = p 2^n; p is between 0.7 and 1.42. Where x is so large that n is beyond all
    exponents, p is coarse. -inf: 0 and -inf; NaN and inf: NaN and -inf."""
    high: tl.constexpr = LOG2_E[is_double(x.dtype)][0]
    low: tl.constexpr = LOG2_E[is_double(x.dtype)][1]
    integers: tl.constexpr = 2.0 ** mantissa_of(x.dtype)
    largest: tl.constexpr = 2.0 ** bias_of(x.dtype)
    there = tl.abs(x) < float("inf")
    s = tl.where(there, x, 0.0)
    s = tl.where(s < -largest, -largest, s)
    s = tl.where(s > largest, largest, s)
    t = s * (high + low)
    magic = tl.where(t < 0, tl.full(t.shape, -integers, t.dtype), tl.full(t.shape, integers, t.dtype))
    small = tl.abs(t) < integers
    n = tl.where(small, (t + magic) - magic, t)  # the neighbours of magic are integers
    upper = upper_half(s)
    f = (upper * high - n) + ((s - upper) * high + s * low)
    f = tl.where(small, f, 0.0)
    p = 1 + f * polynomial(f, EXP2)
    none = tl.where(x == float("-inf"), tl.zeros_like(x), tl.full(x.shape, float("nan"), x.dtype))
    return tl.where(there, p, none), tl.where(there, n, float("-inf"))
