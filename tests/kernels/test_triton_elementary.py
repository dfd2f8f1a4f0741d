"""e^x of Triton's kernels has the reference's bits. Without a GPU they run in Triton's interpreter (conftest)."""

import pytest
import torch
from torch import Tensor

from fastpool.reference import elementary as reference
from fastpool.testing import same_bits

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

import triton
import triton.language as tl  # after the skip

from fastpool.triton_kernels import elementary  # likewise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64)
COUNT = 1 << 12


@triton.jit
def exponential_kernel(x, p, n, count: tl.constexpr):
    at = tl.arange(0, count)
    mantissa, exponent = elementary.exponential(tl.load(x + at))
    tl.store(p + at, mantissa)
    tl.store(n + at, exponent)


@triton.jit
def times_power_of_two_kernel(x, k, out, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(out + at, elementary.times_power_of_two(tl.load(x + at), tl.load(k + at)))


def numbers(dtype: torch.dtype) -> Tensor:
    """Any bits, numbers as scores are, halfway between integers times ln 2, and the special ones."""
    generator = torch.Generator().manual_seed(5)
    double = dtype == torch.float64
    integer = torch.int64 if double else torch.int32
    edge = torch.iinfo(integer)
    any_bits = torch.randint(edge.min, edge.max, (COUNT // 2,), dtype=integer, generator=generator).view(dtype)
    usual = torch.randn(COUNT // 4, dtype=torch.float64, generator=generator) * 40
    halves = (torch.arange(COUNT // 4 - 16, dtype=torch.float64) - COUNT // 8 + 0.5) * 0.6931471805599453
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 5e-324, -5e-324, 3e38, -3e38, 88.7, -103.9]
    special += [-745.1, 709.7, 1e6]
    return torch.cat(
        [any_bits, usual.to(dtype), halves.to(dtype), torch.tensor(special, dtype=torch.float64).to(dtype)]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponential(dtype: torch.dtype) -> None:
    x = numbers(dtype).to(DEVICE)
    p, n = torch.empty_like(x), torch.empty_like(x)
    exponential_kernel[(1,)](x, p, n, COUNT)
    for got, expected in zip((p, n), reference.exponential(x.cpu()), strict=True):
        assert same_bits(got.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_times_power_of_two(dtype: torch.dtype) -> None:
    """Down to the smallest number and below, up to the largest and above."""
    x = numbers(dtype).to(DEVICE)
    k = torch.randint(-2300, 2300, (COUNT,), generator=torch.Generator().manual_seed(6)).to(dtype)
    k[:3] = torch.tensor([-torch.inf, 1e30, -1e30], dtype=dtype)
    out = torch.empty_like(x)
    times_power_of_two_kernel[(1,)](x, k.to(DEVICE), out, COUNT)
    assert same_bits(out.cpu(), reference.times_power_of_two(x.cpu(), k))
