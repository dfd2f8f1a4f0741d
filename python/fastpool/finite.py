"""Results that are not finite, and what made them so: what validation looks at once a call has run."""

from typing import NoReturn

import torch
from torch import Tensor

from .calls import Call, NormalizeCall, PoolCall, accumulator
from .checks import name_of, place
from .modes import MODES


def check_finite(call: Call, result: Tensor) -> None:
    """Raises ValueError where a pooling's or a normalisation's result is not finite; a gradient's may be anything.
    Synchronises."""
    if not isinstance(call, PoolCall | NormalizeCall) or bool(result.isfinite().all()):
        return
    *row, _ = (~result.isfinite()).nonzero()[0].tolist()
    columns = (~result[tuple(row)].isfinite()).nonzero()[:, 0]
    if isinstance(call, PoolCall):
        _why_pooled(call, row[0], columns)
    _why_normalized(call, row, columns)


def _why_pooled(call: PoolCall, segment: int, columns: Tensor) -> NoReturn:
    """Of that segment's result, which is not finite in these columns."""
    start, end = (int(bounds[segment]) for bounds in call.bounds())
    rows = torch.arange(start, end, device=call.hidden.device)
    sequence = (segment,) if call.padded else ()
    if call.mask is not None:
        rows = rows[call.mask[sequence][rows] != 0]
    rows = rows[MODES[call.mode].select.among]
    what = f"{call.op}: the result of segment {segment} is not finite: "
    wrong = ~call.hidden[sequence][rows[:, None], columns].isfinite()
    if wrong.any():
        token, column = wrong.nonzero()[0].tolist()
        at = (*sequence, int(rows[token]), int(columns[column]))
        raise ValueError(f"{what}{call.name('hidden')}{place(*at)} is {call.hidden[at].item()}")
    if call.weights is not None:
        wrong = ~call.weights[sequence][rows].isfinite()
        if wrong.any():
            at = (*sequence, int(rows[wrong][0]))
            raise ValueError(f"{what}weights{place(*at)} is {call.weights[at].item()}")
    mode, sums, of = MODES[call.mode], accumulator(call.hidden.dtype), call.out_dtype or call.hidden.dtype
    if mode.copies_tokens:
        raise ValueError(f"{what}its tokens are, so the result overflowed {name_of(of)}")
    summed = "a sum, or its quotient," if mode.takes_weights else "their sum"
    beyond = f", or the result {name_of(of)}" if of != sums else ""
    raise ValueError(f"{what}its tokens are, so {summed} overflowed {name_of(sums)}{beyond}")


def _why_normalized(call: NormalizeCall, row: list[int], columns: Tensor) -> NoReturn:
    """Of that row's result, which is not finite in these columns."""
    what = f"{call.op}: the result of row {place(*row)} is not finite: "
    values = call.x[tuple(row)][columns]
    wrong = ~values.isfinite()
    if wrong.any():
        column = int(wrong.nonzero()[0])
        raise ValueError(f"{what}x{place(*row, int(columns[column]))} is {values[column].item()}")
    raise ValueError(f"{what}x is, but its norm and eps, {call.eps:g}, are 0 in {name_of(accumulator(call.x.dtype))}")
