"""Calls of quantize that every backend must answer with the same bytes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastpool
from fastpool.kinds import KINDS, How

Case = tuple[Tensor, str, dict[str, Any]]


def values(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers, ends of buckets, ties, and in some of them what is no number, is none at all, or is too small or large
    for others."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x[1::4] = (torch.rand(x[1::4].shape, generator=generator, dtype=torch.float64) * 255).floor() / 64 - 2
    x = x.to(dtype)
    info = torch.finfo(dtype)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, info.min, info.tiny / 4)):
        x[row + 2, row::3] = value
    return x


def ranges_of(width: int) -> Tensor:
    """Constant columns, a step that underflows, and widths whose steps are rounded."""
    generator = torch.Generator().manual_seed(width)
    low = torch.randn(width, generator=generator)
    high = low + torch.rand(width, generator=generator) * 4
    high[::5] = low[::5]
    low[1::7], high[1::7] = -2.0, 1.984375
    low[2::7], high[2::7] = 0.0, 1e-44
    low[3::7], high[3::7] = -1.7e38, 1.7e38
    return torch.stack([low, high])


def options(kind: str, ranges: Tensor) -> list[dict[str, Any]]:
    how = KINDS[kind].how
    if how is How.BUCKETS:
        return [{"ranges": ranges}]
    return [{}, {"zero_bit": True}] if how is How.BITS else [{}]


def cases(kind: str, dtype: torch.dtype) -> Iterator[Case]:
    """Widths that are and are not whole bytes and vectors; shapes, strides and truncation."""
    for width in (1, 7, 8, 9, 16, 33, 130, 384):
        for more in options(kind, ranges_of(width)):
            yield values(12, width, dtype), kind, more
    x, ranges = values(12, 133, dtype).view(2, 3, 2, 133), ranges_of(133)
    far = torch.empty_strided((2, 33), (2**20, 3), dtype=dtype)
    far.copy_(x[0, 0, :, :33])
    for more in options(kind, ranges):
        cut = {name: one[:, :33] if name == "ranges" else one for name, one in more.items()}
        apart = {name: one.T.contiguous().T if name == "ranges" else one for name, one in more.items()}
        yield from (
            (x.transpose(0, 2), kind, more),
            (x[:, ::2], kind, apart),
            (x[..., 1:34], kind, cut),
            (x[1, 2, 1], kind, more),
            (x[:0], kind, more),
            (x[..., :0], kind, {name: one[:, :0] if name == "ranges" else one for name, one in more.items()}),
            (x, kind, {**more, "truncate_dim": 33}),
            (x, kind, {**cut, "truncate_dim": 33}),
            (x.expand(2, 2, 3, 2, 133).permute(3, 0, 2, 1, 4), kind, {**more, "truncate_dim": 16}),
            (far, kind, cut),
        )


def expected(case: Case) -> Tensor:
    x, kind, more = case
    with fastpool.backend("reference"):
        return fastpool.quantize(x, kind, **more)
