"""Puts a tensor where a step beyond its memory ends the process, with strides as callers may have them."""

from random import Random

import torch
from helpers.pages import at_the_edge, forbid_within
from torch import Tensor

from fastpool.testing import same_bits


def place(values: Tensor, random: Random, contiguous: bool = False) -> Tensor:
    """The same values in any order of dimensions, with gaps, an offset, and stride 0 where they are all alike. Memory
    ends with the last of them, or begins with the first, and holds NaN and -1 in between."""
    order = list(range(values.dim()))
    if not contiguous and random.random() < 0.2:
        random.shuffle(order)
    strides, step = [0] * values.dim(), 1 if contiguous or random.random() < 0.8 else random.choice((2, 3))
    for d in reversed(order):
        if not contiguous and values.numel() > 0 and random.random() < 0.5 and _alike(values, d):
            continue
        strides[d] = step
        step = step * max(values.shape[d], 1) + (0 if contiguous else random.choice((0, 0, 0, 1, 7)))
    offset = random.choice((0, 0, 0, 1, 5))
    reach = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    elements = offset + reach + 1 if values.numel() > 0 else 1
    memory = at_the_edge(elements, values.dtype, behind=random.random() < 0.7)
    view = memory.as_strided(values.shape, strides, offset if values.numel() > 0 else 0)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in strides)
    view[once].copy_(values[once])
    return view


def _alike(values: Tensor, d: int) -> bool:
    first = values.narrow(d, 0, 1).expand_as(values)
    return same_bits(values, first) if values.is_floating_point() else torch.equal(values, first)


def forbid_rows(tensor: Tensor, real: Tensor) -> None:
    """Nobody may touch the pages that hold nothing but rows [..., H] that are not `real`. Where rows do not stand one
    after the other this does nothing."""
    bytes = tensor.element_size()
    if tensor.numel() == 0 or tensor.stride(-1) != 1 or list(tensor.stride()) != sorted(tensor.stride(), reverse=True):
        return
    rows = tensor.stride(-2) if tensor.shape[-2] > 1 else tensor.shape[-1]
    if rows < tensor.shape[-1] or (tensor.dim() == 3 and tensor.stride(0) < rows * tensor.shape[1]):
        return
    places = (~real).nonzero().tolist()
    starts = [tensor.data_ptr() + sum(i * tensor.stride(d) for d, i in enumerate(place)) * bytes for place in places]
    forbid_within((start, start + tensor.shape[-1] * bytes) for start in starts)
