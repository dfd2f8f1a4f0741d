"""quantize gives the same bytes on every backend, instruction set and number of threads; and they are those of
sentence-transformers, and of pplx-embed's formula."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers.quantize_cases import cases, expected, options, ranges_of, values
from torch import Tensor

import fastpool
from fastpool.backends import native
from fastpool.kinds import KINDS
from fastpool.testing import DTYPES

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def all_natives() -> Any:
    """Every instruction set and some numbers of threads, in turn."""
    assert native.info is not None
    for isa, threads in product(native.info.isas(), (1, 2, 3)):
        native.info.use_isa(isa)
        torch.set_num_threads(threads)
        yield isa, threads


@every_dtype
@every_kind
def test_native(kind: str, dtype: torch.dtype) -> None:
    many = values(300, 777, dtype).view(20, 15, 777), ranges_of(777)  # for several threads
    more = [(many[0].transpose(0, 1), kind, chosen) for chosen in options(kind, many[1])]
    for case in (*cases(kind, dtype), *more):
        x, kind, chosen = case
        wanted = expected(case)
        for how in all_natives():
            result = fastpool.quantize(x, kind, **chosen)
            assert result.is_contiguous()
            assert result.dtype == KINDS[kind].dtype
            assert torch.equal(result, wanted), (x.shape, chosen, how)


@every_dtype
@every_kind
def test_flushed_subnormals_stay(kind: str, dtype: torch.dtype) -> None:
    """torch.set_flush_denormal tells a thread to take subnormals for zeros, and kernels do not listen."""
    x, ranges = values(12, 133, dtype), ranges_of(133)
    x[:, ::3] = torch.finfo(dtype).tiny / 8
    for more in options(kind, ranges):
        wanted = expected((x, kind, more))
        try:
            torch.set_flush_denormal(True)
            for how in all_natives():
                assert torch.equal(fastpool.quantize(x, kind, **more), wanted), how
        finally:
            torch.set_flush_denormal(False)


def as_numpy(x: Tensor) -> Any:
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


@every_dtype
@pytest.mark.parametrize("kind", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_sentence_transformers(kind: str, dtype: torch.dtype) -> None:
    """Theirs where they have an answer: no more than two dimensions, and a bit of 0 for 0."""
    util = pytest.importorskip("sentence_transformers.util")
    for x, _, more in cases(kind, dtype):
        if x.dim() > 2 or more.get("zero_bit"):
            continue
        ranges = None if more.get("ranges") is None else more["ranges"].numpy()
        theirs = util.quantize_embeddings(as_numpy(x), kind, ranges=ranges)
        ours = fastpool.quantize(x, kind, **more).numpy()
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@every_dtype
def test_buckets_of_those_that_they_are_taken_of(dtype: torch.dtype) -> None:
    """The ranges that they would take of these very vectors."""
    util = pytest.importorskip("sentence_transformers.util")
    x = torch.randn(500, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    ranges = fastpool.quantization_ranges(x)
    for kind in ("int8", "uint8"):
        theirs = util.quantize_embeddings(as_numpy(x), kind)
        assert np.array_equal(fastpool.quantize(x, kind, ranges=ranges).numpy(), theirs)


@every_dtype
def test_tanh(dtype: torch.dtype) -> None:
    """To the nearest of the true value, and in ties to the even one; an odd function; NaN is 0."""
    x = torch.linspace(-6, 6, 20_001, dtype=torch.float64).to(dtype)
    true = 127 * torch.tanh(x.double())
    result = fastpool.quantize(x, "int8_tanh")
    assert ((result - true).abs() <= 0.5 + 1e-4).all()
    assert torch.equal(fastpool.quantize(-x, "int8_tanh"), -result)
    assert (result.min(), result.max()) == (-127, 127)
    clear = ((true - true.floor()) - 0.5).abs() > 1e-4
    assert torch.equal(result[clear], true.round().to(torch.int8)[clear])
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
    assert fastpool.quantize(special, "int8_tanh").tolist() == [0, 127, -127, 0, 0]


def test_which_bit_0_gets() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 1.0, torch.nan, torch.inf, -torch.inf, 0.0, 2.0])
    assert fastpool.quantize(x, "ubinary").tolist() == [0b00011010, 0b01000000]
    assert fastpool.quantize(x, "ubinary", zero_bit=True).tolist() == [0b01111010, 0b11000000]
    assert fastpool.quantize(x, "binary").tolist() == [0b00011010 - 128, 0b01000000 - 128]


def test_what_lies_outside_and_what_is_no_number() -> None:
    ranges = torch.tensor([[-1.0, 2.0], [1.0, 2.0]])  # the second column is constant: its step is 1
    x = torch.tensor([[torch.nan] * 2, [torch.inf] * 2, [-torch.inf] * 2, [-9.0, 1.0], [9.0, 4.5], [0.0, 2.0]])
    buckets = [[0, 0], [255, 255], [0, 0], [0, 0], [255, 2], [127, 0]]
    assert fastpool.quantize(x, "uint8", ranges=ranges).tolist() == buckets
    signed = [[bucket - 128 for bucket in row] for row in buckets]
    signed[0] = [0, 0]  # NaN is byte 0 in either kind
    assert fastpool.quantize(x, "int8", ranges=ranges).tolist() == signed
