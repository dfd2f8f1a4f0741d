"""What becomes of logits: before they are added up, or of their maximum."""

import math

from ..modes import Activation
from .graph import Dtype, Value, constant, op


def activate(x: Value, activation: Activation, dtype: Dtype) -> Value:
    """ln(1 + max(x, 0)), and ln(1 + y) of that once more; 0 for -0, NaN for NaN. As many times as the activation's
    place."""
    zero = constant(0.0, dtype)
    y = op.Where(op.LessOrEqual(x, zero), zero, x)
    for _ in range(activation):
        y = _log1p(y, dtype)
    return y


def _log1p(x: Value, dtype: Dtype) -> Value:
    """ln(1 + x), for which ONNX has no operator: with u = 1 + x as it is rounded, ln(u) x / (u - 1), which loses no
    digit (Goldberg, "What Every Computer Scientist Should Know About Floating-Point Arithmetic", 1991, theorem 4)."""
    one = constant(1.0, dtype)
    u = op.Add(one, x)
    found = op.Mul(op.Log(u), op.Div(x, op.Sub(u, one)))
    return op.Where(op.Or(op.Equal(u, one), op.Equal(x, constant(math.inf, dtype))), x, found)
