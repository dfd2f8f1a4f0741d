"""e^x, ln(1 + x) and tanh(x), in IEEE additions, multiplications and divisions: the bits of
python/fastpool/reference/elementary.py, which says how exact they are. x is float32 or float64, of any shape."""

import triton
import triton.language as tl

from .. import constants

EXP2 = tl.constexpr(constants.EXP2)
LOG2_E = tl.constexpr(constants.LOG2_E)
LOG = tl.constexpr(constants.LOG)
LN_2 = tl.constexpr(constants.LN_2)
SQRT_HALF = tl.constexpr(constants.SQRT_HALF)
TANH = tl.constexpr(constants.TANH)
TANH_SMALL = tl.constexpr(constants.TANH_SMALL)


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


@triton.constexpr_function
def most_of(dtype):
    """An exponent that normal numbers have with both signs."""
    return 1000.0 if dtype == tl.float64 else 100.0


@triton.jit
def divide(x, y):
    """x over a y of its shape or a scalar, correctly rounded, which the plain operator is in float64 only."""
    y = tl.zeros_like(x) + y
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


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
    most: tl.constexpr = most_of(k.dtype)
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
    """p and an integer n with e^x = p 2^n; p is between 0.7 and 1.42, and coarse where x is so large that its last
    place is. -inf: 0 and -inf; NaN and inf: NaN and -inf."""
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


@triton.jit
def exp(x):
    """e^x. -inf: 0; inf: inf; NaN: NaN."""
    p, n = exponential(x)
    return times_power_of_two(tl.where(x == float("inf"), x, p), tl.where(n == float("-inf"), 0.0, n))


@triton.jit
def log1p(x):
    """ln(1 + x) for x >= 0. 0 and -0: 0; inf: inf; below 0 and NaN: NaN."""
    integer: tl.constexpr = integer_of(x.dtype)
    mantissa: tl.constexpr = mantissa_of(x.dtype)
    most: tl.constexpr = most_of(x.dtype)
    high: tl.constexpr = LN_2[is_double(x.dtype)][0]
    low: tl.constexpr = LN_2[is_double(x.dtype)][1]
    there = (x >= 0) & (x < float("inf"))
    s = tl.where(there, x, 0.0)
    # 1 + x = 2^k (1 + f), with f rounded once: x 2^-k is exact, and so is 2^-k - 1 unless it is lost in any case.
    exponent = ((1 + s).to(integer, bitcast=True) - SQRT_HALF[is_double(x.dtype)]) >> mantissa
    k = exponent.to(x.dtype)
    part = (s.to(integer, bitcast=True) - (exponent << mantissa)).to(x.dtype, bitcast=True)
    f = part + (power_of_two(tl.where(k > most, -most, -k)) - 1)
    quotient = divide(f, 2 + f)
    square = quotient * quotient
    half = 0.5 * f * f
    # f - f^2 / 2 + what is left of the logarithm, which the smaller terms are added up for first.
    rest = quotient * (half + square * polynomial(square, LOG)) + k * low
    result = k * high + (f - (half - rest))
    beyond = tl.where(x == float("inf"), x, tl.full(x.shape, float("nan"), x.dtype))
    return tl.where(there, result, beyond)


@triton.jit
def tanh(x):
    """tanh(x), an odd function in every bit. NaN: NaN."""
    integer: tl.constexpr = integer_of(x.dtype)
    magnitude = tl.abs(x)
    square = magnitude * magnitude
    near = magnitude + magnitude * square * polynomial(square, TANH)
    far = 1 - divide(tl.full(x.shape, 2.0, x.dtype), exp(2 * magnitude) + 1)
    sign = x.to(integer, bitcast=True) ^ magnitude.to(integer, bitcast=True)
    return (tl.where(magnitude < TANH_SMALL, near, far).to(integer, bitcast=True) | sign).to(x.dtype, bitcast=True)
