"""Pooling and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calls import PoolBackwardCall, PoolCall
from ..constants import NORM_EPS
from ..modes import MODES
from .activation import activate
from .finish import divide, normalize, round_once
from .segment import TokenIndex
from .state import reduce, total_weight
from .tree import add_columns
from .weight import all_weights


def _one_query(call: PoolCall, k: int) -> PoolCall:
    """The call with one of its queries alone: [H], or [B, 1, H] where each segment has its own."""
    query = call.query
    if query is None or query.dim() == 1:
        return call
    return replace(call, query=query[k] if query.dim() == 2 else query[:, k : k + 1])


def pool(call: PoolCall) -> Tensor:
    """One vector per segment, and per query: call.output()'s shape."""
    results = [_pool(_one_query(call, k)) for k in range(call.queries)]
    return torch.stack(results, 1).reshape(call.shape) if results else call.output()


def _pool(call: PoolCall) -> Tensor:
    tokens = TokenIndex(call)
    x = divide(tokens, *reduce(tokens))
    mode = MODES[call.mode]
    if mode.activates_result:
        x = activate(x, mode.activation)
    if call.normalize:
        x = normalize(x, NORM_EPS)
    return round_once(x, call.out_dtype or call.hidden.dtype)


@dataclass
class Segment:
    """One segment of a PoolBackwardCall: its gradient over its divisor, and what its shares depend on."""

    gradient: Tensor  # [D]
    weights: Tensor  # [n, 1], of its real tokens
    states: Callable[[], Tensor]  # [n, H], of its real tokens, in the accumulator's dtype
    result: Tensor | None  # [D]
    query: Tensor | None  # [H]
    scale: float

    @property
    def columns(self) -> int:
        return self.gradient.shape[-1]


def _of_hidden(call: PoolBackwardCall, segment: Segment) -> list[Tensor]:
    """What the segment's gradient becomes at each of its real tokens, in parts that are added one after another.
    [n, D or H] each"""
    mode = MODES[call.pool.mode]
    if mode.gradient_finds_maximum:
        return [_first_maximum(segment)]
    if not mode.weighted:
        return [segment.gradient.expand(len(segment.weights), -1)]
    shares = [segment.gradient * segment.weights]
    if segment.query is not None:
        shares.append(segment.query * _of_products(segment)[:, None])
    return shares


def _first_maximum(segment: Segment) -> Tensor:
    assert segment.result is not None
    states = segment.states()[:, : segment.columns]
    equal = (states == segment.result) | (states.isnan() & segment.result.isnan())
    token = torch.arange(len(states), device=states.device)[:, None]
    return torch.where(equal.int().argmax(0) == token, segment.gradient, 0)


def _of_weights(segment: Segment) -> Tensor:
    """sum(g x) - sum(g y) over columns, for the weight of a token x of a segment with result y and gradient g. [n]"""
    assert segment.result is not None
    products = add_columns(segment.gradient * segment.states()[:, : segment.columns])
    return (products - add_columns(segment.gradient * segment.result))[:, 0]


def _of_scores(segment: Segment) -> Tensor:
    """The same for its score, whose weight is its own derivative. [n]"""
    return _of_weights(segment) * segment.weights[:, 0]


def _of_products(segment: Segment) -> Tensor:
    """The same for its product with the query. [n]"""
    return _of_scores(segment) * segment.scale


_SHARES: dict[str, Callable[[PoolBackwardCall, Segment], list[Tensor]]] = {
    "hidden": _of_hidden,
    "weights": lambda call, segment: [_of_weights(segment)],
    "scores": lambda call, segment: [_of_scores(segment)],
}


def _segments(call: PoolBackwardCall) -> list[tuple[int, Tensor, Segment]]:
    """Of a call with one query at most: numbers, the rows of real tokens, and what is known of those that have any."""
    pool, dtype = call.pool, call.gradient.dtype
    tokens = TokenIndex(pool)
    gradients = divide(tokens, call.gradient, total_weight(tokens))
    weights = all_weights(tokens)
    found = []
    for b in range(pool.batch if pool.rows > 0 else 0):
        rows = tokens.index[b][tokens.real[b]]
        if len(rows) == 0:
            continue
        hidden = pool.hidden[b] if pool.padded else pool.hidden
        query = None
        if pool.query is not None:
            query = (pool.query[b, 0] if pool.query.dim() == 3 else pool.query).to(dtype)
        segment = Segment(
            gradients[b],
            weights[b][tokens.real[b]][:, None],
            lambda hidden=hidden, rows=rows: hidden[rows].to(dtype),  # type: ignore[misc]  # bound now
            None if call.result is None else call.result[b],
            query,
            pool.scale,
        )
        found.append((b, rows, segment))
    return found


def _each_query(call: PoolBackwardCall) -> list[PoolBackwardCall]:
    pool = call.pool
    if pool.query is None or pool.query.dim() == 1:
        return [call]
    results = call.result
    return [
        replace(
            call,
            pool=_one_query(pool, k),
            gradient=call.gradient[:, k],
            result=None if results is None else results[:, k],
        )
        for k in range(pool.queries)
    ]


def pool_backward(call: PoolBackwardCall) -> Tensor:
    """The gradient of an argument: +0, then what each segment shares out, in the order of segments, and of its queries;
    rounded once. What belongs to no segment, or is not real, is 0."""
    if call.of == "query":
        return _of_queries(call)
    pool, of = call.pool, getattr(call.pool, call.of)
    total = of.new_zeros(of.shape, dtype=call.gradient.dtype)
    by_query = [_segments(one) for one in _each_query(call)]
    for of_segment in zip(*by_query, strict=True):
        for b, rows, segment in of_segment:
            into = total[b] if pool.padded else total
            for share in _SHARES[call.of](call, segment):
                if of is pool.hidden:
                    into[rows, : share.shape[-1]] += share
                else:
                    into[rows] += share
    return round_once(total, of.dtype)


def _of_queries(call: PoolBackwardCall) -> Tensor:
    """Of each segment's queries: the sum of its tokens, each times the gradient of its product with the query, in the
    canonical order."""
    total = call.output().zero_()
    for k, one in enumerate(_each_query(call)):
        pool = one.pool
        weights = pool.hidden.new_zeros(pool.batch, pool.rows, dtype=total.dtype)
        for b, rows, segment in _segments(one):
            weights[b, rows] = _of_products(segment)
        starts, ends = pool.bounds()
        for b in range(pool.batch):
            one_segment = slice(b, b + 1)
            own = one_segment if pool.padded else None
            weighted = PoolCall(
                "weighted_mean",
                pool.hidden[own],
                None if pool.mask is None else pool.mask[own],
                weights=weights[one_segment],
                starts=starts[one_segment],
                ends=ends[one_segment],
            )
            total[b, k] = reduce(TokenIndex(weighted))[0][0]
    return total
