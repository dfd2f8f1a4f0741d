"""What a call on CUDA tensors launches, counts in and allocates, shown by the CUDA sources compiled for a CPU
(tests/cpp/cuda_host). Whatever a launch leaves in its counters, the next one finds zeros: the host build checks them
before it runs a block."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cuda_host import Host, native, own
from torch import Tensor

from fastpool.calls import accumulator
from fastpool.testing import DTYPES, same_bits, variants

KEPT_STREAMS, KEPT_COUNTERS = 64, 1 << 14  # as in csrc/cuda/kernels.h
SKIPPED = 100  # a device where nothing runs, so that no counters are cleared either
SPLIT = {"hidden": torch.randn(3, 300, 8, generator=torch.Generator().manual_seed(1))}  # by host.tune(split=32)


def spent(host: Host, mode: str, arguments: dict[str, Any], **more: Any) -> tuple[int, int]:
    """Kernels and memsets of a call, whose result must be right."""
    control = host.control
    before = control.launches, control.memsets
    result = host(mode, arguments, **more)
    launches, memsets = control.launches - before[0], control.memsets - before[1]
    assert same_bits(result, native(mode, arguments, **more)), (mode, more)
    return launches, memsets


def temporaries(host: Host, mode: str, arguments: dict[str, Any], **more: Any) -> int:
    """Bytes that a call allocates besides its result. Nothing runs, so that sizes may be large."""
    before = host.control.allocated
    host.control.device = SKIPPED
    host.c.cuda_host_skip_launches(1)
    result: Tensor = host(mode, arguments, **more)
    host.c.cuda_host_skip_launches(0)
    host.control.device = 0
    return host.control.allocated - before - result.nbytes


def layouts(lengths: list[int], width: int, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """The same texts: padded, with cu_seqlens, with starts and ends."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(sum(lengths), width, generator=generator).to(dtype)
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    padded = rows.new_full((len(lengths), max(lengths), width), torch.nan)
    for row, text in zip(padded, rows.split(lengths), strict=True):
        row[: len(text)] = text
    yield {"hidden": padded, "ends": torch.tensor(lengths)}
    yield {"hidden": rows, "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends])}
    yield {"hidden": rows, "starts": starts, "ends": ends}


@pytest.mark.parametrize(("mode", "given"), variants())
def test_tiny_batches_are_one_kernel(host: Host, mode: str, given: str | None) -> None:
    """Without memory besides, unless texts may overlap: then each might be as long as all, and is split."""
    for lengths in ([16] * 32, [3, 0, 16, 9]):
        for arguments in layouts(lengths, 384, torch.bfloat16):
            arguments |= own(given, arguments["hidden"])
            assert spent(host, mode, arguments, normalize=True) == (1, 0), arguments.keys()
            if "starts" not in arguments:
                assert temporaries(host, mode, arguments, normalize=True) == 0, arguments.keys()


@pytest.mark.parametrize(("mode", "given"), variants())
def test_split_batches_are_one_kernel(host: Host, mode: str, given: str | None) -> None:
    """From a stream's first call on. cls and last are never split."""
    for arguments in layouts([500, 2000, 0, 33], 64):
        arguments |= own(given, arguments["hidden"])
        for split in (32, 0):
            host.tune(split)
            assert spent(host, mode, arguments, normalize=True) == (1, 0), arguments.keys()


@pytest.mark.parametrize(
    ("mode", "given", "of", "kernels"),
    [
        ("mean", None, "hidden", 2),
        ("weighted_mean", "weights", "weights", 2),
        ("softmax_mean", "scores", "scores", 3),
        ("attention", "query", "hidden", 3),
        ("attention", "query", "query", 3),
    ],
)
def test_kernels_of_a_gradient(host: Host, mode: str, given: str | None, of: str, kernels: int) -> None:
    """What segments share, and who gets it; of a softmax its totals come before, added up as in pooling."""
    for arguments in layouts([100, 70], 72):
        arguments |= own(given, arguments["hidden"])
        for split in (32, 0):
            host.tune(split=split)
            result = host(mode, arguments, out_dtype=accumulator(arguments["hidden"].dtype))
            before = host.control.launches
            host.backward(mode, arguments, torch.ones_like(result), result, of)
            assert host.control.launches - before == kernels


def test_a_norm_over_strips_is_a_second_kernel(host: Host) -> None:
    for arguments in layouts([100, 70], 72):
        host.tune(split=32, strip=128)  # 32 columns
        assert spent(host, "mean", arguments) == (1, 0)
        assert spent(host, "mean", arguments, normalize=True) == (2, 0)


def test_batches_of_any_size_take_turns(host: Host) -> None:
    """What a launch clears is as much as the one before it used, whatever its own size."""
    for units in (3, 200, 1, 2, 77, 1, 300, 300, 2):
        hidden = torch.randn(2, units * 32 + 5, 8)
        for arguments in ({"hidden": hidden}, {"hidden": hidden.flatten(0, 1), "cu_seqlens": torch.tensor([0, 7, 70])}):
            host.tune(split=32)
            assert spent(host, "mean", arguments) == (1, 0), units


def test_a_batch_of_more_segments_than_counters_are_kept(host: Host) -> None:
    """Clears memory of its own."""
    for segments, memsets in ((KEPT_COUNTERS - 3, 0), (KEPT_COUNTERS + 1, 1), (KEPT_COUNTERS - 3, 0)):
        ends = torch.arange(segments + 1).clamp(max=100)
        host.tune(split=32, threads=32)
        assert spent(host, "sum", {"hidden": torch.ones(100, 1), "cu_seqlens": ends}) == (1, memsets), segments


def test_streams_count_apart(host: Host) -> None:
    """Also those of other devices, under the same handles; those that come when all buffers are taken clear memory of
    their own."""
    host.tune(split=32)
    for device, streams in ((1, KEPT_STREAMS + 2), (2, 2)):
        host.control.device = device
        for _ in range(3):
            for stream in range(streams):
                host.control.stream = 16 * stream or None
                memsets = int(stream >= KEPT_STREAMS)
                assert spent(host, "mean", SPLIT) == (1, memsets), (device, stream)


def test_what_may_run_at_once_shares_no_counters(host: Host) -> None:
    """Launches of several streams and devices, and a captured one, whose graph may be replayed beside any of them."""
    host.tune(split=32)
    control = host.control
    kept: dict[tuple[int, int | None], set[int]] = {}
    for control.device, control.stream in [(3, None), (3, 16), (3, 32), (4, None), (4, 16)] * 2:
        for _ in range(2):
            assert spent(host, "mean", SPLIT) == (1, 0)
            kept.setdefault((control.device, control.stream), set()).update((control.arrived, control.stale))
    everything = set.union(*kept.values())
    assert [len(buffers) for buffers in kept.values()] == [2] * 5
    assert len(everything) == 10
    control.capturing = True
    for control.stream in (None, 16, 2):
        assert spent(host, "mean", SPLIT) == (1, 1)
        assert control.arrived not in everything
        assert control.stale is None


@pytest.mark.parametrize("stream", [None, 16, 2])
def test_a_capture_counts_in_memory_of_its_own(host: Host, stream: int | None) -> None:
    """That the graph clears at each replay; so does the one handle that stands for many streams, 2. What the stream
    keeps is as it was."""
    host.tune(split=32)
    host.control.stream = stream
    kept = (1, 0) if stream != 2 else (1, 1)
    for capturing in (False, True, False, True, True, False):
        host.control.capturing = capturing
        assert spent(host, "mean", SPLIT) == ((1, 1) if capturing else kept), capturing


def test_a_launch_that_fails(host: Host) -> None:
    """Counts nothing and clears nothing, so the turn is still its own."""
    for failures in (1, 2, 3):
        host.tune(split=32)
        assert spent(host, "mean", SPLIT) == (1, 0)
        for _ in range(failures):
            host.control.fail_next = True
            with pytest.raises(RuntimeError, match="fastpool: CUDA says"):
                host("mean", SPLIT)
        for _ in range(3):
            assert spent(host, "mean", SPLIT) == (1, 0)


def test_decreasing_cu_seqlens_spoil_no_later_call(host: Host) -> None:
    """They leave counters anywhere, and rows that nobody would write."""
    hidden = torch.randn(300, 24, generator=torch.Generator().manual_seed(3))
    good = {"hidden": hidden, "cu_seqlens": torch.tensor([0, 100, 130, 290, 300])}
    for cu in ([0, 300, 0, 300, 0], [300, 200, 100, 50, 0], [0, 250, 30, 280, 10], [100, 300, 299, 300, 0]):
        for strip in (0, 32):
            for normalize in (False, True):
                host.tune(split=32, strip=strip)
                spoiled = host("mean", {"hidden": hidden, "cu_seqlens": torch.tensor(cu)}, normalize=normalize)
                assert not spoiled.isnan().any(), cu
                for _ in range(3):
                    kernels = 2 if strip and normalize else 1
                    assert spent(host, "mean", good, normalize=normalize) == (kernels, 0), cu


def test_threads_share_a_stream(host: Host) -> None:
    """One at a time chooses a buffer and launches."""
    host.tune(split=32)
    expected = native("mean", SPLIT)
    wrong: list[Any] = []

    def call() -> None:
        try:
            for _ in range(60):
                result = host("mean", SPLIT)
                if not same_bits(result, expected):
                    wrong.append(result)
        except RuntimeError as error:
            wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temporaries(host: Host, dtype: torch.dtype) -> None:
    """None for batches of short texts that cannot overlap; else of the order of the result, and for long texts a small
    share of hidden."""
    size = 8 if dtype == torch.float64 else 4  # of the accumulator
    for batch, rows, width in ((32, 16, 96), (1, 1, 4096), (4, 40, 128)):
        for arguments in layouts([rows] * batch, width, dtype):
            if "starts" in arguments:
                continue
            assert temporaries(host, "mean", arguments, normalize=True) == 0, (batch, rows, width)
    for batch, rows, width in ((4, 9000, 256), (1, 33_000, 128), (1000, 40, 256)):
        hidden = torch.empty(batch * rows, width, dtype=dtype)
        result = batch * width * size
        for arguments in (
            {"hidden": hidden.view(batch, rows, width)},
            {"hidden": hidden, "cu_seqlens": torch.arange(batch + 1) * rows},
        ):
            used = temporaries(host, "mean", arguments, normalize=True)
            assert used <= 1.1 * result + hidden.nbytes / 32, (batch, rows, width, used)
