"""What follows a reduction: divide, normalise, round once, store."""

import triton
import triton.language as tl

from ..constants import NORM_SCALES
from ..modes import Divisor
from .elementary import divide
from .state import add_columns, one_by_one

ONE = tl.constexpr(Divisor.ONE.value)
COUNT = tl.constexpr(Divisor.COUNT.value)
SQRT_COUNT = tl.constexpr(Divisor.SQRT_COUNT.value)
WEIGHT = tl.constexpr(Divisor.WEIGHT.value)
SCALE32 = tl.constexpr(NORM_SCALES[0])
SCALE64 = tl.constexpr(NORM_SCALES[1])

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divisor_of(count, weight, divisor, ACC: tl.constexpr):
    """What a mode divides by; 0 where there is no real token."""
    value = tl.full(weight.shape, 1.0, ACC)
    if divisor == COUNT:
        value = count.to(ACC)
    elif divisor == SQRT_COUNT:
        value = square_root(count.to(ACC))
    elif divisor == WEIGHT:
        value = weight
    return tl.where(count == 0, 0.0, value)


@triton.jit
def counts_tokens(divisor):
    """Whether a divisor depends on how many real tokens there are, so that a gradient has to count them again."""
    return (divisor == COUNT) | (divisor == SQRT_COUNT)


@triton.jit
def quotient(x, divisor):
    """0 where the divisor is: no real token, or weights that add up to nothing."""
    return tl.where(divisor == 0, 0.0, divide(x, tl.where(divisor == 0, 1.0, divisor)))


@triton.jit
def norm_scale(squares, eps):
    """1, or the power of two that vectors are scaled by because their squares, which add up to this, overflow or
    underflow. One below eps stays as it is where eps * scale might overflow: nothing is divided by its norm."""
    small: tl.constexpr = SCALE64 if squares.dtype == tl.float64 else SCALE32
    below = (eps < small) & (squares < small * small)
    scale = tl.where(below, tl.full((), 1.0 / small, squares.dtype), tl.full((), 1.0, squares.dtype))
    return tl.where(squares == float("inf"), tl.full((), small, squares.dtype), scale)


@triton.jit
def norm_divisor(norm, scale, eps):
    """max(norm, eps), and whether it is the norm; NaN stays. Norm and result are scaled."""
    least = eps * scale
    return tl.where((norm > least) | (norm != norm), norm, least), (norm < least) == 0


@triton.jit
def add_squares(x):
    """Of a vector, a number; of several, [N, M], [N, 1]."""
    squares = add_columns(x * x)
    return squares if len(x.shape) == 1 else one_by_one(squares)[:, None]


@triton.jit
def differs(x, value):
    """Whether any of x does."""
    different = x != value
    return different if len(x.shape) == 0 else tl.max(different.to(tl.int32)) != 0


@triton.jit
def scaled_norm(x, eps):
    """x, scaled where it must be, its divisor, whether that is its norm, and the scale; columns that are not there
    hold 0."""
    squares = add_squares(x)
    scale = norm_scale(squares, eps)
    norm = square_root(squares)
    if differs(scale, 1):
        x = x * scale
        norm = divide(square_root(add_squares(x * scale)), scale)
    divisor, is_norm = norm_divisor(norm, scale, eps)
    return x, divisor, is_norm, scale


@triton.jit
def normalize(x, eps):
    """x / max(norm(x), eps); columns that are not there hold 0."""
    x, divisor, _, _ = scaled_norm(x, eps)
    return divide(x, divisor)


@triton.jit
def to_odd(x):
    """float64 to float32 rounded to odd: an inexact result keeps its last bit set, which leaves bits enough to round
    once more, to 16 (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008)."""
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
    elif dtype == tl.bfloat16 and INTERPRETED:  # by hand: the interpreter's own conversion cuts off
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
