"""Token states as rows, whatever their layout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..calls import PoolCall
from ..layouts import to_op


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
) -> Tensor:
    """The rows, with 0 in those that are no segment's real token: a product's gradient multiplies all of them, and NaN
    times 0 is NaN. Raises, before anything is computed, what the mode's function does."""
    x: Tensor
    x, cu_seqlens, starts, ends, names = to_op(f"fastpool.{mode}", hidden, cu_seqlens, starts, ends, lengths)
    call = PoolCall(mode, x, mask, cu_seqlens, scores=scores, starts=starts, ends=ends, names=names)
    # A compiler, and torch.func.vmap, cannot read values; there the function does it.
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        dispatch.check(call)
    if call.padded and mask is None and starts is None and ends is None:
        return x
    first, behind = call.bounds()
    if call.padded:
        at = torch.arange(call.rows, device=x.device)
        real = (at >= first[:, None]) & (at < behind[:, None])
    else:
        steps = torch.zeros(call.rows + 1, dtype=torch.int64, device=x.device)
        steps = steps.index_add(0, first, torch.ones_like(first)).index_add(0, behind, -torch.ones_like(behind))
        real = steps.cumsum(0)[:-1] > 0  # segments may share rows
    if mask is not None:
        real = real & (mask != 0)
    return x.masked_fill(~real.unsqueeze(-1), 0)
