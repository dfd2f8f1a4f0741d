"""Tokens themselves instead of one vector per text: what late interaction (ColBERT) keeps of a text."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch
from .checks import MASK_DTYPES, check_memory, check_tensor, name_of, place, require
from .layouts import OWN, raise_in_callers_words, to_op
from .options import WRONG, option, options_given, refuse
from .recording import below_autograd, skips_autograd

__all__ = ["keep_mask", "tokens"]


def tokens(
    hidden: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    total: int | None = None,
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """The real tokens x_1..x_n of each segment, packed: values [N, D] and the cu_seqlens [B + 1] that part them.

    Segment b's tokens are values[cu_seqlens[b] : cu_seqlens[b + 1]], in order; a segment without real tokens has none
    there, and where segments overlap, each has the token. Truncated, normalised and cast in one pass, and what is no
    real token is never read into them:

    >>> hidden = torch.randn(2, 5, 384)
    >>> mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    >>> values, cu_seqlens = fastpool.tokens(hidden, mask, truncate_dim=128, normalize=True)
    >>> values.shape, cu_seqlens
    (torch.Size([8, 128]), tensor([0, 3, 8]))

    The same as a nested tensor is torch.nested.nested_tensor_from_jagged(values, cu_seqlens).

    Args:
        hidden: token states, padded [B, S, H], packed [T, H] or a jagged nested tensor, and
        mask: which of them are real, and
        cu_seqlens: where segments are, as pooling functions take them (but no spans [B, n]); fastpool.keep_mask makes a
            mask that leaves out some of the real tokens.
        lengths: the same as ends, for padded input.
        starts: int32 or int64; the first row of each segment.
        ends: int32 or int64; one behind its last row.
        truncate_dim: use the first `truncate_dim` columns only (Matryoshka); truncation comes before normalisation.
        normalize: divide each token by max(its L2 norm, 1e-12).
        out_dtype: of the values; hidden's dtype if not given.
        total: how many rows the values have, at least as many as there are real tokens; rows behind those are zeros.
            On a CPU fewer are a ValueError; on a GPU, which does not wait for their number, tokens from `total` on are
            cut off, of cu_seqlens too, unless values are validated (fastpool.validate).

    Returns:
        values, [N, truncate_dim or H], or [total, ...], and cu_seqlens, int64, [B + 1]. Norms are float32 (float64 for
        float64 input), in the canonical order of fastpool.l2_normalize, whose bits they have, and values are rounded
        once. Without total, on a GPU the call waits once for N, unless every row is real because nothing says
        otherwise; it can be part of a CUDA graph with total alone. To torch.compile, N is a size that depends on data.
        Gradients flow to hidden; overlapping segments add up in their order; what is no real token gets 0.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor; a floating-point mask above all; an option of
            another type; an argument that there is not, such as dim, which in torch is an axis.
        ValueError: a wrong shape, device or value; a tensor whose memory was freed or shrunk; a total below 0, or on a
            CPU below N; of values in index tensors and integer masks on a GPU, and of tokens that are not finite, where
            asked (fastpool.validate).
        RuntimeError: the backend asked for cannot serve the call.
        torch.OutOfMemoryError: the values do not fit in memory.
    """
    name, names = "fastpool.tokens", OWN
    if unknown:
        refuse(name, unknown)
    if lengths is not None or getattr(hidden, "is_nested", False):
        hidden, cu_seqlens, starts, ends, names = to_op(name, hidden, cu_seqlens, starts, ends, lengths)
    more = options_given(name, starts, ends, truncate_dim, normalize, out_dtype)
    if total is not None:
        more["total"] = option(name, "total", total, int)
    op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fastpool.tokens.default
    try:
        if skips_autograd(hidden):
            with below_autograd():
                return op(hidden, mask, cu_seqlens, **more)
        return op(hidden, mask, cu_seqlens, **more)
    except WRONG as error:
        raise_in_callers_words(error, names, ("tokens", (hidden, mask, cu_seqlens), more))


_IDS = tuple(dtype for dtype in MASK_DTYPES if dtype.is_signed or dtype == torch.uint8)  # what torch.isin takes
_KEEP_MASK = "fastpool.keep_mask"


def keep_mask(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    skip: Sequence[int] | Tensor | None = None,
    keep: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """A mask of the tokens to keep: real ones whose id is not in `skip` and, where that is given, is in `keep`.

    Late interaction leaves punctuation out of documents; a model of steps keeps the tokens that end one:

    >>> ids = torch.tensor([[101, 7592, 1010, 2088, 999, 102, 0, 0]])
    >>> mask = (ids != 0).long()
    >>> fastpool.keep_mask(ids, mask, skip=[1010, 999])
    tensor([[ True,  True, False,  True, False,  True, False, False]])
    >>> hidden = torch.randn(1, 8, 384)
    >>> values, cu_seqlens = fastpool.tokens(hidden, fastpool.keep_mask(ids, mask, skip=[1010, 999]))
    >>> cu_seqlens
    tensor([0, 4])
    >>> steps, _ = fastpool.tokens(hidden, fastpool.keep_mask(ids, mask, keep=[102]))
    >>> steps.shape
    torch.Size([1, 384])

    Args:
        ids: of tokens; int8, int16, int32, int64 or uint8, any shape.
        mask: bool or an integer type, of that shape; set where a token is real. All are, if it is not given.
        skip: ids, as a sequence of ints or a tensor of one of those dtypes. A tensor on ids' device spares a GPU the
            copy of a list, for which the host waits, and can be part of a CUDA graph.
        keep: likewise; an empty one keeps nothing.

    Returns:
        bool, of ids' shape, on their device.

    Raises:
        TypeError: something that is not a tensor, or a wrong dtype; ids in a list that are not ints.
        ValueError: a mask of another shape, or of other integers than 0 and 1 (on a GPU where asked,
            fastpool.validate); a tensor on another device than ids, or whose memory was freed or shrunk.
    """
    _check_ids("ids", ids)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        check_tensor(_KEEP_MASK, "mask", mask, optional=False)
        require(
            mask.dtype in MASK_DTYPES,
            TypeError,
            f"{_KEEP_MASK}: mask must be bool or an integer type, got {name_of(mask.dtype)}",
        )
        require(
            mask.shape == ids.shape,
            ValueError,
            f"{_KEEP_MASK}: mask must have ids' shape, {list(ids.shape)}, got {list(mask.shape)}",
        )
        _check_place("mask", mask, ids)
        kept = mask != 0
        # As every function checks an integer mask; whoever is to take what comes out could not any more.
        checked = mask.dtype != torch.bool and not (mask.is_meta or torch.compiler.is_compiling())
        if checked and (mask.device.type == "cpu" or dispatch.validates()):
            for at in (kept & (mask != 1)).nonzero()[:1].tolist():
                raise ValueError(
                    f"{_KEEP_MASK}: mask must be 0 and 1, got mask{place(*at)} = {mask[tuple(at)].item()}; one that "
                    "numbers the texts of a row is for fastpool.segments(mask)"
                )
    if skip is not None:
        kept = kept & ~torch.isin(ids, _listed("skip", skip, ids))
    if keep is not None:
        kept = kept & torch.isin(ids, _listed("keep", keep, ids))
    return kept


def _check_ids(name: str, ids: Tensor) -> None:
    check_tensor(_KEEP_MASK, name, ids, optional=False)
    require(
        ids.dtype in _IDS,
        TypeError,
        f"{_KEEP_MASK}: {name} must be int8, int16, int32, int64 or uint8, got {name_of(ids.dtype)}",
    )
    check_memory(_KEEP_MASK, name, ids)


def _check_place(name: str, tensor: Tensor, ids: Tensor) -> None:
    require(
        tensor.device == ids.device,
        ValueError,
        f"{_KEEP_MASK}: {name} must be on ids' device, {ids.device}, got {tensor.device}",
    )
    check_memory(_KEEP_MASK, name, tensor)


def _listed(name: str, values: Any, ids: Tensor) -> Tensor:
    """The ids of a list, as torch.isin takes them."""
    if isinstance(values, Tensor):
        _check_ids(name, values)
        _check_place(name, values, ids)
        return values
    require(
        isinstance(values, Sequence) and not isinstance(values, str | bytes),
        TypeError,
        f"{_KEEP_MASK}: {name} must be a sequence of ints or a tensor, got {type(values).__name__}",
    )
    listed = [option(_KEEP_MASK, f"{name}[{i}]", value, int) for i, value in enumerate(values)]
    return torch.tensor(listed, dtype=torch.int64, device=ids.device)
