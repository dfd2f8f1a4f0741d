"""The Triton kernels give the reference's bits however the work is cut up and in whatever order programs arrive.
Without a GPU they run in Triton's interpreter (conftest), on small shapes."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fastpool
from fastpool.calls import PoolCall
from fastpool.modes import MODES
from fastpool.testing import (
    DTYPES,
    LAYOUTS,
    own_arguments,
    same_bits,
    sequences,
    special_values,
    taking_turns,
    variants,
)

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

import triton  # after the skip
import triton.language as tl  # likewise
from helpers.triton_cuts import TRITON, Cut, assert_reference_bits, cut_up, needs_interpreter  # likewise
from triton.runtime import interpreter  # likewise

from fastpool.triton_kernels import arrival_tree, launch, plan, pool, segment  # likewise


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    return partial(cut_up, monkeypatch)


@pytest.mark.parametrize(("mode", "given", "layout", "dtype"), taking_turns(*DTYPES), ids=str)
def test_layouts(mode: str, given: str | None, layout: str, dtype: torch.dtype, cut: Cut) -> None:
    """Whole segments and split ones, with holes where the layout has them."""
    cut(1, 0)
    batch = sequences([40, 1, 0], 20, dtype, holes=LAYOUTS[layout].holes)
    assert_reference_bits(mode, LAYOUTS[layout].make(batch, given), normalize=True, truncate_dim=17)


@pytest.mark.parametrize(
    ("mode", "given", "layout", "leaves", "levels"),
    [("mean", None, "padded_left_mask", *cut) for cut in ((1, 0), (1, 2), (2, 0), (2, 1), (4, 0), (4, 3))]
    + [("max", None, "packed_mask", *cut) for cut in ((1, 2), (4, 0))]
    + [("weighted_mean", "weights", "packed_shuffled", *cut) for cut in ((1, 2), (4, 0))]
    + [("softmax_mean", "scores", "packed_mask", *cut) for cut in ((1, 0), (1, 2), (4, 0), (4, 3))]
    + [("attention", "query", "padded_left_mask", *cut) for cut in ((1, 0), (2, 1), (4, 0))],
)
def test_cuts(mode: str, given: str | None, layout: str, leaves: int, levels: int, cut: Cut) -> None:
    """Segments of one unit up to a dozen, so that nodes of the arrival tree have children in every number."""
    cut(leaves, levels)
    batch = sequences([1, 160, 32, 0, 300, 97], 24, torch.float32, holes=True)
    assert_reference_bits(mode, LAYOUTS[layout].make(batch, given))


def test_deep_tree(cut: Cut) -> None:
    """More units than one node's children have children: three depths of the tree."""
    cut(1, 0)
    batch = sequences([32 * 8 * 8 + 5], 16, torch.float32)
    assert_reference_bits("sum", LAYOUTS["padded_lengths"].make(batch, None))


@triton.jit
def keep_and_find(counts, kept, found):
    at = tl.arange(0, 8)
    tl.store(kept + at, arrival_tree.as_bits(tl.load(counts + at), kept.dtype.element_ty))
    tl.store(found + at, arrival_tree.from_bits(tl.load(kept + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_counts_are_kept_to_the_bit(dtype: torch.dtype) -> None:
    """Beside states, which are floats: numbers that a float32 does not know, and those whose bits are a NaN's."""
    counts = torch.tensor([0, 1, 2**24 + 1, 0x7F800000, 0x7F800001, 0x7FA00000, 2**31 - 2, 2**31 - 1])
    counts = counts.to(TRITON.device)
    kept, found = torch.empty(8, dtype=dtype, device=counts.device), torch.empty_like(counts)
    keep_and_find[(1,)](counts, kept, found)
    assert torch.equal(found, counts)


@needs_interpreter
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layout", ["padded_right_mask", "packed"])
def test_order_of_arrival(layout: str, seed: int, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that come in another order merge in the same one."""
    builder = interpreter.interpreter_builder
    order = list(range(64))
    random.Random(seed).shuffle(order)
    programs = 0

    def shuffled(x: int, y: int, z: int, there: Callable[[int, int, int], None] = builder.set_grid_idx) -> None:
        nonlocal programs
        programs = max(programs, x + 1)
        count = builder.grid_dim[0]
        there([i for i in order if i < count][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    cut(1, 0)
    batch = sequences([260, 40, 3, 70], 8, torch.float32)
    pooled = [("sum", None), ("max", None), ("softmax_mean", "scores"), ("attention", "query")]
    for mode, given in pooled if seed == 0 else pooled[:1]:
        assert_reference_bits(mode, LAYOUTS[layout].make(batch, given))
    assert 14 < programs <= len(order)


def test_fewer_programs_than_units(cut: Cut) -> None:
    cut(1, 0, programs=5)
    batch = sequences([200, 90, 3], 8, torch.float32, holes=True)
    for layout in ("padded_right_mask", "packed_shuffled"):
        assert_reference_bits("mean", LAYOUTS[layout].make(batch, None))
        assert_reference_bits("attention", LAYOUTS[layout].make(batch, "query"))


@pytest.mark.parametrize(
    ("mode", "given", "dtype", "more"),
    [
        ("mean", None, torch.float32, {"normalize": True}),
        ("mean", None, torch.bfloat16, {"normalize": True}),
        ("mean", None, torch.float32, {"normalize": True, "truncate_dim": 64}),
        ("max", None, torch.float32, {}),
        ("weighted_mean", None, torch.float32, {"normalize": True}),
        ("softmax_mean", "scores", torch.float64, {}),
        ("attention", "query", torch.float32, {"normalize": True}),
        ("attention", "query", torch.bfloat16, {"normalize": True, "truncate_dim": 64}),
    ],
    ids=str,
)
def test_rows_wider_than_a_program(
    mode: str, given: str | None, dtype: torch.dtype, more: dict[str, Any], cut: Cut
) -> None:
    """Columns in strips, each with a tree of its own, of two depths here; and a norm in a second launch, rounded once
    all the same. Where truncation leaves one strip, in one launch."""
    cut(1, 0, columns=64)
    batch = sequences([260, 0, 7], 100, dtype, holes=True)
    assert_reference_bits(mode, LAYOUTS["packed_mask"].make(batch, given), **more)


@pytest.mark.parametrize(("mode", "given"), [("mean", None), ("max", None), ("attention", "query")])
def test_overlapping_segments_in_one_piece(mode: str, given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where states of units would take too much memory: strips of columns, and levels for any length."""
    monkeypatch.setattr(plan, "MIN_WORKSPACE", 0)
    hidden = sequences([600], 1040, torch.float32)[0].states
    starts, ends = torch.tensor([0, 500, 17, 3]), torch.tensor([600, 530, 17, 290])
    own = own_arguments(given, hidden[:, 0], 1040)
    assert_reference_bits(mode, {"hidden": hidden, "starts": starts, "ends": ends, **own}, normalize=True)


@needs_interpreter
def test_search_among_many_segments(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "WAYS", tl.constexpr(4))
    cut(1, 0)
    batch = sequences([3, 0, 0, 40, 1, 65, 0, 32, 31, 33, 2, 0, 5, 0, 0, 0, 100, 0], 8, torch.float32)
    assert_reference_bits("mean", LAYOUTS["packed"].make(batch, None))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Halfway between neighbours and beside it, subnormals, overflow, and float64 to 16 bits in one step."""
    step = 2.0**-11
    values = [
        1 + step,
        1 + 3 * step,
        1 + step + 2.0**-40,
        1 + step / 2**3,
        65519.9,
        65520,
        1e-7,
        6e-8,
        3e-8,
        1e-40,
        1e300,
    ]
    hidden = torch.tensor([values + [-v for v in values] + [0.0, -0.0, torch.inf, -torch.inf, torch.nan]]).double()
    assert_reference_bits("cls", {"hidden": hidden.to(dtype)[None]}, out_dtype=out_dtype)


@pytest.mark.parametrize(("mode", "given"), variants())
def test_special_values(mode: str, given: str | None, cut: Cut) -> None:
    """Split, since which zero a maximum is depends on the order of the merges."""
    cut(1, 0)
    hidden = special_values(6, 40, 40)
    own = own_arguments(given, torch.rand(6, 40, generator=torch.Generator().manual_seed(1)), 40)
    for normalize in (False, True):
        assert_reference_bits(mode, {"hidden": hidden, **own}, normalize=normalize)


SCORES = {
    "growing": torch.arange(300.0) * 3,
    "falling": torch.arange(300.0) * -3,
    "beyond exponents": torch.tensor([-1e6, 1e6, 88.0, -104.0, 3e38, -3e38]).repeat(50),
    "a leaf of -inf": torch.where(torch.arange(300) // 32 == 3, -torch.inf, torch.arange(300.0)),
    "nothing but -inf": torch.full((300,), -torch.inf),
    "inf": torch.where(torch.arange(300) == 131, torch.inf, 0.0),
    "NaN in the last leaf": torch.where(torch.arange(300) == 299, torch.nan, 0.0),
    "NaN beside one that outweighs": torch.where(torch.arange(300) == 131, torch.nan, torch.arange(300.0) * 3),
}


@pytest.mark.parametrize("leaves", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_scores(scores: str, dtype: torch.dtype, leaves: int, cut: Cut) -> None:
    """The exponent grows within a leaf, across leaves, units and nodes of the arrival tree; tokens that weigh nothing,
    and infinities of theirs, which are NaN then."""
    cut(leaves, 0)
    hidden = sequences([300], 8, dtype)[0].states
    hidden[::7, 3], hidden[200, 4], hidden[5, 5] = 3e38, torch.inf, -torch.inf
    for weigher in (SCORES[scores], SCORES[scores].double() / 3):
        assert_reference_bits("softmax_mean", {"hidden": hidden[None], "scores": weigher[None]})
    rows = torch.cat([SCORES[scores].to(dtype)[:, None], hidden[:, 1:3]], dim=1)
    assert_reference_bits("attention", {"hidden": rows[None], "query": torch.tensor([1.0, 0.0, 0.0])})


@pytest.mark.parametrize("width", [30522, 250002])
@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.of_logits])
def test_vocabularies(mode: str, width: int) -> None:
    """BERT's and XLM-RoBERTa's words: a program owns a strip of them. Rows begin where two elements may be loaded at
    once, and no more."""
    dtype = torch.bfloat16 if width == 30522 else torch.float32
    batch = sequences([2, 0] if width == 30522 else [1, 1], width, dtype)
    assert_reference_bits(mode, LAYOUTS["packed"].make(batch, None))


@pytest.mark.parametrize(("mode", "given"), variants())
def test_bounds_are_clamped(mode: str, given: str | None, cut: Cut) -> None:
    """Whatever index tensors hold, nothing outside hidden is read, and every row is written. The adapter is asked
    itself: before it, a CPU call's values are checked."""
    from fastpool.backends import triton as adapter

    cut(1, 0)
    guard = torch.full((300, 16), float("nan"), device=TRITON.device)
    hidden = guard[100:200]
    hidden[:] = torch.arange(100.0)[:, None]
    own = {name: x.to(TRITON.device) for name, x in own_arguments(given, torch.rand(100), 16).items()}
    starts = torch.tensor([-5, 90, 50, 2**62, -(2**62), 200], device=TRITON.device)
    ends = torch.tensor([3, 120, 40, 2**62 + 5, 2**62, 100], device=TRITON.device)
    got = adapter.pool(PoolCall(mode, hidden, starts=starts, ends=ends, **own))
    first = starts.clamp(0, 100)
    clean = PoolCall(mode, hidden, starts=first, ends=torch.maximum(ends.clamp(0, 100), first), **own)
    assert same_bits(got.cpu(), adapter.pool(clean).cpu())
    assert not got.isnan().any()
    # A cu_seqlens that runs backwards: no result is promised, but no row is left as the memory was.
    backwards = torch.tensor([0, 70, 3, 2**62, 100, -5, 40], device=TRITON.device)
    torch.full((6, 16), float("nan"), device=TRITON.device)  # what an allocator would hand out next
    assert not adapter.pool(PoolCall(mode, hidden, cu_seqlens=backwards, **own)).isnan().any()


def test_padding_is_not_read(cut: Cut) -> None:
    """NaN behind a zero weight or mask would show; so does every row that no mask tells from a token."""
    for leaves, levels in ((1, 0), (2, 1)):
        cut(leaves, levels)
        hidden = torch.full((2, 130, 8), float("nan"))
        hidden[0, 40:70] = hidden[1, ::3] = 2.0
        result = TRITON.run(fastpool.mean, hidden, ~hidden[:, :, 0].isnan())
        assert torch.equal(result, torch.full((2, 8), 2.0))


@needs_interpreter
def test_environment() -> None:
    """Two variables bring CPU tensors to the very kernels; without them, the backend says what it is for."""
    code = (
        "import torch, fastpool; x = torch.ones(1, 2, 3)\n"
        "print(fastpool.explain(x).backend, fastpool.mean(x).tolist(), fastpool.l2_normalize(x).sum().item() > 3)"
    )

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FASTPOOL_BACKEND": "triton", **variables}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert run(TRITON_INTERPRET="1").stdout.split() == ["triton", "[[1.0,", "1.0,", "1.0]]", "True"]
    refused = run(TRITON_INTERPRET="0")
    assert "Triton kernels are for CUDA and ROCm tensors, not cpu" in refused.stderr


def test_known_programs_are_launched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second launch of a program takes a short cut past Triton: with the same arguments in the same places."""

    class Compiled:
        def __init__(self) -> None:
            self.launched: list[tuple[Any, ...]] = []

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: self.launched.append((grid, *arguments))

    class Kernel:
        compiled = 0

        def __hash__(self) -> int:
            assert settled, "Triton's hash of a kernel is its key, and settles it"
            return id(self)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            def first(*arguments: Any, **options: Any) -> Compiled:
                assert options["num_warps"] >= 1
                Kernel.compiled += 1
                return Compiled()

            return first

    settled: list[None] = []
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "settle_cache_keys", lambda: settled.append(None))
    kernel, device = Kernel(), torch.device("cuda", 0)

    def launched(hidden: torch.Tensor, **more: Any) -> launch.Launch:
        call = PoolCall("mean", hidden, **more)
        planned = plan.plan_pool(call, plan.DeviceProperties("test", 132))
        assert list(planned.arguments) == list(pool.pool_kernel.arg_names)
        planned.kernel = kernel
        planned._run(device)
        return planned

    hidden = torch.zeros(4, 20, 64)
    launched(hidden)
    again = launched(torch.ones(8, 21, 64))
    assert Kernel.compiled == 1
    (program,) = launch._compiled.values()
    ((grid, *arguments),) = program.launched
    assert grid == again.grid
    assert all(one is other for one, other in zip(arguments, again.arguments.values(), strict=True))
    storage = torch.zeros(4 * 20 * 64 + 1)
    for number, other in enumerate(
        [
            {"hidden": hidden.half()},
            {"hidden": hidden, "mask": torch.ones(4, 20, dtype=torch.bool)},
            {"hidden": hidden, "mask": torch.ones(4, 20, dtype=torch.int64)},
            {"hidden": hidden, "normalize": True},
            {"hidden": storage[1:].view(4, 20, 64)},  # rows that are not aligned
        ]
    ):
        launched(**other)
        assert Kernel.compiled == number + 2, other.keys()
    launched(hidden, mask=torch.ones(20, 4, dtype=torch.bool).T)  # a stride is a number, which is not compiled in
    assert Kernel.compiled == number + 2
    device = torch.device("cuda", 1)  # a program is loaded on one device
    launched(hidden)
    assert Kernel.compiled == number + 3
