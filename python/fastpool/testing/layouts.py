"""Lists of texts as arguments of a pooling function, each layout in its own way."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .answers import own_arguments, variants
from .inputs import Sequence

T = TypeVar("T")


def _arguments(given: str | None, weights: Tensor, hidden: Tensor, **arguments: Any) -> dict[str, Any]:
    return {"hidden": hidden, **arguments, **own_arguments(given, weights, hidden.shape[-1])}


def _pad(batch: list[Sequence], before: Callable[[int], int], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, rows, H], real [B, rows], weights [B, rows]; sequence b starts at row before(its length)."""
    width = batch[0].states.shape[1]
    hidden = torch.full((len(batch), rows, width), float("nan"), dtype=batch[0].states.dtype)
    real = torch.zeros(len(batch), rows, dtype=torch.bool)
    weights = torch.full((len(batch), rows), float("nan"))
    for b, sequence in enumerate(batch):
        n = len(sequence.states)
        at = slice(before(n), before(n) + n)
        hidden[b, at], real[b, at], weights[b, at] = sequence.states, sequence.real, sequence.weights
        hidden[b, at][~sequence.real] = float("nan")
    return hidden, real, weights


def _longest(batch: list[Sequence]) -> int:
    return max(len(sequence.states) for sequence in batch)


def _padded_right_mask(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    hidden, real, weights = _pad(batch, lambda n: 0, _longest(batch) + 3)
    return _arguments(given, weights, hidden=hidden, mask=real)


def _padded_left_mask(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    rows = _longest(batch) + 40
    hidden, real, weights = _pad(batch, lambda n: rows - n, rows)
    return _arguments(given, weights, hidden=hidden, mask=real.long())


def _padded_middle_strided(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """Views with gaps between rows, columns and mask elements."""
    rows = _longest(batch) + 9
    hidden, real, weights = _pad(batch, lambda n: (rows - n) // 2, rows)
    wide = torch.full((len(batch), rows, 2, hidden.shape[2] + 5), float("nan"), dtype=hidden.dtype)
    wide[:, :, 1, : hidden.shape[2]] = hidden
    mask = torch.zeros(rows, len(batch), 2, dtype=torch.int32)
    mask[:, :, 1] = real.T
    return _arguments(
        given,
        weights.T.contiguous().T,
        hidden=wide[:, :, 1, : hidden.shape[2]],
        mask=mask[:, :, 1].T,
    )


def _padded_starts_ends(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    rows = _longest(batch) + 5
    hidden, real, weights = _pad(batch, lambda n: rows - n - 2, rows)
    ends = torch.full((len(batch),), rows - 2)
    starts = ends - torch.tensor([len(sequence.states) for sequence in batch])
    return _arguments(given, weights.double(), hidden=hidden, mask=real.to(torch.uint8), starts=starts, ends=ends)


def _padded_lengths(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    hidden, _, weights = _pad(batch, lambda n: 0, _longest(batch) + 1)
    lengths = torch.tensor([len(sequence.states) for sequence in batch], dtype=torch.int32)
    return _arguments(given, weights, hidden=hidden, lengths=lengths)


def _pack(batch: list[Sequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], real [T], weights [T], offsets [B + 1]."""
    hidden = torch.cat([sequence.states for sequence in batch]).clone()
    real = torch.cat([sequence.real for sequence in batch])
    weights = torch.cat([sequence.weights for sequence in batch])
    hidden[~real] = float("nan")
    offsets = torch.tensor([0] + [len(sequence.states) for sequence in batch]).cumsum(0)
    return hidden, real, weights, offsets


def _packed(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """The first segment does not begin with the first row, nor does the last end with the last."""
    hidden, _, weights, offsets = _pack(batch)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 70, 3), value=float("nan"))
    weights = torch.nn.functional.pad(weights, (70, 3), value=float("nan"))
    return _arguments(given, weights, hidden=hidden, cu_seqlens=offsets.int() + 70)


def _packed_mask(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """Segments that begin and end with padding."""
    width, dtype = batch[0].states.shape[1], batch[0].states.dtype
    padding = Sequence(
        torch.full((3, width), float("nan"), dtype=dtype),
        torch.zeros(3, dtype=torch.bool),
        torch.full((3,), float("nan")),
    )
    both = [
        Sequence(
            torch.cat([padding.states, s.states, padding.states]),
            torch.cat([padding.real, s.real, padding.real]),
            torch.cat([padding.weights, s.weights, padding.weights]),
        )
        for s in batch
    ]
    hidden, real, weights, offsets = _pack(both)
    return _arguments(given, weights, hidden=hidden, mask=real.to(torch.int16), cu_seqlens=offsets)


def _packed_shuffled(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """starts and ends, the rows in another order than the segments, with gaps of NaN."""
    gap = Sequence(
        torch.full_like(batch[0].states[:1], float("nan"))
        if len(batch[0].states)
        else torch.full((1, batch[0].states.shape[1]), float("nan"), dtype=batch[0].states.dtype),
        torch.zeros(1, dtype=torch.bool),
        torch.full((1,), float("nan")),
    )
    order = list(reversed(range(len(batch))))
    laid = [part for b in order for part in (gap, batch[b])]
    hidden, real, weights, offsets = _pack(laid)
    starts = torch.zeros(len(batch), dtype=torch.int64)
    ends = torch.zeros(len(batch), dtype=torch.int64)
    for place, b in enumerate(order):
        starts[b], ends[b] = offsets[2 * place + 1], offsets[2 * place + 2]
    return _arguments(given, weights, hidden=hidden, mask=real, starts=starts, ends=ends)


def _nested(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    hidden, _, weights, offsets = _pack(batch)
    return _arguments(given, weights, hidden=torch.nested.nested_tensor_from_jagged(hidden, offsets))


@dataclass(frozen=True)
class Layout:
    make: Callable[[list[Sequence], str | None], dict[str, Any]]
    holes: bool  # whether it can say which tokens inside a segment are not real


LAYOUTS: dict[str, Layout] = {
    "padded_right_mask": Layout(_padded_right_mask, True),
    "padded_left_mask": Layout(_padded_left_mask, True),
    "padded_middle_strided": Layout(_padded_middle_strided, True),
    "padded_starts_ends": Layout(_padded_starts_ends, True),
    "padded_lengths": Layout(_padded_lengths, False),
    "packed": Layout(_packed, False),
    "packed_mask": Layout(_packed_mask, True),
    "packed_shuffled": Layout(_packed_shuffled, True),
    "nested": Layout(_nested, False),
}


def taking_turns(*values: T, layouts: Iterable[str] = LAYOUTS) -> list[tuple[str, str | None, str, T]]:
    """(mode, given, layout, value), each mode in each layout, and with one of the values: each of them comes to
    every mode and, since there are more modes than values, to every layout."""
    return [
        (mode, given, layout, values[(i + j) % len(values)])
        for i, (mode, given) in enumerate(variants())
        for j, layout in enumerate(layouts)
    ]
