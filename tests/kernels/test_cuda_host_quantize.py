"""CUDA's quantize, compiled for a CPU (tests/cpp/cuda_host), gives the reference's bytes."""

import pytest
import torch
from helpers.cuda_host import Host
from helpers.quantize_cases import cases, expected, options, ranges_of, values

from fastpool.kinds import KINDS
from fastpool.testing import DTYPES

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_quantize(host: Host, kind: str, dtype: torch.dtype) -> None:
    code = list(KINDS).index(kind)
    wide = [(values(12, 9001, dtype), kind, more) for more in options(kind, ranges_of(9001))]
    for case in (*cases(kind, dtype), *wide):
        x, _, more = case
        host.tune()  # another order of blocks and threads
        result = host.ops.quantize(x, code, **more)
        assert result.dtype == KINDS[kind].dtype
        assert torch.equal(result, expected(case)), (x.shape, more)


@every_kind
def test_one_launch_without_memory(host: Host, kind: str) -> None:
    for more in options(kind, ranges_of(40)):
        launches, allocated = host.control.launches, host.control.allocated
        result = host.ops.quantize(torch.randn(7, 6, 40)[:, ::2], list(KINDS).index(kind), **more)
        assert host.control.launches == launches + 1
        assert host.control.allocated == allocated + result.nbytes


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_ranges_that_nobody_has_checked(host: Host, kind: str) -> None:
    """Any byte, of that column alone."""
    x, ranges = torch.randn(5, 40), ranges_of(40)
    clean = expected((x, kind, {"ranges": ranges}))
    wild = ranges.clone()
    wild[:, 4], wild[:, 9], wild[:, 11] = torch.nan, torch.inf, torch.tensor([3.0, -3.0])
    right = torch.ones(40, dtype=torch.bool)
    right[[4, 9, 11]] = False
    result = host.ops.quantize(x, list(KINDS).index(kind), ranges=wild)
    assert torch.equal(result[:, right], clean[:, right])
    assert (result[:, 4] == 0).all()
