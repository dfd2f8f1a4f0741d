"""Norms of every size: l2_normalize is exact, and the same in bits on every backend, where squares overflow and where
they underflow."""

import math
from decimal import Context, Decimal, localcontext
from typing import Any

import digests
import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.testing import DTYPES, EPS, every_norm, gradients, same_bits

BACKENDS = digests.here()
BACKENDS += [f"{name}, tile by tile" for name in BACKENDS if name == "triton"]
LARGEST = {torch.float32: 120, torch.float64: 1000}  # exponents of gradients


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For digests.on."""
    name, _, tiled = str(request.param).partition(", ")
    if tiled:
        rows = "fastpool.triton_kernels.plan.row_columns"
        monkeypatch.setattr(rows, lambda width, element_size, warp_size: 16)
    return name


def ulp(x: Decimal, dtype: torch.dtype) -> Decimal:
    """The distance of numbers of a dtype around x."""
    bits, smallest = (52, -1022) if dtype == torch.float64 else (23, -126)
    exponent = math.floor(x.copy_abs().log10() / Decimal(2).log10()) if x else smallest
    return Decimal(2) ** (max(exponent, smallest) - bits)


def decimals(x: Tensor) -> list[Decimal]:
    return [Decimal(value) for value in x.tolist()]


def length(x: list[Decimal]) -> Decimal:
    return sum((value * value for value in x), Decimal(0)).sqrt()


def gradient_of(x: Tensor, offset: int) -> Tensor:
    """One that is larger than x, row by row, by a power of two, as far as there are such numbers."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exponents = [math.frexp(value)[1] + offset for value in x.abs().amax(1).tolist()]
    most = LARGEST[x.dtype]
    scales = [math.ldexp(1.0, max(-most, min(exponent, most))) for exponent in exponents]
    return (drawn * torch.tensor(scales, dtype=torch.float64)[:, None]).to(x.dtype)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact(dtype: torch.dtype, eps: float) -> None:
    """To 2 units in the last place, in columns that are tiny beside the norm too; a vector of zeros over an eps of 0 is
    NaN."""
    x = every_norm(dtype)
    result = fastpool.l2_normalize(x, eps=eps)
    least = Decimal(torch.tensor(eps, dtype=dtype).item())
    assert result[0].isnan().all() if least == 0 else result[0].eq(0).all()
    with localcontext(Context(prec=60)):
        for got, row in zip(result[1:], x[1:], strict=True):
            norm = max(length(decimals(row)), least)
            for value, wanted in zip(decimals(got), (value / norm for value in decimals(row)), strict=True):
                assert abs(value - wanted) <= 2 * ulp(wanted, dtype), (float(norm), float(wanted), float(value))


@pytest.mark.parametrize("offset", [-0.95, 0, 0.8])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_gradients(dtype: torch.dtype, eps: float, offset: float) -> None:
    """To a few units in the last place of the gradient's length over the norm, also where a gradient that is scaled
    like the squares would overflow or fall among the subnormals."""
    x = every_norm(dtype)[1:]
    gradient = gradient_of(x, int(offset * LARGEST[dtype]))
    (result,) = gradients(fastpool.l2_normalize, {"x": x}, gradient, eps=eps)
    least = Decimal(torch.tensor(eps, dtype=dtype).item())
    with localcontext(Context(prec=60)):
        for got, row, of_row in zip(result, x, gradient, strict=True):
            g, norm = decimals(of_row), length(decimals(row))
            z = [value / norm for value in decimals(row)]
            along = sum((a * b for a, b in zip(z, g, strict=True)), Decimal(0)) if norm >= least else Decimal(0)
            allowed = 4 * ulp(length(g) / max(norm, least), dtype)
            for value, a, b in zip(decimals(got), z, g, strict=True):
                wanted = (b - a * along) / max(norm, least)
                assert abs(value - wanted) <= allowed, (float(norm), float(wanted), float(value))


def with_gradient(gradient: Tensor, x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    result = fastpool.l2_normalize(x, **more)
    return result.detach(), torch.autograd.grad(result, x, gradient)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    """Result and gradient, with columns cut off or not: zeros, infinities and NaN among them."""
    x = every_norm(dtype)
    x = torch.cat([x, torch.full_like(x[:1], torch.inf), torch.full_like(x[:1], torch.nan)])
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    cut = torch.arange(len(x)) * 7 % 21
    for eps in EPS[::3] if backend == "triton" else EPS:  # its interpreter takes its time
        for of, more in ((gradient, {}), (gradient * 1e-6, {"truncate_dims": cut})):
            found = []
            for name in (backend, "reference"):
                with digests.on(name):
                    found.append(with_gradient(of, x, eps=eps, **more))
            assert all(same_bits(a, b) for a, b in zip(*found, strict=True)), (eps, more)


def test_what_is_pooled(backend: str) -> None:
    """A pooled vector below 1e-12 is divided by that, as a large one is by its norm."""
    hidden = every_norm(torch.float32)[:, None]
    with digests.on("reference"):
        expected = fastpool.l2_normalize(hidden[:, 0] + 0.0)  # sums are never -0
    with digests.on(backend):
        assert same_bits(fastpool.mean(hidden, normalize=True), expected)
