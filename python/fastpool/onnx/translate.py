"""The ops themselves, with the arguments of arguments.py."""

from typing import NoReturn

from ..constants import NORM_EPS
from ..modes import Mode
from . import finish
from .activation import activate
from .graph import INT64, Dtype, Value, accumulator, constant, counted, first_columns, op
from .segment import TokenIndex
from .state import reduce
from .weight import weights_of


def pool(
    mode: Mode,
    hidden: Value,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    weights: Value | None = None,
    *,
    starts: Value | None = None,
    ends: Value | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    out_dtype: Dtype | None = None,
) -> Value:
    """One vector per segment, [B, truncate_dim or H]."""
    dtype = accumulator(hidden)
    tokens = TokenIndex(mode.select, hidden, mask, cu_seqlens, starts, ends)
    by_token = weights_of(mode, tokens, weights, dtype)
    states = tokens.at(first_columns(hidden, truncate_dim))
    if mode.activates_tokens:
        states = activate(op.Cast(states, to=dtype), mode.activation, dtype)
    x = reduce(mode.reduce, tokens, states, by_token, dtype)
    x = finish.divide(mode.divisor, tokens, by_token, x, dtype)
    if mode.activates_result:
        x = activate(x, mode.activation, dtype)
    if normalize:
        x = finish.normalize(x, NORM_EPS, dtype)
    return op.Cast(x, to=out_dtype or hidden.dtype)


def l2_normalize(
    x: Value,
    *,
    truncate_dim: int | None = None,
    truncate_dims: Value | None = None,
    eps: float = NORM_EPS,
    out_dtype: Dtype | None = None,
) -> Value:
    """x / max(norm(x), eps) over the last dimension; 0 in the columns that truncate_dims leave out."""
    dtype = accumulator(x)
    columns = op.Cast(first_columns(x, truncate_dim), to=dtype)

    def used(values: Value) -> Value:
        if truncate_dims is None:
            return values
        sizes = op.Unsqueeze(op.Cast(truncate_dims, to=INT64), [-1])
        return op.Where(op.Less(counted(op.Shape(columns, start=-1)), sizes), values, constant(0.0, dtype))

    return op.Cast(used(finish.normalize(used(columns), eps, dtype)), to=out_dtype or x.dtype)


def quantize(
    x: Value, kind: int, *, ranges: Value | None = None, truncate_dim: int | None = None, zero_bit: bool = False
) -> NoReturn:
    """No graph: a runtime's own tanh and packing of bits would not give these bytes."""
    raise ValueError(
        "fastpool.onnx: quantize has no translation; export the embeddings, and quantize what the runtime gives"
    )
