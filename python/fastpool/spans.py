"""Spans of padded input: starts and ends [B, n], several segments of each row. Like those of layouts.py a form of input
that is Python's alone: the rows of all texts, one behind another, are packed input."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .calls import PoolCall
from .checks import PLAIN, check_index_dtype, check_leading, check_memory, check_tensor, require
from .layouts import Names, refuse_in_callers_words
from .modes import MODES
from .options import WRONG

T = TypeVar("T")
_PER_TOKEN = ("mask", "weights", "scores")
_OWN = ("weights", "scores", "query")


def given(hidden: Any, starts: Any, ends: Any) -> bool:
    """Whether these are bounds of spans: two dimensions, beside padded hidden."""
    return getattr(hidden, "ndim", 0) == 3 and 2 in (getattr(starts, "ndim", 0), getattr(ends, "ndim", 0))


def on_rows(
    function: Callable[..., T],
    modes: tuple[str, ...],
    hidden: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    names: Names,
    **more: Any,
) -> T:
    """What a pooling function of these modes gives, as packed input, for spans; a tensor by [B, n]. `names`: what the
    caller calls hidden, starts and ends. Raises what the functions do, in the words of padded input."""
    arguments = {"mask": mask, "cu_seqlens": cu_seqlens, "starts": starts, "ends": ends, **more}
    spans = check(f"fastpool.{modes[0]}", hidden, names, **arguments)
    rows, apart = _rows(hidden)
    packed = arguments | {name: _of_rows(arguments.get(name), apart, len(rows)) for name in _PER_TOKEN}
    packed |= dict(zip(("starts", "ends"), _bounds(hidden, apart, len(rows), starts, ends), strict=True))
    if isinstance(query := more.get("query"), Tensor) and query.dim() == 4:
        packed["query"] = query.flatten(0, 1)
    try:
        result = function(rows, **{name: value for name, value in packed.items() if value is not None})
    except WRONG:
        for mode in modes:
            for call in columns(mode, hidden, names, **arguments):
                refuse_in_callers_words(call, call.names)
        raise
    return result.unflatten(0, spans) if isinstance(result, Tensor) else result


def columns(
    mode: str, hidden: Tensor, names: Names, *, starts: Any, ends: Any, query: Any = None, **arguments: Any
) -> Iterator[PoolCall]:
    """The padded calls that a call for spans is, one for each column of its bounds. Raises for shapes that are none."""
    arguments = {"query": query, **arguments}
    _, n = check(f"fastpool.{mode}", hidden, names, starts=starts, ends=ends, **arguments)
    for j in range(n):
        bounds = {name: bound[:, j] for name, bound in (("starts", starts), ("ends", ends)) if bound is not None}
        if isinstance(query, Tensor) and query.dim() == 4:
            arguments["query"] = query[:, j]
        said = {**names, **{name: f"{names.get(name, name)}[:, {j}]" for name in bounds}}
        of_mode = {name: one for name, one in arguments.items() if name not in _OWN or MODES[mode].takes(name)}
        yield PoolCall(mode, hidden, **of_mode, **bounds, names=said)


def covered(hidden: Tensor, starts: Tensor | None, ends: Tensor | None) -> Tensor:
    """Which rows, [B, S], lie in a span of their text."""
    starts, ends = _both(hidden, starts, ends)
    first, behind = (bound.long().clamp(0, hidden.shape[1]) for bound in (starts, ends))
    one = torch.ones_like(first)
    steps = one.new_zeros(hidden.shape[0], hidden.shape[1] + 1).scatter_add(1, first, one).scatter_add(1, behind, -one)
    return steps.cumsum(1)[:, :-1] > 0  # spans may share rows


def check(
    op: str, hidden: Tensor, names: Names, *, starts: Any, ends: Any, query: Any = None, **arguments: Any
) -> tuple[int, int]:
    """B and n. Raises what would not be seen of the packed call any more: shapes, and memory that is read here."""
    states = names.get("hidden", "hidden")
    check_tensor(op, states, hidden, optional=False)
    check_memory(op, states, hidden)
    for name in _PER_TOKEN:
        check_tensor(op, name, arguments.get(name), optional=True)
        if arguments.get(name) is not None:
            check_leading(op, name, arguments[name], states, hidden)
            check_memory(op, name, arguments[name])
    bounds = {names.get(name, name): bound for name, bound in (("starts", starts), ("ends", ends)) if bound is not None}
    for name, bound in bounds.items():
        check_tensor(op, name, bound, optional=False)
        check_index_dtype(op, name, bound)
        require(
            bound.dim() == 2 and len(bound) == len(hidden),
            ValueError,
            f"{op}: {name} must have one dimension, or for spans of padded input be [{len(hidden)}, n], "
            f"got shape {list(bound.shape)}",
        )
        require(
            bound.device == hidden.device,
            ValueError,
            f"{op}: {name} must be on {states}'s device, {hidden.device}, got {bound.device}",
        )
        check_memory(op, name, bound)
    first, *others = bounds.values()
    for other in others:
        require(
            other.shape == first.shape,
            ValueError,
            f"{op}: {' and '.join(bounds)} must have one shape, got {list(first.shape)} and {list(other.shape)}",
        )
    texts, n = first.shape
    require(
        not isinstance(query, Tensor) or query.dim() in (1, 2) or (query.dim() == 4 and query.shape[:2] == first.shape),
        ValueError,
        f"{op}: query beside spans must be [H], [K, H] or [{texts}, {n}, K, H], got shape "
        f"{list(getattr(query, 'shape', ()))}",
    )
    return texts, n


def _rows(hidden: Tensor) -> tuple[Tensor, int]:
    """The rows of all texts, [T, H], and how many lie from the first of one text to the first of the next. Those of a
    slice, hidden[:, 1:-1], lie apart, and what is between them belongs to no segment. Copied where they do not follow
    each other by one stride, or lie far apart."""
    texts, rows, width = hidden.shape
    plain = type(hidden) in PLAIN and not torch.compiler.is_compiling()
    if plain and not torch._C._are_functorch_transforms_active() and texts > 1 and hidden.numel() > 0:
        of_text, of_row, of_column = hidden.stride()
        beside = of_column == 1 and of_row >= width and of_text % of_row == 0
        if beside and rows < (apart := of_text // of_row) <= 2 * rows:  # a gradient has what lies between, too
            size = (texts - 1) * apart + rows
            return hidden.as_strided((size, width), (of_row, of_column)), apart
    return hidden.flatten(0, 1), rows


def _of_rows(values: Tensor | None, apart: int, size: int) -> Tensor | None:
    """What stands beside tokens, [B, S], beside such rows."""
    if values is None:
        return None
    if apart > values.shape[1]:
        values = torch.nn.functional.pad(values, (0, apart - values.shape[1]))
    return values.flatten()[:size]


def _both(hidden: Tensor, starts: Tensor | None, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """starts and ends: a text's own, where one of them is not given."""
    like = starts if ends is None else ends
    assert like is not None
    none = torch.zeros_like(like)
    return none if starts is None else starts, none + hidden.shape[1] if ends is None else ends


def _bounds(hidden: Tensor, apart: int, size: int, starts: Tensor | None, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """starts and ends as row numbers, [B * n]. What lies outside of its own text is clamped to it, or where values are
    checked, moved behind all rows, for the op to refuse it, as it does what runs backwards."""
    texts, rows, _ = hidden.shape
    starts, ends = _both(hidden, starts, ends)
    first = torch.arange(texts, device=starts.device)[:, None] * apart
    if hidden.device.type == "cpu" or dispatch.validates():
        wrong = (starts < 0) | (ends > rows)
        starts, ends = (torch.where(wrong, size + 1, bound + first) for bound in (starts, ends))
    else:
        starts, ends = (bound.clamp(0, rows) + first for bound in (starts, ends))
    return starts.flatten(), ends.flatten()
