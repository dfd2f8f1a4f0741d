"""Gradients by the CUDA kernels, compiled for a CPU (tests/cpp/cuda_host), against the reference, bit for bit."""

import random
from typing import Any

import pytest
import torch
from helpers.cuda_host import NATIVE, Host, backward, hostile_calls, native, own, raw
from torch import Tensor

import fastpool
from fastpool import backends
from fastpool.arguments import GRADIENTS_OF, codes
from fastpool.calls import accumulator
from fastpool.modes import MODES
from fastpool.testing import DTYPES, LAYOUTS, bits, same_bits, sequences, special_values, variants_of_states

LENGTHS = [1, 40, 0, 33, 70]
TILES = (0, 1, 7, 32, 64)
THREADS = (0, 0, 32, 64)


def of_shape(hidden: Tensor) -> Tensor:
    """A tensor of hidden's shape without memory of its own, as autograd keeps it where values are not read."""
    return hidden.new_full(hidden.shape[-1:], float("nan")).expand(hidden.shape)


def of_result(mode: str, arguments: dict[str, Any], truncate_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """A gradient of the result, and the unrounded result."""
    result = native(mode, arguments, truncate_dim=truncate_dim, out_dtype=accumulator(arguments["hidden"].dtype))
    return torch.randn_like(result, generator=torch.Generator().manual_seed(3)), result


def check(
    host: Host,
    mode: str,
    arguments: dict[str, Any],
    gradient: Tensor,
    result: Tensor,
    clamped: dict[str, Any] | None = None,
) -> None:
    """Of every argument that has one; `clamped`: the same call, for the reference."""
    for of in [name for name in GRADIENTS_OF if name in arguments]:
        with fastpool.backend("reference"):
            expected = backward(NATIVE, mode, clamped or arguments, gradient, result, of)
        taken = raw(arguments)
        if not MODES[mode].gradient_reads_hidden(of):
            taken["hidden"] = of_shape(taken["hidden"])
        found = host.backward(mode, taken, gradient, result, of)
        assert found.is_contiguous()
        assert same_bits(found, expected), (mode, of, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_layouts(host: Host, mode: str, given: str | None, dtype: torch.dtype) -> None:
    chosen = random.Random(f"{mode} {given} {dtype}")
    for holes in (False, True):
        for width in (chosen.choice((24, 72)), chosen.choice((21, 77))):  # rows of whole 16-byte pieces, and not
            batch = sequences(LENGTHS, width, dtype, holes=holes)
            for layout in LAYOUTS.values():
                if holes and not layout.holes:
                    continue
                arguments = layout.make(batch, given)
                if given:
                    arguments[given] = arguments[given].to(chosen.choice(DTYPES))
                truncate_dim = chosen.choice((None, None, 1, 8, 16, 20))
                host.tune(tile=chosen.choice(TILES), threads=chosen.choice(THREADS))
                check(host, mode, arguments, *of_result(mode, arguments, truncate_dim))


@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_overlapping_segments(host: Host, mode: str, given: str | None) -> None:
    """More of them on a row than a tile has room for, too."""
    generator = torch.Generator().manual_seed(2)
    for rows, segments in ((200, 25), (70, 150)):
        starts = torch.randint(0, rows - 40, (segments,), generator=generator)
        ends = (starts + torch.randint(0, rows, (segments,), generator=generator)).clamp(max=rows)
        arguments: dict[str, Any] = {
            "hidden": torch.randn(rows, 16, generator=generator).bfloat16(),
            "mask": torch.rand(rows, generator=generator) > 0.2,
            "starts": starts.int(),
            "ends": ends,
        }
        arguments |= own(given, arguments["hidden"])
        for tile in (0, 64):
            host.tune(tile=tile)
            check(host, mode, arguments, *of_result(mode, arguments))


@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_special_values(host: Host, mode: str, given: str | None) -> None:
    """NaN, infinities and zeros of either sign, in tokens and in gradients, stay where they belong."""
    for dtype in DTYPES:
        hidden = special_values(6, 50, 24).to(dtype)
        arguments = {"hidden": hidden, "ends": torch.tensor([50, 3, 20, 0, 47, 50]), **own(given, hidden)}
        if given in ("weights", "scores"):
            arguments[given] = special_values(6, 1, 50)[:, 0]
        gradient, result = of_result(mode, arguments)
        gradient[:, 3:] = special_values(6, 1, 21)[:, 0]
        for threads in (0, 32):
            host.tune(threads=threads)
            check(host, mode, arguments, gradient, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equal_maxima(host: Host, dtype: torch.dtype) -> None:
    """Among the rows of a thread, of its neighbours and of other tiles."""
    hidden = torch.randint(0, 3, (2, 100, 72), generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden[:, :30, ::2] = -1  # the first comes late
    arguments = {"hidden": hidden, "starts": torch.tensor([0, 33])}
    for threads, tile in ((32, 0), (32, 64), (64, 16), (0, 64)):
        host.tune(threads=threads, tile=tile)
        check(host, "max", arguments, *of_result("max", arguments))


def test_a_result_that_no_token_has(host: Host) -> None:
    """Of max: then the first token has the gradient, as a search that ends where it began."""
    hidden = torch.randn(2, 20, 8)
    arguments = {"hidden": hidden, "starts": torch.tensor([0, 9])}
    check(host, "max", arguments, torch.randn(2, 8), torch.full((2, 8), 77.0))


def test_weights_that_cancel(host: Host) -> None:
    hidden, weights = torch.randn(2, 6, 8), torch.tensor([[1.0, -1, 2, -2, 0, 0], [1, 2, 3, 4, 5, 6]])
    arguments = {"hidden": hidden, "weights": weights}
    gradient, result = of_result("weighted_mean", arguments)
    check(host, "weighted_mean", arguments, gradient, result)
    assert (host.backward("weighted_mean", arguments, gradient)[0] == 0).all()


@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_hostile_bounds(host: Host, mode: str, given: str | None) -> None:
    for i, (arguments, clamped) in enumerate(hostile_calls(60, seed=list(MODES).index(mode))):
        of_mode = own(given, arguments["hidden"])
        if clamped is None and MODES[mode].softmax:
            continue  # whose totals are the forward's, of which nothing is promised then
        if clamped is None:  # gradients of what a backwards cu_seqlens says are well-defined
            cu = arguments["cu_seqlens"].clamp(0, 300)
            bounds = {"starts": cu[:-1], "ends": torch.maximum(cu[:-1], cu[1:])}
            clamped = {"hidden": arguments["hidden"], **bounds}
        host.tune(tile=TILES[i % len(TILES)])
        clamped |= of_mode
        check(host, mode, arguments | of_mode, *of_result(mode, clamped), clamped)


@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_empty(host: Host, mode: str, given: str | None) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    cases: tuple[dict[str, Any], ...] = (
        {"hidden": torch.ones(0, 5, 8)},
        {"hidden": torch.ones(3, 0, 8)},
        {"hidden": torch.ones(3, 5, 0)},
        {"hidden": torch.ones(3, 5, 8), "mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"hidden": torch.ones(0, 8), "cu_seqlens": torch.tensor([0])},
        {"hidden": torch.ones(100, 8), "cu_seqlens": torch.tensor([7])},
        {"hidden": torch.ones(0, 8), "cu_seqlens": torch.tensor([0, 0, 0])},
        {"hidden": torch.ones(9, 8), "starts": none, "ends": none},
    )
    for arguments in cases:
        arguments |= own(given, arguments["hidden"])
        host.tune()
        check(host, mode, arguments, *of_result(mode, arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(host: Host, dtype: torch.dtype) -> None:
    """Tokens, gradients and results that allow loads of 16 bytes, and each of them one value off."""
    memory = torch.randn(5_000, dtype=torch.float64).to(dtype)
    for offset, row, batch, shift in (
        (0, 64, 1280, 0),
        (1, 64, 1280, 0),
        (0, 65, 1600, 0),
        (0, 64, 1281, 0),
        (0, 64, 1280, 1),
    ):
        hidden = memory[offset:].as_strided((3, 20, 64), (batch, row, 1))
        for mode, more in (("max", {}), ("weighted_mean", {"weights": torch.rand(3, 20)})):
            for truncate_dim in (64, 40, 33):
                arguments = {"hidden": hidden, **more}
                gradient, result = of_result(mode, arguments, truncate_dim)
                moved = [torch.cat([x.new_zeros(shift), x.flatten()])[shift:].view_as(x) for x in (gradient, result)]
                host.tune()
                check(host, mode, arguments, *moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide(host: Host, dtype: torch.dtype) -> None:
    """More columns than a block has threads for, than meet in one step of a tree of columns."""
    for mode, more in (("mean", {}), ("max", {}), ("weighted_mean", {"weights": torch.rand(2, 5)})):
        for width, truncate_dim in ((3000, None), (5001, 5000), (9000, 8192)):
            arguments = {"hidden": torch.randn(2, 5, width, dtype=torch.float64).to(dtype), **more}
            host.tune(threads=random.Random(width).choice(THREADS))
            check(host, mode, arguments, *of_result(mode, arguments, truncate_dim))


def test_long(host: Host) -> None:
    """More tokens than a block adds up at a time; a padded one, so that real tokens and leaves begin anywhere."""
    real = torch.rand(2, 40_000, generator=torch.Generator().manual_seed(1)) > 0.1
    real[0, :777] = real[1, -5000:] = False
    hidden = torch.randn(2, 40_000, 4)
    for mode, more in (("mean", {}), ("weighted_mean", {}), ("weighted_mean", {"weights": torch.rand(2, 40_000)})):
        arguments = {"hidden": hidden, "mask": real, **more}
        gradient, result = of_result(mode, arguments)
        found = host.backward(mode, arguments, gradient, result)
        with fastpool.backend("reference"):
            assert same_bits(found, backward(NATIVE, mode, arguments, gradient, result, "hidden")), mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(host: Host, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 4, 130, dtype=torch.float64) * 3).to(dtype)
    wide = torch.randn(2, 20_001, dtype=torch.float64).to(dtype)
    huge = (wide[:, :300].double() * torch.finfo(dtype).max / 8).to(dtype)
    cases: list[tuple[Tensor, int | None, float]] = [
        (x.transpose(0, 1), None, 1e-12),
        (x.transpose(0, 2), 77, 20.0),
        (x[..., 1:], 128, 1e-12),
        (x[0, 0, 0], 1, 1e-12),
        (x[:0], None, 1e-12),
        (x[..., :0], None, 1e-12),
        (wide, None, 1e-12),
        (wide, 8192, 1e-12),
        (huge, None, 1e-12),
        (torch.cat([huge, wide], 1), 400, 1e-12),
        (torch.full((3, 40), float("nan"), dtype=dtype), None, 1e-12),
        (torch.full((3, 40), torch.inf, dtype=dtype), None, 1e-12),
        (torch.zeros(3, 40, dtype=dtype), None, 0.0),
        (torch.full((3, 40), 1e-14, dtype=torch.float64).to(dtype), 32, 1e-12),
    ]
    for y, truncate_dim, eps in cases:
        plain = torch.randn(*y.shape[:-1], y.shape[-1] if truncate_dim is None else truncate_dim, dtype=torch.float64)
        for gradient in (plain, torch.full_like(plain, -0.0), special_values(4, 1, max(1, plain.numel()))[0, 0]):
            gradient = gradient.flatten()[: plain.numel()].view_as(plain).to(accumulator(dtype))
            host.tune()
            found = host.ops._l2_normalize_backward(gradient, y, eps)
            with fastpool.backend("reference"):
                assert same_bits(found, NATIVE._l2_normalize_backward(gradient, y, eps)), (y.shape, truncate_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize_dims(host: Host, dtype: torch.dtype) -> None:
    """Behind them neither x nor the gradient shows."""
    generator = torch.Generator().manual_seed(1)
    for width, sizes in ((130, (0, 1, 3, 4, 5, 127, 128, 129, 130)), (9001, (0, 2, 8191, 8192, 8193, 9000))):
        x = torch.randn(4, 3, width, dtype=torch.float64, generator=generator).to(dtype)
        x[0, 0], x[1, 1] = torch.finfo(dtype).max / 8, 0.0
        for columns in (width, width - 2):
            known = torch.tensor([size for size in sizes if size <= columns])
            truncate_dims = known[torch.randint(0, len(known), (3, 4), generator=generator)].T
            used = torch.arange(width) < truncate_dims[..., None]
            poisoned = torch.where(used, x, torch.nan)
            gradient = torch.randn(4, 3, columns, generator=generator, dtype=torch.float64).to(accumulator(dtype))
            gradient = torch.where(used[..., :columns], gradient, torch.nan).contiguous()
            for view, index, of in (
                (poisoned, truncate_dims.int(), gradient),
                (poisoned.transpose(0, 1), truncate_dims.T, gradient.transpose(0, 1).contiguous()),
                (poisoned[0, 0], truncate_dims[0, 0], gradient[0, 0]),
            ):
                for eps in (1e-12, 0.0):
                    host.tune()
                    found = host.ops._l2_normalize_backward(of, view, eps, index)
                    with fastpool.backend("reference"):
                        assert same_bits(found, NATIVE._l2_normalize_backward(of, view, eps, index)), (width, columns)


def test_signs_of_zero(host: Host) -> None:
    """A sum over columns is never -0."""
    for truncate_dim in (1, 2, 3, 4, 5, 64, 100, 128, 129, 512, 4096, 8192, 8193):
        gradient, x = torch.full((1, truncate_dim), -0.0), torch.ones(1, truncate_dim)
        with fastpool.backend("reference"):
            expected = NATIVE._l2_normalize_backward(gradient, x, 1e-12)
        assert torch.equal(bits(host.ops._l2_normalize_backward(gradient, x, 1e-12)), bits(expected)), truncate_dim


def test_errors_are_the_same(host: Host) -> None:
    hidden, two = torch.randn(2, 5, 8), torch.ones(2, 8)
    wrong: tuple[tuple[str, dict[str, Any], Tensor, Tensor | None], ...] = (
        ("mean", {"hidden": hidden.long()}, two, None),
        ("mean", {"hidden": hidden}, two.double(), None),
        ("max", {"hidden": hidden}, two, None),
        ("max", {"hidden": hidden}, two, two[:, :7]),
    )
    for mode, arguments, gradient, result in wrong:
        with fastpool.backend("reference"), pytest.raises((TypeError, ValueError)) as wanted:
            NATIVE._python__pool_backward(
                *codes(mode, "hidden"), gradient, arguments["hidden"], *[None] * 7, 1.0, result
            )
        with pytest.raises(RuntimeError):
            host.backward(mode, arguments, gradient, result)
        kept = backends.native.take_kept(str(wanted.value))
        assert type(kept) is wanted.type
        assert kept is not wanted.value
