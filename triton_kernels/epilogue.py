"""What follows a reduction: divide, normalise, round once, store."""

import triton
import triton.language as tl

from .reduce import MEAN, MEAN_SQRT_LEN, WEIGHTED_MEAN, add_columns


@triton.jit
def divide(x, y):
    """A row over a scalar, correctly rounded, which the plain operator is in float64 only."""
    y = tl.zeros_like(x) + y
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide_by_total(x, count, weight, mode):
    """The mode's quotient; 0 where there is no real token or weights add up to nothing."""
    divisor = tl.full((), 1.0, x.dtype)
    if mode == MEAN:
        divisor = count.to(x.dtype)
    elif mode == MEAN_SQRT_LEN:
        divisor = square_root(count.to(x.dtype))
    elif mode == WEIGHTED_MEAN:
        divisor = weight
    nothing = (count == 0) | (divisor == 0)
    return tl.where(nothing, 0.0, divide(x, tl.where(nothing, 1.0, divisor)))


@triton.jit
def norm_scale(squares):
    """1, or the power of two that vectors are scaled by because the square of their norm overflows."""
    small = 2.0**-600 if squares.dtype == tl.float64 else 2.0**-100
    return tl.where(squares == float("inf"), tl.full((), small, squares.dtype), tl.full((), 1.0, squares.dtype))


@triton.jit
def norm_divisor(squares, scale, eps):
    """max(norm, eps) of a scaled vector; NaN stays."""
    norm = square_root(squares)
    least = eps * scale
    return tl.where((norm > least) | (norm != norm), norm, least)


@triton.jit
def normalize(x, eps):
    """x / max(norm(x), eps); columns that are not there hold 0."""
    squares = add_columns(x * x)
    scale = norm_scale(squares)
    if scale != 1:
        x = x * scale
        squares = add_columns(x * x)
    return divide(x, norm_divisor(squares, scale, eps))


@triton.jit
def to_odd(x):
    """float64 to float32 rounded to odd: an inexact result keeps its last bit set, which leaves bits enough to round
    once more, to 16."""
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    inexact = (nearest.to(tl.float64) != x) & (x == x) & ((bits & 1) == 0)
    beyond = tl.abs(nearest.to(tl.float64)) > tl.abs(x)
    odd = tl.where(nearest == 0, tl.where(x < 0, -0x7FFFFFFF, 1), tl.where(beyond, bits - 1, bits + 1))
    return tl.where(inexact, odd, bits).to(tl.float32, bitcast=True)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in another dtype, rounded once, to the nearest and in ties to even."""
    if x.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        return round_to(to_odd(x), dtype)
    elif dtype == tl.bfloat16:  # by hand: the interpreter's own conversion cuts off
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
