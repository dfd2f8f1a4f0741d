"""What follows a reduction: divide, normalise. Rounding, once, is a Cast."""

from collections.abc import Callable

from ..constants import NORM_SCALES
from ..modes import Divisor
from .graph import DOUBLE, Dtype, Value, constant, op
from .segment import TokenIndex
from .state import add_rows


def _count(tokens: TokenIndex, weights: Value | None, dtype: Dtype) -> Value:
    return op.Cast(tokens.count(), to=dtype)


def _sqrt_count(tokens: TokenIndex, weights: Value | None, dtype: Dtype) -> Value:
    return op.Sqrt(_count(tokens, weights, dtype))


def _total_weight(tokens: TokenIndex, weights: Value | None, dtype: Dtype) -> Value:
    return add_rows(op.Unsqueeze(weights, [2]), dtype)


_DIVISORS: dict[Divisor, Callable[[TokenIndex, Value | None, Dtype], Value]] = {
    Divisor.COUNT: _count,
    Divisor.SQRT_COUNT: _sqrt_count,
    Divisor.WEIGHT: _total_weight,
}


def divide(divisor: Divisor, tokens: TokenIndex, weights: Value | None, x: Value, dtype: Dtype) -> Value:
    """x [B, C] over the divisor, 0 where that is 0."""
    if divisor is Divisor.ONE:
        return x
    by, zero = _DIVISORS[divisor](tokens, weights, dtype), constant(0.0, dtype)
    return op.Where(op.Equal(by, zero), zero, op.Div(x, by))


def normalize(x: Value, eps: float, dtype: Dtype) -> Value:
    """x / max(norm, eps) over the last dimension; a norm too large to square, or too small, is taken of x scaled."""
    small, squares = NORM_SCALES[dtype == DOUBLE], _add_squares(x)
    scale = op.Where(op.IsInf(squares), constant(small, dtype), constant(1.0, dtype))
    if eps < small:
        scale = op.Where(op.Less(squares, constant(small * small, dtype)), constant(1 / small, dtype), scale)
    scaled = op.Mul(x, scale)
    norm = op.Div(op.Sqrt(_add_squares(op.Mul(scaled, scale))), scale)
    least = op.Mul(constant(eps, dtype), scale)
    return op.Div(scaled, op.Where(op.Less(norm, least), least, norm))  # a NaN stays one


def _add_squares(x: Value) -> Value:
    return op.ReduceSum(op.Mul(x, x), [-1], keepdims=1)
