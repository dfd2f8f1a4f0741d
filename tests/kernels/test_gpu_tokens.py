"""Token outputs on a GPU: the CPU's bits, in graphs, without waiting where `total` says how many there may be."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.on_gpu import DEVICE, MARKS, all_moved, assert_a_graph_sees_new_lengths, waits
from helpers.token_outputs import MORE
from torch import Tensor

import fastpool
from fastpool.testing import DTYPES, LAYOUTS, gradients, same_bits, sequences

pytestmark = MARKS
LENGTHS = [1, 40, 0, 700, 33, 64, 5, 2000]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with fastpool.backend("native"):
        yield


def values(**arguments: Any) -> Tensor:
    return fastpool.tokens(**arguments)[0]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_the_cpus(layout: str, dtype: torch.dtype) -> None:
    for width in (128, 77):
        arguments = LAYOUTS[layout].make(sequences(LENGTHS, width, dtype, holes=LAYOUTS[layout].holes), None)
        on_gpu = all_moved(arguments)
        for more in MORE:
            for total in (None, 4000):
                expected, offsets = fastpool.tokens(**arguments, **more, total=total)
                result, cu_seqlens = fastpool.tokens(**on_gpu, **more, total=total)
                assert same_bits(result.cpu(), expected), (width, more, total)
                assert torch.equal(cu_seqlens.cpu(), offsets)
            gradient = torch.randn(expected.shape).to(expected.dtype)
            (wanted,) = gradients(values, arguments, gradient, **more, total=4000)
            (found,) = gradients(values, on_gpu, gradient.to(DEVICE), **more, total=4000)
            assert same_bits(found.cpu(), wanted), (width, more)


def test_a_total_that_is_too_small() -> None:
    """The tokens behind it are cut off; under validation it is an error."""
    hidden, mask = torch.randn(3, 50, 16, device=DEVICE), torch.rand(3, 50, device=DEVICE) > 0.3
    expected, offsets = fastpool.tokens(hidden, mask)
    for total in (0, 1, len(expected) - 1):
        result, cu_seqlens = fastpool.tokens(hidden, mask, total=total)
        assert same_bits(result, expected[:total])
        assert torch.equal(cu_seqlens, offsets.clamp(max=total))
    fastpool.validate()
    with pytest.raises(ValueError, match=r"total must be at least the number of real tokens, \d+, got 1$"):
        fastpool.tokens(hidden, mask, total=1)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_graph_sees_new_lengths(layout: str) -> None:
    def call(*arguments: Tensor) -> Tensor:
        return fastpool.tokens(*arguments, normalize=True, total=3 * 900)[0]

    assert_a_graph_sees_new_lengths(layout, 900, call)


def test_a_graph_needs_a_total() -> None:
    hidden, mask = torch.randn(3, 50, 16, device=DEVICE), torch.rand(3, 50, device=DEVICE) > 0.3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="in a CUDA graph total must be given"):
        fastpool.tokens(hidden, mask)


def test_who_waits() -> None:
    hidden, mask = torch.randn(3, 50, 16, device=DEVICE), torch.rand(3, 50, device=DEVICE) > 0.3
    fastpool.tokens(hidden, mask)
    assert waits(lambda: fastpool.tokens(hidden, mask))
    assert not waits(lambda: fastpool.tokens(hidden, mask, total=150))
    assert not waits(lambda: fastpool.tokens(hidden, normalize=True))
