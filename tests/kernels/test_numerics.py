"""How exact: long sequences, 16-bit inputs, extreme values."""

import pytest
import torch

import fastpool
from fastpool.testing import DTYPES, function_of

LONG = 100_000


def _long(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = {
        "normal": lambda: torch.randn(LONG, 64, generator=generator),
        "offset": lambda: torch.randn(LONG, 64, generator=generator) + 0.5,
        "uniform": lambda: torch.rand(LONG, 64, generator=generator),
        # The hard one: in a running sum every rounding error goes the same way.
        "constant": lambda: (torch.rand(64, generator=generator) + 0.1).expand(LONG, 64).contiguous(),
        "tenth": lambda: torch.full((LONG, 64), 0.1),
    }
    return made[kind]()


@pytest.mark.parametrize("mode", ["mean", "sum", "mean_sqrt_len", "weighted_mean"])
@pytest.mark.parametrize("kind", ["normal", "offset", "uniform", "constant", "tenth"])
def test_100_000_tokens(kind: str, mode: str) -> None:
    hidden = _long(kind)
    x = hidden.double()
    position = torch.arange(1, LONG + 1, dtype=torch.float64)[:, None]
    expected = {
        "mean": lambda: x.mean(0),
        "sum": lambda: x.sum(0),
        "mean_sqrt_len": lambda: x.sum(0) / LONG**0.5,
        "weighted_mean": lambda: (position * x).sum(0) / position.sum(),
    }[mode]()
    result = function_of(mode)(hidden[None])[0].double()
    assert (result - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_means_do_not_drift(dtype: torch.dtype) -> None:
    """64 x 128 tokens: where sums in 16 bits reach a cosine of 0.24."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(64, 128, 256, generator=generator) + 0.3 * torch.randn(256, generator=generator)).to(dtype)
    result, expected = fastpool.mean(hidden).double(), hidden.double().mean(1)
    assert torch.nn.functional.cosine_similarity(result, expected).min() > 0.99999


def test_float16_does_not_overflow_on_the_way() -> None:
    assert torch.equal(fastpool.mean(torch.full((1, 8192, 4), 60.0).half()), torch.full((1, 4), 60.0).half())
    assert torch.isinf(fastpool.sum(torch.full((1, 8192, 4), 60.0).half())).all()
    assert torch.equal(
        fastpool.sum(torch.full((1, 8192, 4), 60.0).half(), out_dtype=torch.float32), torch.full((1, 4), 60.0 * 8192)
    )


@pytest.mark.parametrize("count", [257, 301, 511])
def test_counts_are_exact_in_bfloat16(count: int) -> None:
    hidden = torch.ones(1, count, 8, dtype=torch.bfloat16)
    assert torch.equal(fastpool.mean(hidden), torch.ones(1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("scale", [1e19, 1e25, 1e30, 1e37, 1e155, 1e160, 1e168, 1e300])
def test_norms_that_overflow_when_squared(scale: float) -> None:
    dtype = torch.float32 if scale < 1e38 else torch.float64
    huge = torch.tensor([[3 * scale, 4 * scale, 0.0]], dtype=dtype)
    expected = torch.tensor([[0.6, 0.8, 0.0]], dtype=dtype)
    for name in ("native", "reference"):
        with fastpool.backend(name):
            assert torch.allclose(fastpool.l2_normalize(huge), expected)
            assert torch.allclose(fastpool.sum(huge[None], normalize=True), expected)
            # An eps of that size counts too, in the same units.
            assert torch.allclose(fastpool.l2_normalize(huge, eps=1e9), expected)
            assert torch.allclose(fastpool.l2_normalize(huge, eps=10 * scale), expected / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_are_exact(dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 7, 33).to(dtype)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 0]]).expand(5, 7)
    assert torch.equal(fastpool.cls(hidden, mask), hidden[:, 1])
    assert torch.equal(fastpool.last(hidden, mask), hidden[:, 4])


@pytest.mark.large
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets beyond 2^31 elements, in both layouts; untouched zeros cost no memory."""
    width, rows = 1024, 2**21 + 97
    hidden = torch.zeros(rows, width, dtype=torch.bfloat16)
    assert hidden.numel() > 2**31
    hidden[-50:] = 3.0
    hidden[-10] = 7.0
    cu_seqlens = torch.tensor([0, rows - 50, rows - 10, rows])
    result = fastpool.sum(hidden, None, cu_seqlens, out_dtype=torch.float32)
    assert torch.equal(result[:, 0], torch.tensor([0.0, 120.0, 34.0]))
    assert torch.equal(fastpool.cls(hidden, None, cu_seqlens)[:, -1].float(), torch.tensor([0.0, 3.0, 7.0]))
    assert torch.equal(fastpool.last(hidden, None, cu_seqlens)[:, -1].float(), torch.tensor([0.0, 3.0, 3.0]))
    padded = hidden.view(3, rows // 3, width)
    mask = torch.zeros(padded.shape[:2], dtype=torch.uint8)
    mask[:, -50:] = 1
    expected = torch.tensor([0.0, 0.0, 154.0 / 50]).bfloat16()
    assert torch.equal(fastpool.mean(padded, mask)[:, 5], expected)
    assert torch.equal(fastpool.max(padded, mask)[:, 5].float(), torch.tensor([0.0, 0.0, 7.0]))
    lengths = torch.tensor([0, 1, rows // 3])
    assert torch.equal(
        fastpool.sum(padded, lengths=lengths, out_dtype=torch.float32)[:, 0], torch.tensor([0.0, 0, 154])
    )
