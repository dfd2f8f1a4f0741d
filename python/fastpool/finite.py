"""Results that are not finite, and what made them so: what validation looks at once a call has run."""

import math
from typing import NoReturn

import torch
from torch import Tensor

from .calls import Call, NormalizeCall, PoolCall, QuantizeCall, Result, TokensCall, accumulator
from .checks import name_of, place
from .modes import MODES
from .reference.tokens import real_tokens


def check_finite(call: Call, result: Result) -> None:
    """Raises ValueError where a pooling's or a normalisation's result is not finite, or a token, or what is quantised,
    whose bytes do not tell; a gradient's result may be anything. Synchronises."""
    if isinstance(call, TokensCall):
        return _check_tokens(call, result[0])
    if isinstance(call, QuantizeCall):
        return _check_quantized(call)
    assert isinstance(result, Tensor)
    if not isinstance(call, PoolCall | NormalizeCall) or bool(result.isfinite().all()):
        return
    *row, _ = (~result.isfinite()).nonzero()[0].tolist()
    columns = (~result[tuple(row)].isfinite()).nonzero()[:, 0]
    if isinstance(call, PoolCall):
        _why_pooled(call, *row, columns=columns)
    _why_normalized(call, row, columns)


def _check_quantized(call: QuantizeCall) -> None:
    for at in (~call.x[..., : call.columns].isfinite()).nonzero()[:1].tolist():
        raise ValueError(f"{call.op}: x must be finite, got x{place(*at)} = {call.x[tuple(at)].item()}")


def _why_pooled(call: PoolCall, segment: int, *query: int, columns: Tensor) -> NoReturn:
    """Of that segment's result, or of that query's for it, which is not finite in these columns."""
    mode, sums, of = MODES[call.mode], accumulator(call.hidden.dtype), call.out_dtype or call.hidden.dtype
    start, end = (int(bounds[segment]) for bounds in call.bounds())
    rows = torch.arange(start, end, device=call.hidden.device)
    sequence = (segment,) if call.padded else ()
    if call.mask is not None:
        rows = rows[call.mask[sequence][rows] != 0]
    rows = rows[mode.select.among]
    what = f"{call.op}: the result of segment {segment}{''.join(f', query {k},' for k in query)} is not finite: "
    if call.query is not None:  # its products are of all columns
        columns = torch.arange(call.hidden.shape[-1], device=call.hidden.device)
    wrong = ~call.hidden[sequence][rows[:, None], columns].isfinite()
    if wrong.any():
        token, column = wrong.nonzero()[0].tolist()
        at = (*sequence, int(rows[token]), int(columns[column]))
        raise ValueError(f"{what}{call.name('hidden')}{place(*at)} is {call.hidden[at].item()}")
    for name, values in (("weights", call.weights), ("scores", call.scores)):
        if values is not None:
            wrong = ~values[sequence][rows].isfinite()
            if name == "scores":
                wrong &= values[sequence][rows] != float("-inf")  # which weighs nothing
            if wrong.any():
                at = (*sequence, int(rows[wrong][0]))
                raise ValueError(f"{what}{name}{place(*at)} is {values[at].item()}")
    if call.query is not None:
        _why_of_query(call, call.query, (segment, *query)[3 - call.query.dim() :], what)
    if mode.copies_tokens:
        raise ValueError(f"{what}its tokens are, so the result overflowed {name_of(of)}")
    summed = "a sum, or its quotient," if mode.weighted else "their sum"
    if mode.takes_query:
        summed = f"a product with the query, {summed}"
    beyond = f", or the result {name_of(of)}" if of != sums else ""
    raise ValueError(f"{what}its tokens are, so {summed} overflowed {name_of(sums)}{beyond}")


def _why_of_query(call: PoolCall, query: Tensor, which: tuple[int, ...], what: str) -> None:
    """Raises where that query, or the scale, is not finite."""
    wrong = ~query[which].isfinite()
    if wrong.any():
        at = (*which, int(wrong.nonzero()[0]))
        raise ValueError(f"{what}query{place(*at)} is {query[at].item()}")
    if not math.isfinite(call.scale):
        raise ValueError(f"{what}scale is {call.scale}")


def _why_normalized(call: NormalizeCall, row: list[int], columns: Tensor) -> NoReturn:
    """Of that row's result, which is not finite in these columns."""
    what = f"{call.op}: the result of row {place(*row)} is not finite: "
    values = call.x[tuple(row)][columns]
    wrong = ~values.isfinite()
    if wrong.any():
        column = int(wrong.nonzero()[0])
        raise ValueError(f"{what}x{place(*row, int(columns[column]))} is {values[column].item()}")
    raise ValueError(f"{what}x is, but its norm and eps, {call.eps:g}, are 0 in {name_of(accumulator(call.x.dtype))}")


def _check_tokens(call: TokensCall, values: Tensor) -> None:
    for at, first in (~values.isfinite()).nonzero()[:1].tolist():
        segments, rows, _ = real_tokens(call)
        segment, row = int(segments[at]), int(rows[at])
        of_token = (segment, row) if call.padded else (row,)
        what = f"{call.op}: a token of segment {segment} is not finite: "
        states = call.hidden[of_token][: call.columns]
        for column in (~states.isfinite()).nonzero()[:1, 0].tolist():
            raise ValueError(f"{what}{call.name('hidden')}{place(*of_token, column)} is {states[column].item()}")
        state = f"{call.name('hidden')}{place(*of_token, first)} is {states[first].item()}"
        raise ValueError(f"{what}{state}, so the result overflowed {name_of(values.dtype)}")
