"""What only a GPU can show of quantize: either backend gives the CPU's bytes, in one launch, in graphs, and never
waits."""

from typing import Any

import pytest
import torch
from helpers.on_gpu import DEVICE, MARKS, captured, moved, seen, waits
from helpers.quantize_cases import cases, expected, options, ranges_of, values
from torch import Tensor

import fastpool
from benchmarks.gpu import Gpu
from fastpool.kinds import KINDS
from fastpool.testing import DTYPES

pytestmark = MARKS

every_kind = pytest.mark.parametrize("kind", KINDS)


def on_gpu(more: dict[str, Any]) -> dict[str, Any]:
    return {name: moved(one) if isinstance(one, Tensor) else one for name, one in more.items()}


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_quantize(backend: str, kind: str, dtype: torch.dtype) -> None:
    wide = [(values(12, 9001, dtype), kind, more) for more in options(kind, ranges_of(9001))]
    for case in (*cases(kind, dtype), *wide):
        x, _, more = case
        result = fastpool.quantize(moved(x), kind, **on_gpu(more)).cpu()
        assert torch.equal(result, expected(case)), (x.shape, more)


@every_kind
def test_one_launch_that_a_graph_can_hold(backend: str, kind: str) -> None:
    x = torch.randn(64, 1000, device=DEVICE)
    for more in map(on_gpu, options(kind, ranges_of(1000))):

        def call(more: dict[str, Any] = more) -> Tensor:
            return fastpool.quantize(x, kind, **more)

        call()
        assert seen(Gpu().launches(call)) == 1
        assert not waits(call)
        graph, result = captured(call)
        x.normal_()
        graph.replay()
        assert torch.equal(result, call())


def test_ranges_are_checked_where_asked(backend: str) -> None:
    x, ranges = torch.zeros(2, 3, device=DEVICE), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], device=DEVICE)
    fastpool.quantize(x, "int8", ranges=ranges)
    fastpool.validate()
    with pytest.raises(ValueError, match=r"got 1\.0 and 0\.0 in column 1"):
        fastpool.quantize(x, "int8", ranges=ranges)
