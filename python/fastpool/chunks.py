"""Chunks of texts whose tokens have been through the model together: late chunking is `mean(hidden, starts, ends)`.

`fixed` cuts packed texts into chunks of so many tokens, `from_spans` finds the tokens of spans of characters, and
`windows` says how a text that is longer than the model's context goes through it in parts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .checks import check_index_dtype, check_memory, check_tensor, place, require
from .options import count, option

__all__ = ["Chunks", "fixed", "from_spans", "windows"]


class Chunks(NamedTuple):
    """Segments of packed rows, and which text each belongs to: int64, [chunks] each, on the texts' device."""

    starts: Tensor
    ends: Tensor
    of: Tensor


def _size_and_overlap(op: str, size: Any, overlap: Any) -> tuple[int, int]:
    size, overlap = count(op, "size", size), count(op, "overlap", overlap, least=0)
    require(
        overlap < size,
        ValueError,
        f"{op}: overlap must be less than size, or no chunk would end, got {overlap} of {size}",
    )
    return size, overlap


def fixed(cu_seqlens: Tensor, size: int, overlap: int = 0, *, total: int | None = None) -> Chunks:
    """Chunks of `size` tokens of each text, each of which begins `overlap` tokens before the end of the one before.

    Chunk k of a text of n tokens is its tokens [k (size - overlap), k (size - overlap) + size), of which there are
    none behind n: the last chunk is the shorter rest. A rest that the chunk before holds already, because it lies
    wholly in the overlap, is none, so each chunk has a token that is new; a text of 1 to `size` tokens is one chunk,
    and an empty text none.

    >>> cu_seqlens = torch.tensor([0, 7, 7, 10])
    >>> chunks = fastpool.chunks.fixed(cu_seqlens, 4, overlap=1)
    >>> chunks
    Chunks(starts=tensor([0, 3, 7]), ends=tensor([ 4,  7, 10]), of=tensor([0, 0, 2]))
    >>> packed = torch.randn(10, 384)
    >>> fastpool.mean(packed, starts=chunks.starts, ends=chunks.ends, normalize=True).shape
    torch.Size([3, 384])

    Args:
        cu_seqlens: int32 or int64, [B + 1]; text b is the rows [cu_seqlens[b], cu_seqlens[b + 1]) of packed hidden.
        size: tokens of a chunk, at least 1.
        overlap: how many tokens a chunk shares with the one before, fewer than size.
        total: how many chunks come out, whatever the texts are, as a CUDA graph needs it, or to wait for nothing: at
            least as many as there are. Those behind the last are empty, at cu_seqlens[B], so they pool to zeros, and
            `of` is B for them: a row more than there are texts, and no text's number.

    Returns:
        starts, ends and of, in the order of texts and of their tokens. Without total, how many there are is known once
        cu_seqlens has been read, so on a GPU the call waits for it, once, and a compiler cannot take it into a whole
        graph; with total neither holds.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor or a number.
        ValueError: a wrong shape; memory that was freed; size below 1, overlap below 0 or not below size, total
            below 0; cu_seqlens that begins below 0 or decreases, and a total that is too small. These last two are seen
            on CPUs, and on GPUs under validation (fastpool.validate), not in a compiled graph; elsewhere a text that
            runs backwards has no chunks, and those beyond total are left out.
    """
    op = "fastpool.chunks.fixed"
    size, overlap = _size_and_overlap(op, size, overlap)
    check_tensor(op, "cu_seqlens", cu_seqlens, optional=False)
    check_index_dtype(op, "cu_seqlens", cu_seqlens)
    require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) > 0,
        ValueError,
        f"{op}: cu_seqlens must be [B + 1], got shape {list(cu_seqlens.shape)}",
    )
    check_memory(op, "cu_seqlens", cu_seqlens)
    cuts = cu_seqlens.long()
    texts, looks = len(cuts) - 1, not torch.compiler.is_compiling() and _looks(cuts)
    if looks:
        _check_cuts(op, cuts)
    # At most as many chunks as steps begin before the last `overlap` tokens, and one for what is shorter than that.
    lengths = cuts.diff()
    step = size - overlap
    of_each = torch.where(lengths > 0, (-((overlap - lengths) // step)).clamp(min=1), 0)
    before = torch.nn.functional.pad(of_each.cumsum(0), (1, 0))
    if total is None:
        total = int(before[-1])
    else:
        total = count(op, "total", total, least=0)
        require(
            not looks or total >= int(before[-1]),
            ValueError,
            f"{op}: total must be at least {int(before[-1]) if looks else 0}, the chunks there are, got {total}",
        )
    number = torch.arange(total, device=cuts.device)
    of = torch.searchsorted(before[1:], number, right=True)
    starts = cuts.take(of) + torch.where(of < texts, number - before.take(of), 0) * step
    behind = cuts.take((of + 1).clamp(max=texts))
    return Chunks(starts, starts + (behind - starts).clamp(max=size), of)


def windows(length: int, size: int, overlap: int = 0) -> list[tuple[int, int, int]]:
    """Windows of a text that is longer than a model's context, as (start, end, new_from).

    The model gets tokens [start, end), `size` of them or fewer in the last window, and of its states those of
    [new_from, end) are kept, which no window before had: `overlap` tokens in front of them are context alone. Windows
    lie as the chunks of `fixed` do. All that is kept, one behind another, is [length, H], packed states of one text,
    to be cut into chunks or pooled as a whole.

    >>> fastpool.chunks.windows(10, size=5, overlap=2)
    [(0, 5, 0), (3, 8, 5), (6, 10, 8)]

    Args:
        length: tokens of the text, without those that the tokenizer puts around each window.
        size: tokens of a window; the model's context without those.
        overlap: how many tokens a window shares with the one before, fewer than size.

    Returns:
        A list, empty for a text without tokens. Nothing is read from any device.

    Raises:
        TypeError: something that is not an int.
        ValueError: length or overlap below 0, size below 1, overlap not below size.
    """
    op = "fastpool.chunks.windows"
    length = count(op, "length", length, least=0)
    size, overlap = _size_and_overlap(op, size, overlap)
    starts = range(0, max(length - overlap, min(length, 1)), size - overlap)
    return [(start, min(start + size, length), start + overlap if start else 0) for start in starts]


def from_spans(offset_mapping: Any, spans: Any, *, base: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """starts and ends, in tokens, of spans [a, b) of a text's characters, by a fast tokenizer's offset mapping.

    A span begins with the first token that ends behind a, and ends with the last one that begins before b: all tokens
    that have a character of it, also where it cuts one. A token without characters, as special tokens and padding
    are with their (0, 0), is never the first or the last of a span. A span that no token has a character of (an empty
    one, blanks, what was truncated) is an empty segment, and pools to zeros.

    >>> offset_mapping = [(0, 0), (0, 5), (6, 10), (10, 11), (0, 0)]  # [CLS] plain text . [SEP]
    >>> fastpool.chunks.from_spans(offset_mapping, [(0, 5), (6, 11), (5, 6)])
    (tensor([1, 2, 2]), tensor([2, 4, 2]))
    >>> starts, ends = fastpool.chunks.from_spans([offset_mapping] * 2, [[(0, 11)], [(0, 5), (6, 11)]])
    >>> fastpool.mean(torch.randn(2, 5, 384), starts=starts, ends=ends).shape
    torch.Size([2, 2, 384])

    Args:
        offset_mapping: of one text, [S, 2], or of several, [B, S, 2]: each token's first character and one behind its
            last. A tensor, int32 or int64, or lists of pairs; shorter texts in lists are padded with (0, 0).
        spans: likewise [n, 2], or [B, n, 2]: a and b of each span, in characters of its text. In lists, texts of fewer
            spans get empty ones.
        base: added to starts and ends: the row of packed hidden in which the text begins. Of several texts an int for
            all, or a tensor of theirs, [B], such as cu_seqlens[:-1].

    Returns:
        starts and ends, int64, [n] or [B, n], on the device of the tensors that were given; nothing waits for it. Those
        of several texts are spans of padded hidden, or flattened, and with a base, segments of packed hidden.

    Raises:
        TypeError: something that is neither a tensor nor lists of pairs; no integers.
        ValueError: a wrong shape or device; memory that was freed; a span whose a is below 0 or behind its b, and a
            token that begins before the one in front of it does (as where one row has two texts). These two are seen on
            CPUs, and on GPUs under validation (fastpool.validate), not in a compiled graph.
    """
    op = "fastpool.chunks.from_spans"
    tokens, cuts = _pairs(op, "offset_mapping", offset_mapping), _pairs(op, "spans", spans)
    if not isinstance(offset_mapping, Tensor):
        tokens = tokens.to(cuts.device)
    elif not isinstance(spans, Tensor):
        cuts = cuts.to(tokens.device)
    require(
        cuts.device == tokens.device,
        ValueError,
        f"{op}: spans must be on offset_mapping's device, {tokens.device}, got {cuts.device}",
    )
    texts = list(tokens.shape[:-2])
    require(
        list(cuts.shape[:-2]) == texts,
        ValueError,
        f"{op}: spans must have shape [{''.join(f'{n}, ' for n in texts)}n, 2], as offset_mapping has "
        f"{list(tokens.shape)}, got {list(cuts.shape)}",
    )
    if isinstance(base, Tensor):
        check_index_dtype(op, "base", base)
        require(
            list(base.shape) == texts and base.device == tokens.device,
            ValueError,
            f"{op}: base must be an int or of shape {texts} on {tokens.device}, "
            f"got {list(base.shape)} on {base.device}",
        )
        check_memory(op, "base", base)
        base = base.long().unsqueeze(-1)
    else:
        base = option(op, "base", base, int)
    first, behind = tokens.unbind(-1)
    none = first >= behind
    if not torch.compiler.is_compiling() and _looks(tokens):
        _check_spans(op, cuts)
        _check_order(op, first, none)
    a, b = (one.contiguous() for one in cuts.unbind(-1))
    begins = torch.searchsorted(_highest(behind.masked_fill(none, 0)), a, right=True)
    # The lowest from here on: negated, the highest of the row read backwards.
    lowest = -_highest(-first.masked_fill(none, torch.iinfo(torch.int64).max).flip(-1)).flip(-1)
    stops = torch.searchsorted(lowest, b)
    return begins + base, torch.where(a < b, torch.maximum(begins, stops), begins) + base


def _pairs(op: str, name: str, value: Any) -> Tensor:
    """[S, 2] or [B, S, 2], int64, of a tensor or of lists, whose texts are padded with (0, 0)."""
    if isinstance(value, Tensor):
        check_tensor(op, name, value, optional=False)
    else:
        value = _from_lists(op, name, value)
    check_index_dtype(op, name, value)
    require(
        value.dim() in (2, 3) and value.shape[-1] == 2,
        ValueError,
        f"{op}: {name} must be pairs of one text, [n, 2], or of several, [B, n, 2], got shape {list(value.shape)}",
    )
    check_memory(op, name, value)
    pairs: Tensor = value.long()
    return pairs


def _from_lists(op: str, name: str, value: Any) -> Tensor:
    try:
        texts = [list(one) for one in value]
        several = any(hasattr(one, "__len__") for text in texts for one in text) or (texts and not any(texts))
        if several:
            longest = max(map(len, texts))
            texts = [[*text, *[(0, 0)] * (longest - len(text))] for text in texts]
            return torch.tensor(texts) if longest > 0 else torch.zeros(len(texts), 0, 2, dtype=torch.int64)
        return torch.tensor(texts) if texts else torch.zeros(0, 2, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{op}: {name} must be a tensor or lists of pairs of ints, got {type(value).__name__}"
        ) from error


def _highest(values: Tensor) -> Tensor:
    """So far, in each row."""
    return values.cummax(-1).values if values.numel() > 0 else values


def _looks(values: Tensor) -> bool:
    """Whether values are checked on their device."""
    return values.device.type == "cpu" or dispatch.validates()


def _check_cuts(op: str, cuts: Tensor) -> None:
    """Synchronises."""
    require(
        int(cuts[0]) >= 0,
        ValueError,
        f"{op}: cu_seqlens must begin at 0 or behind, got cu_seqlens[0] = {int(cuts[0])}",
    )
    for b in (cuts[1:] < cuts[:-1]).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"{op}: cu_seqlens must not decrease, got cu_seqlens[{b}] = {int(cuts[b])} before "
            f"cu_seqlens[{b + 1}] = {int(cuts[b + 1])}"
        )


def _check_spans(op: str, spans: Tensor) -> None:
    """Synchronises."""
    for at in ((spans[..., 0] < 0) | (spans[..., 0] > spans[..., 1])).nonzero()[:1].tolist():
        raise ValueError(
            f"{op}: spans must be [a, b) with 0 <= a <= b, got spans{place(*at)} = {spans[tuple(at)].tolist()}"
        )


def _check_order(op: str, first: Tensor, none: Tensor) -> None:
    """That tokens begin one behind another. Synchronises."""
    before = _highest(first.masked_fill(none, 0))
    for at in (~none & (first < before)).nonzero()[:1].tolist():
        raise ValueError(
            f"{op}: offset_mapping must go up along a text, got offset_mapping{place(*at)} that begins at "
            f"{int(first[tuple(at)])}, behind a token that begins at {int(before[tuple(at)])}; "
            "where a row has two texts, give each by itself"
        )
