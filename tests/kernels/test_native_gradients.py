"""Gradients by the native CPU kernels: what depends on how they cut the work up. The reference says what is right."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpool import ops, reference
from fastpool.arguments import codes
from fastpool.backends import native
from fastpool.calls import PoolBackwardCall, accumulator
from fastpool.testing import DTYPES, backward_arguments, own_arguments, same_bits, variants_of_states

GRADIENTS = [
    (mode, given, of) for mode, given in variants_of_states() for of in (("hidden", given) if given else ("hidden",))
]


def inputs(
    mode: str, given: str | None, hidden: Tensor, truncate_dim: int | None = None, seed: int = 0, **arguments: Any
) -> tuple[Any, ...]:
    """The arguments of _pool_backward behind its codes: values of any sign and size, and the result of the forward."""
    generator = torch.Generator().manual_seed(seed)
    width = hidden.shape[-1]
    taken = {"hidden": hidden, **own_arguments(given, torch.rand(hidden.shape[:-1], generator=generator), width)}
    dtype = accumulator(hidden.dtype)
    result = getattr(torch.ops.fastpool, mode)(**taken, **arguments, truncate_dim=truncate_dim, out_dtype=dtype)
    gradient = torch.randn(result.shape, generator=generator, dtype=dtype)
    return tuple(backward_arguments(mode, "hidden", gradient, result, **taken, **arguments)[2:])


def call_of(mode: str, of: str, arguments: tuple[Any, ...]) -> PoolBackwardCall:
    call = ops.call_of("_pool_backward", *codes(mode, of), *arguments)
    assert isinstance(call, PoolBackwardCall)
    return call


def native_op(mode: str, of: str, arguments: tuple[Any, ...]) -> Tensor:
    result: Tensor = torch.ops.fastpool._pool_backward(*codes(mode, of), *arguments)
    return result


def overlapping(rows: int, segments: int, seed: int = 0) -> dict[str, Tensor]:
    """Bounds in no order; some segments are empty, and rows at either end are in none."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(rows // 20, rows - rows // 20, (2, segments), generator=generator)
    bounds[0, ::7] = bounds[1, ::7]
    return {
        "mask": torch.rand(rows, generator=generator) > 0.2,
        "starts": bounds.amin(0),
        "ends": bounds.amax(0),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given", "of"), GRADIENTS)
def test_threads_and_instruction_sets(mode: str, given: str | None, of: str, dtype: torch.dtype) -> None:
    assert native.info is not None
    padded = (torch.arange(150) < torch.tensor([[0], [150], [1], [75]])) & (torch.arange(150) % 5 > 0)
    layouts = {
        "overlap": inputs(mode, given, torch.randn(700, 133).to(dtype), truncate_dim=130, **overlapping(700, 20)),
        "padded": inputs(mode, given, torch.randn(4, 150, 133).to(dtype), mask=padded),
        "one long sequence": inputs(mode, given, torch.randn(1, 900, 133).to(dtype)),
        "cu_seqlens": inputs(
            mode, given, torch.randn(800, 133).to(dtype), cu_seqlens=torch.tensor([5, 5, 99, 100, 700])
        ),
    }
    for name, arguments in layouts.items():
        expected = reference.pool_backward(call_of(mode, of, arguments))
        for isa in native.info.isas():
            native.info.use_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                gradient = native_op(mode, of, arguments)
                assert same_bits(gradient, expected), (name, isa, threads)


@pytest.mark.parametrize("width", [1, 3, 8, 15, 16, 17, 31, 33, 67, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_width(dtype: torch.dtype, width: int) -> None:
    """Rows that begin anywhere within a vector, and columns that are not used."""
    hidden = torch.randn(41, width).to(dtype)
    for mode, given, of in GRADIENTS:
        for truncate_dim in {1, (width + 1) // 2, width}:
            arguments = inputs(mode, given, hidden, truncate_dim=truncate_dim, **overlapping(41, 6))
            expected = reference.pool_backward(call_of(mode, of, arguments))
            assert same_bits(native_op(mode, of, arguments), expected), (mode, truncate_dim)


@pytest.mark.parametrize(("mode", "given", "of"), GRADIENTS)
def test_many_segments_end_and_begin_at_the_same_rows(mode: str, given: str | None, of: str) -> None:
    """Whole towers of segments: the same one twice, one inside the other, one behind the other; many for each row."""
    starts, ends = torch.tensor([(a, b) for a in range(0, 24, 4) for b in range(a, 28, 4)] * 2).T
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0))
    # Maxima of few values, so that segments agree on one token and share its columns.
    hidden = torch.randint(0, 3, (30, 1200)).float()
    arguments = inputs(mode, given, hidden, starts=starts[order], ends=ends[order])
    expected = reference.pool_backward(call_of(mode, of, arguments))
    for threads in (1, 2, 40):  # more threads than rows
        torch.set_num_threads(threads)
        assert same_bits(native_op(mode, of, arguments), expected), threads


@pytest.mark.parametrize(("mode", "given", "of"), GRADIENTS)
def test_no_segments_no_rows_no_columns(mode: str, given: str | None, of: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for hidden, bounds in (
        (torch.randn(9, 5), {"starts": none, "ends": none}),
        (torch.randn(0, 5), {"cu_seqlens": torch.tensor([0, 0, 0])}),
        (torch.randn(2, 0, 5), {}),
        (torch.randn(0, 3, 5), {}),
        (torch.randn(2, 3, 0), {}),
    ):
        arguments = inputs(mode, given, hidden, **bounds)
        expected = reference.pool_backward(call_of(mode, of, arguments))
        assert same_bits(native_op(mode, of, arguments), expected), hidden.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    assert native.info is not None
    scales = torch.tensor([1, 0, 1e-13, 1e-4 if dtype == torch.float16 else 1e25, -1])[:, None, None]
    for width in (1, 4, 33, 130):
        x = (torch.randn(5, 60, width) * scales).to(dtype).transpose(0, 1)
        for truncate_dim in {width, (width + 1) // 2}:
            gradient = torch.randn(60, 5, truncate_dim, dtype=accumulator(dtype))
            gradient[::4] = -0.0  # what this leaves is 0, of a sign that tells whether a sum of -0 is +0
            cut = torch.randint(0, truncate_dim + 1, (60, 5), generator=torch.Generator().manual_seed(truncate_dim))
            for eps, truncate_dims in ((0.0, None), (1e-12, None), (1e-3, None), (1e-12, cut), (0.0, cut.int())):
                expected = reference.l2_normalize_backward(
                    ops.call_of("_l2_normalize_backward", gradient, x, eps, truncate_dims)
                )
                for isa in native.info.isas():
                    native.info.use_isa(isa)
                    for threads in (1, 3):
                        torch.set_num_threads(threads)
                        result = torch.ops.fastpool._l2_normalize_backward(gradient, x, eps, truncate_dims)
                        assert same_bits(result, expected), (
                            width,
                            truncate_dim,
                            eps,
                            truncate_dims is None,
                            isa,
                            threads,
                        )
