"""How tokens become one vector."""

from collections.abc import Callable

from ..constants import LEAF
from ..modes import Reduce
from .graph import BOOL, INT32, Dtype, Value, constant, joined, op, size
from .segment import TokenIndex


def add_rows(x: Value, dtype: Dtype) -> Value:
    """[B, L, C] over L, [B, C]: twice LEAF rows at a time, then the rest. A runtime may add rows one after another,
    with an error that grows as their number does."""
    for _ in range(2):
        leaves = op.Div(op.Add(size(x, 1), [LEAF - 1]), [LEAF])
        missing = op.Sub(op.Mul(leaves, [LEAF]), size(x, 1))
        x = op.Pad(x, joined(0, missing), constant(0.0, dtype), [1])
        x = op.Reshape(x, joined(size(x, 0), leaves, LEAF, size(x, 2)), allowzero=1)
        x = op.ReduceSum(x, [2], keepdims=0)
    return op.ReduceSum(x, [1], keepdims=0)


def _greatest(x: Value, dtype: Dtype) -> Value:
    """[B, L, C] over L, [B, C]. ReduceMax need not pass NaN on, and onnxruntime's does not."""
    nan = op.Cast(op.ReduceMax(op.Cast(op.IsNaN(x), to=INT32), [1], keepdims=0), to=BOOL)
    return op.Where(nan, constant(float("nan"), dtype), op.ReduceMax(x, [1], keepdims=0))


# What stands where no real token is, and how tokens meet.
_STATES: dict[Reduce, tuple[float, Callable[[Value, Dtype], Value]]] = {
    Reduce.SUM: (0.0, add_rows),
    Reduce.MAX: (float("-inf"), _greatest),
}


def reduce(how: Reduce, tokens: TokenIndex, states: Value, weights: Value | None, dtype: Dtype) -> Value:
    """States [B, L, C] and their weights [B, L] become [B, C]; 0 where no token is real."""
    neutral, merge = _STATES[how]
    x = op.Where(op.Unsqueeze(tokens.real, [2]), op.Cast(states, to=dtype), constant(neutral, dtype))
    x = merge(x if weights is None else op.Mul(x, op.Unsqueeze(weights, [2])), dtype)
    return x if neutral == 0 else op.Where(op.Cast(tokens.count(), to=BOOL), x, constant(0.0, dtype))
