"""Triton's launch plans of calls drawn at random: whatever the shapes, a plan covers its work once and stays within
what a GPU has. Tensors are on torch's meta device, and nothing is launched."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpool.arguments import GRADIENTS_OF
from fastpool.calls import PoolBackwardCall, PoolCall, accumulator
from fastpool.modes import MODES
from fastpool.testing import DTYPES

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels import aot  # after the skip
from fastpool.triton_kernels.config import MOST_CHUNK  # likewise

LEAF = 32
FAN, DEPTHS = 8, 8  # of the arrival tree
WORKSPACE = 64 << 20  # bytes that states of units may take in any case
INT32 = range(-(2**31), 2**31)
MAX_BYTES = 2**37  # half of what the largest GPU has: a gradient takes as much
WIDTHS = (1, 2, 7, 8, 17, 64, 130, 384, 768, 1024, 2560, 4096, 4097, 8192, 16384, 20001)
CALLS = 3000  # of a seed


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def size(drawn: random.Random, most: int) -> int:
    """A size up to `most`, every order of magnitude as likely as another."""
    return min(most, int(2 ** drawn.uniform(0, most.bit_length())))


def draw_call(drawn: random.Random) -> PoolCall:
    mode, dtype, width = drawn.choice(list(MODES)), drawn.choice(DTYPES), drawn.choice(WIDTHS)
    layout = drawn.choice(["padded", "cu_seqlens", "starts and ends"])
    most = MAX_BYTES // (width * dtype.itemsize)
    batch = size(drawn, min(most, 3_000_000))
    rows = size(drawn, min(most // batch if layout == "padded" else most, 2**31 - 1))
    per_token = (batch, rows) if layout == "padded" else (rows,)
    given: dict[str, Any] = {"truncate_dim": drawn.choice([None, None, max(1, width // 2), drawn.randint(1, width)])}
    if layout == "cu_seqlens":
        given["cu_seqlens"] = meta(batch + 1, dtype=torch.int32)
    elif layout == "starts and ends":
        given |= {"starts": meta(batch, dtype=torch.int64), "ends": meta(batch, dtype=torch.int64)}
    if drawn.random() < 0.5:
        given["mask"] = meta(*per_token, dtype=torch.bool)
    if MODES[mode].takes_scores or (MODES[mode].takes_weights and drawn.random() < 0.5):
        given["scores" if MODES[mode].softmax else "weights"] = meta(*per_token, dtype=torch.float32)
    if MODES[mode].takes_query:
        of_segment = drawn.choice([(), (drawn.randint(1, 9),), (batch, drawn.randint(1, 9))])
        given["query"] = meta(*of_segment, width, dtype=drawn.choice(DTYPES))
    hidden = meta(*per_token, width + drawn.choice([0, 0, 1, 8]), dtype=dtype)[..., :width]
    return PoolCall(mode, hidden, normalize=drawn.random() < 0.5, **given)


def drawn_calls(seed: int) -> Iterator[tuple[PoolCall, aot.DeviceProperties, random.Random]]:
    drawn = random.Random(seed)
    for _ in range(CALLS):
        sm_count = drawn.choice([1, 20, 132, 148, 304])
        yield draw_call(drawn), aot.DeviceProperties("drawn", sm_count, splits=drawn.random() < 0.9), drawn


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def check_launch(launch: Any, width: int) -> None:
    """What a GPU asks of every launch, and Triton of constants."""
    assert 1 <= launch.grid[0] < 2**31
    assert 1 <= launch.grid[1] <= 65535
    assert launch.grid[2] == 1
    assert launch.options["num_warps"] in (1, 2, 4, 8, 16)
    constants = launch.arguments
    for name in ("COLUMNS", "LEAVES", "LOADS", "TILE_ROWS", "SCAN", "VECTOR", "QUERIES"):
        assert is_power_of_two(constants.get(name, 1)), name
    for name in ("batch", "rows", "dim", "width", "programs", "chunk", "queries"):
        assert (constants.get(name) or 0) in INT32, name  # None: not of this call
    assert width % constants.get("VECTOR", 1) == 0
    side_by_side = max(constants.get("LEAVES", 1), constants.get("TILE_ROWS", 1))
    assert constants["COLUMNS"] * side_by_side <= 1 << 20  # Triton's limit


def check_slots(cu_seqlens: list[int], split: int, slots: int) -> None:
    """A segment's slots begin behind those of the segment before, and all slots lie within the workspace."""
    free = 0
    for segment, (begin, end) in enumerate(pairwise(cu_seqlens)):
        first = begin // split + segment
        assert first >= free, "two segments share a slot"
        free = first + max(1, -(-(end - begin) // split))
    assert free <= slots, "a unit has no slot"


@pytest.mark.parametrize("seed", range(4))
def test_pooling_plans_are_sound(seed: int) -> None:
    for call, device, drawn in drawn_calls(seed):
        launch = aot.plan_pool(call, device)
        constants, states = launch.arguments, launch.arguments["states"]
        width = call.hidden.shape[-1] if call.truncate_dim is None else call.truncate_dim
        batch, rows, cu = call.batch, call.rows, call.cu_seqlens is not None
        try:
            check_launch(launch, width)
            assert constants["COLUMNS"] * launch.grid[1] >= width > constants["COLUMNS"] * (launch.grid[1] - 1)
            split = LEAF * constants["LEAVES"] << constants["LEVELS"]
            units = -(-rows // split)  # of a segment, at most
            together = constants["QUERIES"]
            assert together == 1 or (constants["LEAVES"] == 1 and together < 2 * call.queries)
            groups = -(-call.queries // together)
            if states is None:
                assert constants["WHOLE"]
                assert units <= 1 or call.mode in ("cls", "last")  # which read one token
                assert launch.grid[0] == batch * groups
                continue
            assert not constants["WHOLE"]
            assert device.splits
            assert units <= FAN**DEPTHS
            slots, queries = states.shape[0] // call.queries, call.queries
            assert states.shape[0] == slots * queries
            assert launch.counters == slots * groups * launch.grid[1]
            # Behind the columns each strip has four elements of its own.
            assert states.shape[1] - width == 4 * launch.grid[1]
            if cu:
                assert launch.grid[0] == slots * groups
                assert slots <= rows // LEAF + batch
                if batch <= 2000:
                    ends = sorted(drawn.choice([drawn.randint(0, rows), rows // 3, rows]) for _ in range(batch))
                    check_slots([drawn.randint(0, ends[0]), *ends], split, slots)
            else:
                assert launch.grid[0] == batch * groups * constants["programs"] <= max(batch * groups, 65536)
                assert slots >= batch * units
            # Beside a state for each segment: half a byte for each of bfloat16 token states.
            extra = (
                (slots - batch) * queries * (width * 4 + 16 * launch.grid[1])
            )  # float64 twice, and so are its token states
            assert extra <= max(WORKSPACE, rows * width * (batch * queries if call.padded else queries))
        except AssertionError as error:
            raise AssertionError(f"{described(call)} on {device}") from error


@pytest.mark.parametrize("seed", range(4))
def test_gradient_plans_are_sound(seed: int) -> None:
    for call, device, drawn in drawn_calls(seed):
        width = call.hidden.shape[-1]
        dim = width if call.truncate_dim is None else call.truncate_dim
        gradient = meta(*call.shape, dtype=accumulator(call.hidden.dtype))
        of = drawn.choice([name for name in GRADIENTS_OF if getattr(call, name) is not None])
        try:
            prologue, *others = aot.plan_pool_backward(PoolBackwardCall(call, gradient, gradient, of), device)
            assert prologue.grid == (call.batch * call.queries, 1, 1)
            assert others
            total = call.batch * call.rows if call.padded else call.rows
            for launch in (prologue, *others):
                check_launch(launch, dim)
            if of == "query":  # which is pooled
                (launch,) = others
                assert launch.arguments["QUERIES"] == 1
                assert launch.arguments["COLUMNS"] * launch.grid[1] >= width
                assert launch.arguments["out"].shape == (call.batch, call.queries, width)
                continue
            for launch in others:
                columns, chunk = launch.arguments["COLUMNS"], launch.arguments["chunk"]
                assert launch.grid[0] * chunk >= total > (launch.grid[0] - 1) * chunk
                assert chunk % launch.arguments["TILE_ROWS"] == 0
                written = dim if of != "hidden" or launch is not others[-1] else width
                strips = launch.grid[1]
                assert strips == 1 if of != "hidden" else columns * strips >= written > columns * (strips - 1)
                most = max(16 * device.sm_count, strips)
                assert launch.grid[0] * strips <= most or chunk >= MOST_CHUNK
            assert others[-1].arguments["out"].shape == getattr(call, of).shape
        except AssertionError as error:
            raise AssertionError(f"{described(call)} on {device}") from error


def described(call: PoolCall) -> str:
    given = {name: tuple(value.shape) for name, value in vars(call).items() if isinstance(value, Tensor)}
    return f"{call.mode} {call.hidden.dtype} {given} dim {call.truncate_dim} strides {call.hidden.stride()}"
