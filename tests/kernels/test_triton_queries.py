"""attention by the Triton kernels: the reference's bits for any number of queries, of which a program takes several.
Without a GPU they run in Triton's interpreter (conftest), on small shapes."""

from functools import partial
from typing import Any

import pytest
import torch

import fastpool
from fastpool.calls import PoolCall
from fastpool.testing import DTYPES, LAYOUTS, same_bits, sequences

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

import triton.language as tl  # after the skip
from helpers.triton_cuts import TRITON, Cut, assert_reference_bits, cut_up, needs_interpreter  # likewise
from triton.runtime import interpreter  # likewise

from fastpool.backends import triton as adapter  # likewise
from fastpool.triton_kernels import plan  # likewise


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    return partial(cut_up, monkeypatch)


def queries(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["padded_starts_ends", "packed_mask", "packed_shuffled"])
def test_queries(layout: str, dtype: torch.dtype, cut: Cut) -> None:
    """Some of all segments, and some of each segment's own, whatever the strides; each as if it were alone."""
    cut(1, 0)
    batch = sequences([150, 0, 33], 24, torch.float32, holes=True)
    arguments = LAYOUTS[layout].make(batch, None)
    own = queries((3, 3, 24), dtype) / 3
    more = {"scale": 0.7, "normalize": True, "truncate_dim": 17}
    wide = queries((3, 4, 2, 24), dtype)[:, 1:, 1] / 3
    strided = queries((24, 5, 3), dtype).permute(2, 1, 0)[:, ::2] / 3
    for query in (own[0], own, wide, strided, strided[1], own[:, :1], own[:1, 0].expand(2, 24), own[:, :0], own[0, :0]):
        assert_reference_bits("attention", {**arguments, "query": query}, query.shape, **more)
    every = TRITON.run(fastpool.attention, **arguments, query=own, **more)
    for k in range(3):
        alone = TRITON.run(fastpool.attention, **arguments, query=own[:, k : k + 1], **more)
        assert same_bits(every[:, k], alone[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["padded_left_mask", "packed"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_numbers_of_queries(count: int, layout: str, dtype: torch.dtype, cut: Cut) -> None:
    """Programs take several of them at once, and the last of a text perhaps fewer: each has the bits that it has alone.
    NaN in one of them, or in one text, is in its own results."""
    cut(1, 0)
    deep = count == 5 and dtype == torch.float32  # so that nodes of the arrival tree meet too
    batch = sequences([290 if deep else 40, 0, 33, 2], 24, dtype, holes=LAYOUTS[layout].holes)
    batch[3].states[1, 2] = torch.nan
    arguments, more = LAYOUTS[layout].make(batch, None), {"normalize": True, "truncate_dim": 17}
    own = queries((4, count, 24), dtype) / 3
    own[2, count - 1, 20] = torch.nan
    for query in (own, own[2]):
        assert_reference_bits("attention", {**arguments, "query": query}, query.shape, **more)
    every = TRITON.run(fastpool.attention, **arguments, query=own, **more)
    assert not every[:2].isnan().any()
    assert every.isnan().any(-1).tolist()[2:] == [[k == count - 1 for k in range(count)], [True] * count]
    for k in {0, count - 1}:
        alone = TRITON.run(fastpool.attention, **arguments, query=own[:, k : k + 1], **more)
        assert same_bits(every[:, k], alone[:, 0])


@needs_interpreter
@pytest.mark.parametrize("rows", [32, 70])
def test_a_row_is_read_once_for_several_queries(rows: int, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(1, 0)
    read = 0
    load = interpreter.InterpreterBuilder.create_masked_load

    def counted(builder: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        nonlocal read
        if pointers.get_element_ty() == tl.float16:  # as hidden alone is
            read += int(mask.data.sum())
        return load(builder, pointers, mask, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
    hidden = torch.ones(1, rows, 128, dtype=torch.float16)

    def reads(count: int) -> int:
        nonlocal read
        read = 0
        TRITON.run(fastpool.attention, hidden=hidden, query=torch.ones(count, 128))
        return read

    together = plan_of(hidden, 4).fixed["QUERIES"]
    assert together == (4 if rows <= 32 else 2)
    assert reads(1) >= hidden.numel()
    for count in (2, 3, 4, 8, 9):
        assert reads(count) == -(-count // together) * reads(1), count


def plan_of(hidden: torch.Tensor, count: int) -> plan.PoolPlan:
    """The plan for so many queries."""
    call = PoolCall("attention", hidden, query=torch.ones(count, hidden.shape[-1]))
    return plan.make_pool_plan(call, plan.device_of(hidden.device))


def test_queries_of_a_cu_seqlens_that_runs_backwards(cut: Cut) -> None:
    """No result is promised, but no row is left as the memory was."""
    cut(1, 0)
    backwards = torch.tensor([0, 70, 3, 2**62, 100, -5, 40], device=TRITON.device)
    hidden, query = torch.zeros(100, 16, device=TRITON.device), torch.ones(6, 3, 16, device=TRITON.device)
    torch.full((6, 3, 16), float("nan"), device=TRITON.device)  # what an allocator would hand out next
    assert not adapter.pool(PoolCall("attention", hidden, query=query, cu_seqlens=backwards)).isnan().any()
