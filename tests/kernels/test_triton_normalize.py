"""Triton's l2_normalize gives the reference's bits. Without a GPU it runs in Triton's interpreter (conftest)."""

import pytest
import torch

import fastpool
from fastpool.testing import DTYPES, Target, same_bits

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels import plan  # after the skip

TRITON = Target("triton", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(4, 3, 70, dtype=torch.float64, generator=generator) * 3).to(dtype)
    huge = x.double().sign().to(dtype) * (6e4 if dtype == torch.float16 else 3e38)
    for columns in (128, 16):  # in one piece, and tile by tile
        monkeypatch.setattr(plan, "row_columns", lambda width, element_size, warp_size, columns=columns: columns)
        for view in (x, x.transpose(0, 1), x[0, 0], x[:, :, 3:50], huge, x.expand(2, 4, 3, 70).permute(2, 0, 1, 3)):
            for more in ({}, {"truncate_dim": 33, "eps": 20.0}):
                expected = Target("reference", "cpu").run(fastpool.l2_normalize, view, **more)
                assert same_bits(TRITON.run(fastpool.l2_normalize, view, **more), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize_dims(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any stride, in one piece and tile by tile; nothing behind them shows."""
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(4, 3, 80, dtype=torch.float64, generator=generator) * 3).to(dtype)
    x[0, 0], x[1, 1] = 6e4 if dtype == torch.float16 else 3e38, 0.0
    truncate_dims = torch.tensor([[64, 9, 33, 1], [0, 64, 16, 17], [63, 32, 8, 15]]).T
    x = torch.where(torch.arange(80) < truncate_dims[..., None], x, torch.nan)
    for columns in (128, 16):
        monkeypatch.setattr(plan, "row_columns", lambda width, element_size, warp_size, columns=columns: columns)
        for view, index in (
            (x, truncate_dims),
            (x.transpose(0, 1), truncate_dims.T.int()),
            (x[0, 2], truncate_dims[0, 2]),
            (x[:0], truncate_dims[:0]),
        ):
            for more in ({"truncate_dim": 64}, {"truncate_dim": 65, "eps": 0.0}):
                expected = Target("reference", "cpu").run(fastpool.l2_normalize, view, truncate_dims=index, **more)
                assert same_bits(TRITON.run(fastpool.l2_normalize, view, truncate_dims=index, **more), expected), (
                    columns
                )


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_dims_are_clamped(index: torch.dtype) -> None:
    """Whatever they hold, nothing outside x is read. The adapter is asked itself, as for bounds."""
    from fastpool.backends import triton as adapter
    from fastpool.calls import NormalizeBackwardCall, NormalizeCall

    hostile = [-1, 13, 2**31 - 1, -(2**31), 5, 12]
    hostile += [2**62, -(2**63), 2**63 - 1] if index == torch.int64 else []
    truncate_dims = torch.tensor(hostile, dtype=index, device=TRITON.device)
    guard = torch.full((len(truncate_dims) + 2, 16), torch.nan, device=TRITON.device)
    x = guard[1:-1, :14]
    x[:, :12] = torch.arange(1.0, 13.0)
    call, clean = (NormalizeCall(x, 12, d) for d in (truncate_dims, truncate_dims.clamp(0, 12)))
    assert same_bits(adapter.l2_normalize(call), adapter.l2_normalize(clean))
    assert not adapter.l2_normalize(call).isnan().any()
    got, expected = (
        adapter.l2_normalize_backward(NormalizeBackwardCall(one, x[:, :12].contiguous())) for one in (call, clean)
    )
    assert same_bits(got, expected)
    assert not got.isnan().any()
