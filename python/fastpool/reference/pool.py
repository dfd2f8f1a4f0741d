"""Pooling and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls import PoolBackwardCall, PoolCall
from ..constants import NORM_EPS
from ..modes import MODES
from .finish import add_columns, divide, normalize, round_once
from .segment import TokenIndex
from .state import reduce
from .weight import all_weights


def pool(call: PoolCall) -> Tensor:
    """One vector per segment, [B, truncate_dim or H]."""
    tokens = TokenIndex(call)
    x = divide(tokens, reduce(tokens))
    if call.normalize:
        x = normalize(x, NORM_EPS)
    return round_once(x, call.out_dtype or call.hidden.dtype)


@dataclass
class Segment:
    """One segment of a PoolBackwardCall: its gradient over its divisor, and what its shares depend on."""

    gradient: Tensor  # [D]
    weights: Tensor  # [n, 1], of its real tokens
    states: Callable[[], Tensor]  # [n, D], of its real tokens, in the accumulator's dtype
    result: Tensor | None  # [D]


def _of_hidden(call: PoolBackwardCall, segment: Segment) -> Tensor:
    """What the segment's gradient becomes at each of its real tokens. [n, D]"""
    if call.needs_result:
        return _first_maximum(segment)
    if MODES[call.pool.mode].takes_weights:
        return segment.gradient * segment.weights
    return segment.gradient.expand(len(segment.weights), -1)


def _first_maximum(segment: Segment) -> Tensor:
    assert segment.result is not None
    states = segment.states()
    equal = (states == segment.result) | (states.isnan() & segment.result.isnan())
    token = torch.arange(len(states), device=states.device)[:, None]
    return torch.where(equal.int().argmax(0) == token, segment.gradient, 0)


def _of_weights(segment: Segment) -> Tensor:
    """sum(g x) - sum(g y) over columns, for the weight of a token x of a segment with result y and gradient g. [n]"""
    assert segment.result is not None
    products = add_columns(segment.gradient * segment.states())
    return (products - add_columns(segment.gradient * segment.result))[:, 0]


_SHARES: dict[str, Callable[[PoolBackwardCall, Segment], Tensor]] = {
    "hidden": _of_hidden,
    "weights": lambda call, segment: _of_weights(segment),
}


def pool_backward(call: PoolBackwardCall) -> Tensor:
    """The gradient of hidden, or of weights: +0, then what each segment shares out, in the order of segments; rounded
    once. What belongs to no segment, or is not real, is 0."""
    pool, dtype = call.pool, call.gradient.dtype
    tokens = TokenIndex(pool)
    gradients, weights = divide(tokens, call.gradient), all_weights(tokens)
    of: Tensor = getattr(pool, call.of)
    total = of.new_zeros(of.shape, dtype=dtype)
    into = total[..., : tokens.columns] if of is pool.hidden else total
    for b in range(pool.batch if pool.rows > 0 else 0):
        rows = tokens.index[b][tokens.real[b]]
        if len(rows) == 0:
            continue
        hidden = (pool.hidden[b] if pool.padded else pool.hidden)[..., : tokens.columns]
        segment = Segment(
            gradients[b],
            weights[b][tokens.real[b]][:, None],
            lambda hidden=hidden, rows=rows: hidden[rows].to(dtype),  # type: ignore[misc]  # bound now
            None if call.result is None else call.result[b],
        )
        (into[b] if pool.padded else into)[rows] += _SHARES[call.of](call, segment)
    return round_once(total, of.dtype)
