"""Token states as rows, whatever their layout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, spans
from .calls import PoolCall
from .layouts import to_op


def rows(hidden: Tensor) -> Tensor:
    """[B, S, H] or [T, H]; of a jagged nested tensor its values."""
    jagged: Any = hidden  # torch's types do not know its methods
    values: Tensor = jagged.values() if hidden.is_nested else hidden
    return values


def in_layout_of(hidden: Tensor, result: Tensor) -> Tensor:
    """Rows, as hidden has its own."""
    if not hidden.is_nested:
        return result
    jagged: Any = hidden
    nested: Tensor = torch.nested.nested_tensor_from_jagged(result, jagged.offsets(), jagged.lengths())
    return nested


def each(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """What a function makes of each token's state, in hidden's layout."""
    return in_layout_of(hidden, function(rows(hidden)))


def real_rows(
    mode: str,
    hidden: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    lengths: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scores: Tensor | None = None,
    recorded: bool = True,
) -> Tensor:
    """The rows, with 0 in those that are no segment's real token: a product's gradient multiplies all of them, and NaN
    times 0 is NaN; as they are where none is `recorded`. Raises, before anything is computed, what the mode's function
    does."""
    x: Tensor
    x, cu_seqlens, starts, ends, names = to_op(f"fastpool.{mode}", hidden, cu_seqlens, starts, ends, lengths)
    arguments: dict[str, Any] = {
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "scores": scores,
        "starts": starts,
        "ends": ends,
    }
    of_spans = spans.given(x, starts, ends)
    calls = spans.columns(mode, x, names, **arguments) if of_spans else [PoolCall(mode, x, **arguments, names=names)]
    # A compiler, and torch.func.vmap, cannot read values; there the function does it.
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        for call in calls:
            dispatch.check(call) if recorded else call.check()  # else the function itself looks at values
    if not recorded or (x.dim() == 3 and mask is None and starts is None and ends is None):
        return x
    real = spans.covered(x, starts, ends) if of_spans else _in_segments(PoolCall(mode, x, **arguments))
    if mask is not None:
        real = real & (mask != 0)
    return x.masked_fill(~real.unsqueeze(-1), 0)


def _in_segments(call: PoolCall) -> Tensor:
    """Which rows, [B, S] or [T], lie in a segment."""
    first, behind = call.bounds()
    if call.padded:
        at = torch.arange(call.rows, device=call.hidden.device)
        return (at >= first[:, None]) & (at < behind[:, None])
    steps = torch.zeros(call.rows + 1, dtype=torch.int64, device=call.hidden.device)
    steps = steps.index_add(0, first, torch.ones_like(first)).index_add(0, behind, -torch.ones_like(behind))
    return steps.cumsum(0)[:-1] > 0  # segments may share rows
