"""What only a GPU can show: either backend gives the CPU's bits, in graphs, on streams, and never waits."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.on_gpu import (
    BACKENDS,
    DEVICE,
    MARKS,
    all_moved,
    assert_a_graph_sees_new_lengths,
    batches,
    moved,
    seen,
    waits,
)
from torch import Tensor

import fastpool
from benchmarks.gpu import Gpu
from benchmarks.targets import allowance
from fastpool.modes import MODES
from fastpool.testing import DTYPES, LAYOUTS, function_of, required, same_bits, sequences, special_values, variants

pytestmark = MARKS

# Short, empty and split segments; one that is split by itself; rows of many columns and of one.
SHAPES = (
    ([1, 40, 0, 700, 33, 64, 5, 2000, 96, 31], 200),
    ([5000], 136),
    ([3, 129, 17], 4096),
    ([260, 2], 1),
)


def pool(mode: str, arguments: dict[str, Any], device: str | None = None, **more: Any) -> Tensor:
    """By the GPU."""
    return function_of(mode)(**all_moved(arguments, device), **more)


def expected(mode: str, arguments: dict[str, Any], **more: Any) -> Tensor:
    """By the CPU."""
    with fastpool.backend("native"):
        return function_of(mode)(**arguments, **more)


# ---- the same bits


def test_what_is_expected_is_right() -> None:
    """All others compare with the CPU's kernels, and this machine's CPU may take some that no other one has taken."""
    for mode, given in variants():
        for dtype in DTYPES:
            arguments = LAYOUTS["padded_left_mask"].make(sequences([70, 1, 0, 200], 67, dtype, holes=True), given)
            with fastpool.backend("reference"):
                right = function_of(mode)(**arguments, normalize=True)
            assert same_bits(expected(mode, arguments, normalize=True), right), (mode, given, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_bits_are_the_cpus(backend: str, mode: str, given: str | None, dtype: torch.dtype) -> None:
    for case, arguments in batches(SHAPES, mode, given, dtype):
        result = pool(mode, arguments, normalize=True)
        assert same_bits(result.cpu(), expected(mode, arguments, normalize=True)), case


@pytest.mark.sanitized
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(backend: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    arguments = LAYOUTS["packed_mask"].make(sequences([70, 5, 1000], 130, dtype, holes=True), False)
    for more in ({"truncate_dim": 77}, {"truncate_dim": 64, "normalize": True}, {}):
        result = pool("mean", arguments, out_dtype=out_dtype, **more)
        assert same_bits(result.cpu(), expected("mean", arguments, out_dtype=out_dtype, **more)), more


@pytest.mark.parametrize("layout", ["padded_right_mask", "padded_lengths", "packed", "packed_shuffled"])
def test_a_batch_does_not_matter(backend: str, layout: str) -> None:
    """A sequence alone, first, last and among hundreds: other splits, other grids, the same bits."""
    for n in (30, 333, 4000):
        one, *others = sequences([n] + [i % 90 for i in range(300)], 384, torch.bfloat16)
        alone = expected("mean", LAYOUTS["packed"].make([one], False), normalize=True)[0]
        for before, after in ((0, 0), (0, 300), (300, 0), (7, 2)):
            batch = [*others[:before], one, *others[before : before + after]]
            result = pool("mean", LAYOUTS[layout].make(batch, False), normalize=True)
            assert same_bits(result[before].cpu(), alone), (n, before, after)


@pytest.mark.parametrize("mode", MODES)
def test_special_values(backend: str, mode: str) -> None:
    hidden = special_values(6, 300, 90)
    arguments = {"hidden": hidden, **required(mode, hidden.shape)}
    for normalize in (False, True):
        result = pool(mode, arguments, normalize=normalize)
        assert same_bits(result.cpu(), expected(mode, arguments, normalize=normalize)), normalize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(backend: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 211, 130, dtype=torch.float64) * 3).to(dtype).transpose(0, 1)
    wide = torch.randn(4, 20_001, dtype=torch.float64).to(dtype)
    for one, truncate_dim, eps in ((x, None, 1e-12), (x, 77, 20.0), (wide, None, 1e-12)):
        result = fastpool.l2_normalize(moved(one), truncate_dim=truncate_dim, eps=eps)
        with fastpool.backend("native"):
            assert same_bits(result.cpu(), fastpool.l2_normalize(one, truncate_dim=truncate_dim, eps=eps)), (
                one.shape,
                truncate_dim,
            )


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize_dims(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for width in (130, 384, 9000):
        x = torch.randn(5, 7, width, dtype=torch.float64, generator=generator).to(dtype)
        truncate_dims = torch.randint(0, width + 1, (7, 5), generator=generator).T
        x = torch.where(torch.arange(width) < truncate_dims[..., None], x, torch.nan)
        for view, index in (
            (x, truncate_dims.int()),
            (x.transpose(0, 1), truncate_dims.T),
            (x[0, 0], truncate_dims[0, 0]),
        ):
            result = fastpool.l2_normalize(moved(view), truncate_dims=moved(index))
            with fastpool.backend("native"):
                assert same_bits(result.cpu(), fastpool.l2_normalize(view, truncate_dims=index)), width


@pytest.mark.sanitized
def test_dims_outside_are_clamped(backend: str) -> None:
    far = 2**62
    x, truncate_dims = torch.randn(6, 48), torch.tensor([-5, 0, 49, far, -far, 7])
    with fastpool.backend("native"):
        wanted = fastpool.l2_normalize(x, truncate_dims=truncate_dims.clamp(0, 48))
    assert same_bits(fastpool.l2_normalize(moved(x), truncate_dims=moved(truncate_dims)).cpu(), wanted)


def test_dims_are_one_launch_and_nobody_waits(backend: str) -> None:
    x = torch.randn(64, 1024, device=DEVICE)
    truncate_dims = torch.randint(1, 1025, (64,), device=DEVICE)

    def call() -> Tensor:
        return fastpool.l2_normalize(x, truncate_dims=truncate_dims)

    call()
    assert seen(Gpu().launches(call)) == 1
    assert not waits(call)


@pytest.mark.sanitized
def test_rows_wider_than_a_program(backend: str) -> None:
    arguments = LAYOUTS["packed"].make(sequences([300, 3], 20_000, torch.bfloat16), False)
    assert same_bits(pool("mean", arguments, normalize=True).cpu(), expected("mean", arguments, normalize=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 0, 8)])
def test_nothing_to_pool(backend: str, shape: tuple[int, int, int]) -> None:
    assert same_bits(pool("mean", {"hidden": torch.ones(shape)}).cpu(), torch.zeros(shape[0], 8))
    packed = {"hidden": torch.ones(0, 8), "cu_seqlens": torch.zeros(shape[0] + 1, dtype=torch.int32)}
    assert same_bits(pool("max", packed).cpu(), torch.zeros(shape[0], 8))


@pytest.mark.large
def test_more_than_2_31_elements(backend: str) -> None:
    rows, width = 175_000, 4096
    batch = sequences([300, 5000, 40], width, torch.bfloat16)
    hidden = torch.full((3, rows, width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    assert hidden.numel() > 2**31
    starts = torch.tensor([0, 77, rows - 40])
    ends = starts + torch.tensor([300, 5000, 40])
    for b, sequence in enumerate(batch):
        hidden[b, starts[b] : ends[b]] = sequence.states.to(DEVICE)
    means = expected("mean", LAYOUTS["packed"].make(batch, False))
    assert same_bits(fastpool.mean(hidden, starts=starts.to(DEVICE), ends=ends.to(DEVICE)).cpu(), means)
    base = torch.arange(3) * rows
    bounds = {"starts": (base + starts).to(DEVICE), "ends": (base + ends).to(DEVICE)}
    assert same_bits(fastpool.mean(hidden.view(-1, width), **bounds).cpu(), means)


# ---- bounds that lie


@pytest.mark.sanitized
def test_bounds_outside_are_clamped(backend: str) -> None:
    """Neither read out of bounds nor an error: the device is not asked."""
    hidden = torch.randn(100, 48)
    far = 2**62
    starts, ends = torch.tensor([-5, 90, 50, 120, 10, -far]), torch.tensor([20, 1000, 40, 130, 10, far])
    clamped = {"starts": starts.clamp(0, 100), "ends": ends.clamp(0, 100).maximum(starts.clamp(0, 100))}
    means = expected("mean", {"hidden": hidden, **clamped})
    assert same_bits(pool("mean", {"hidden": hidden, "starts": starts, "ends": ends}).cpu(), means)
    padded, lengths = hidden.view(4, 25, 48), torch.tensor([-3, 5, 26, 2**31 - 1], dtype=torch.int32)
    means = expected("mean", {"hidden": padded, "lengths": lengths.clamp(0, 25)})
    assert same_bits(pool("mean", {"hidden": padded, "lengths": lengths}).cpu(), means)


def test_validation_where_asked(backend: str) -> None:
    hidden, lengths = torch.ones(2, 5, 8, device=DEVICE), torch.tensor([1, 9], device=DEVICE)
    fastpool.mean(hidden, lengths=lengths)
    fastpool.validate()
    with pytest.raises(ValueError, match=r"lengths must lie between 0 and 5, got lengths\[1\] = 9"):
        fastpool.mean(hidden, lengths=lengths)
    with pytest.raises(ValueError, match="ends must lie between 0 and 5"):
        torch.ops.fastpool.mean(hidden, ends=lengths)
    with pytest.raises(ValueError, match=r"truncate_dims must lie between 0 and 8, got truncate_dims\[1\] = 9"):
        fastpool.l2_normalize(hidden[0, :2], truncate_dims=lengths)
    code = (
        "import torch, fastpool\n"
        "fastpool.mean(torch.ones(9, 8, device='cuda'), cu_seqlens=torch.tensor([0, 5, 3], device='cuda'))"
    )
    environment = {**os.environ, "FASTPOOL_VALIDATE": "1", "FASTPOOL_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: fastpool.mean: cu_seqlens must not decrease" in done.stderr


# ---- streams, graphs, devices


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["mean", "max", "weighted_mean", "last"])
def test_a_graph_sees_new_lengths(backend: str, mode: str, layout: str) -> None:
    """Among them segments that are split."""
    assert_a_graph_sees_new_lengths(layout, 6000, partial(function_of(mode), normalize=True))


def test_work_goes_to_the_current_stream(backend: str) -> None:
    """What is queued there before a call is seen by it, however late; the default stream is not involved."""
    for arguments in (
        LAYOUTS["padded_right_mask"].make(sequences([9, 70], 64, torch.float32), False),
        LAYOUTS["packed"].make(sequences([5000, 3], 64, torch.float32), False),
    ):
        on_gpu = all_moved(arguments)
        fastpool.mean(**on_gpu, normalize=True)
        states = on_gpu["hidden"].clone()
        on_gpu["hidden"].zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            on_gpu["hidden"].copy_(states)
            result = fastpool.mean(**on_gpu, normalize=True)
        stream.synchronize()
        assert same_bits(result.cpu(), expected("mean", arguments, normalize=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_nobody_waits(backend: str, mode: str, given: str | None, layout: str) -> None:
    arguments = all_moved(LAYOUTS[layout].make(sequences([1, 700, 0, 33], 96, torch.bfloat16), given))
    call: Callable[[], Tensor] = partial(function_of(mode), **arguments, normalize=True)
    call()
    assert not waits(call)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend: str) -> None:
    for layout in ("padded_right_mask", "packed"):
        arguments = LAYOUTS[layout].make(sequences([9, 3000], 64, torch.bfloat16), False)
        result = pool("mean", arguments, "cuda:1", normalize=True)
        assert (result.device.index, torch.cuda.current_device()) == (1, 0)
        assert same_bits(result.cpu(), expected("mean", arguments, normalize=True))


# ---- what a call costs


def launches(mode: str, arguments: dict[str, Any]) -> int:
    """Of a call that is captured."""
    call: Callable[[], Tensor] = partial(function_of(mode), **all_moved(arguments), normalize=True)
    call()
    return seen(Gpu().launches(call))


@pytest.mark.parametrize("mode", ["mean", "max", "last", "weighted_mean"])
def test_a_small_call_is_one_launch(backend: str, mode: str) -> None:
    batch = sequences([64, 3, 20, 0, 50, 61, 1, 32], 384, torch.bfloat16)
    for layout in ("padded_right_mask", "padded_lengths", "padded_starts_ends", "packed"):
        assert launches(mode, LAYOUTS[layout].make(batch, False)) == 1, layout


@pytest.mark.parametrize("mode", ["cls", "last"])
def test_a_token_of_a_long_text_is_one_launch(backend: str, mode: str) -> None:
    """Nothing is split where one token is all there is to find."""
    batch = sequences([9000, 3, 700], 384, torch.bfloat16)
    for layout in ("padded_left_mask", "packed"):
        assert launches(mode, LAYOUTS[layout].make(batch, False)) == 1, layout


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("lengths", [[512] * 64, [40] * 64, [8192, 8192]], ids=["512", "40", "8192"])
def test_temporaries(backend: str, lengths: list[int], mode: str) -> None:
    ends = torch.tensor(lengths, device=DEVICE)
    hidden = torch.ones(len(lengths), max(lengths), 1024, dtype=torch.bfloat16, device=DEVICE)
    cu_seqlens = torch.nn.functional.pad(ends.cumsum(0), (1, 0))
    for arguments in ({"hidden": hidden, "ends": ends}, {"hidden": hidden.flatten(0, 1), "cu_seqlens": cu_seqlens}):
        call: Callable[[], Tensor] = partial(getattr(torch.ops.fastpool, mode), **arguments)
        for _ in range(3):  # counters are kept, so a stream's first calls are others
            call()
        assert Gpu().temporary_bytes(call) <= allowance([] if mode == "last" else lengths, 1024), arguments.keys()


# ---- the ways in


def test_compile(backend: str) -> None:
    def embed(hidden: Tensor, mask: Tensor) -> Tensor:
        return fastpool.mean(hidden.relu(), mask, normalize=True)

    compiled = torch.compile(embed, fullgraph=True)
    for shape in ((4, 40, 96), (2, 3000, 96), (7, 11, 96)):
        hidden = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        mask = torch.rand(shape[:2], device=DEVICE) > 0.3
        assert same_bits(compiled(hidden, mask), embed(hidden, mask)), shape


def test_auto_takes_a_kernel() -> None:
    arguments = LAYOUTS["padded_left_mask"].make(sequences([9, 700], 64, torch.float16), False)
    found = fastpool.explain(**all_moved(arguments))
    assert found.backend in BACKENDS
    assert found.reasons["reference"] == f"{found.backend} comes first"
    assert same_bits(pool("mean", arguments).cpu(), expected("mean", arguments))
