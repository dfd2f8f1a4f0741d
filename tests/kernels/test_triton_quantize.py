"""Triton's quantize gives the reference's bytes. Without a GPU it runs in Triton's interpreter (conftest)."""

from typing import Any

import pytest
import torch
from helpers.quantize_cases import cases, expected, options, ranges_of

import fastpool
from fastpool.kinds import KINDS
from fastpool.testing import DTYPES, Target, moved

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels import plan_quantize  # after the skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Target("triton", DEVICE)
every_kind = pytest.mark.parametrize("kind", KINDS)


def on_device(more: dict[str, Any]) -> dict[str, Any]:
    return {name: moved(one, DEVICE) if isinstance(one, torch.Tensor) else one for name, one in more.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_quantize(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (512, 16):  # in one piece, and tile by tile
        monkeypatch.setattr(
            plan_quantize, "row_columns", lambda width, element_size, warp_size, columns=columns: columns
        )
        fastpool.known.forget()
        for case in list(cases(kind, dtype))[:: 1 if columns == 512 else 3]:
            x, _, more = case
            with fastpool.backend("triton"):
                result = fastpool.quantize(moved(x, DEVICE), kind, **on_device(more))
            assert result.dtype == KINDS[kind].dtype
            assert torch.equal(result.cpu(), expected(case)), (columns, x.shape, more)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_ranges_that_nobody_has_checked(kind: str) -> None:
    """As a GPU's are: any byte, of that column alone. The adapter is asked itself."""
    from fastpool.backends import triton as adapter
    from fastpool.calls import QuantizeCall

    x, ranges = torch.randn(5, 40), ranges_of(40)
    clean = expected((x, kind, {"ranges": ranges}))
    wild = ranges.clone()
    wild[:, 4], wild[:, 9], wild[:, 11] = torch.nan, torch.inf, torch.tensor([3.0, -3.0])
    call = QuantizeCall(moved(x, DEVICE), list(KINDS).index(kind), moved(wild, DEVICE))
    right = torch.ones(40, dtype=torch.bool)
    right[[4, 9, 11]] = False
    result = adapter.quantize(call).cpu()
    assert torch.equal(result[:, right], clean[:, right])
    assert (result[:, 4] == 0).all()


@every_kind
def test_one_launch_without_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what has up to two strides before its columns."""
    from fastpool.calls import QuantizeCall
    from fastpool.triton_kernels.launch import Launch
    from fastpool.triton_kernels.run import quantize

    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "_launch", lambda self, device: launched.append(self))
    x = torch.randn(7, 6, 40)[:, ::2]
    for more in options(kind, ranges_of(40)):
        quantize(QuantizeCall(x, list(KINDS).index(kind), **more))
        (launch,) = launched
        assert launch.brought["x"] is x
        assert launch.grid == (21, 1, 1)
        launched.clear()
