"""What each token is multiplied by."""

from ..modes import Mode, Weight
from .graph import INT32, Dtype, Value, constant, op
from .segment import TokenIndex


def weights_of(mode: Mode, tokens: TokenIndex, weights: Value | None, dtype: Dtype) -> Value | None:
    """[B, L], 0 where no real token is; None where a mode multiplies by nothing."""
    if mode.weight is Weight.ONE:
        return None
    given = _positions(tokens) if weights is None else tokens.at(weights)
    return op.Where(tokens.real, op.Cast(given, to=dtype), constant(0.0, dtype))


def _positions(tokens: TokenIndex) -> Value:
    """1, 2, 3, ... from the first real token on, holes counted."""
    begun = op.Greater(op.CumSum(op.Cast(tokens.real, to=INT32), 1), op.Cast(0, to=INT32))
    return op.CumSum(op.Cast(begun, to=INT32), 1)
