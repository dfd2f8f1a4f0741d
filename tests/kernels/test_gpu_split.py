"""Long segments are split, and their parts meet in counters that calls share: whatever ran before, beside or in
between, a call gives the CPU's bits. Only a GPU can show it."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from helpers.on_gpu import DEVICE, MARKS, all_moved, captured, seen
from torch import Tensor

import fastpool
from benchmarks.gpu import Gpu
from fastpool.testing import LAYOUTS, same_bits, sequences

pytestmark = MARKS

# Few counters and many, in turn: more than the call before had, and fewer. Something of each is split.
LENGTHS = ([5000, 1, 3000, 700], [20_000, 40, 0, 9000], [3000], [700, 33, 64] * 12, [2500, 2500])
SPLIT_LAYOUTS = ("packed", "padded_lengths", "packed_shuffled")


class Split:
    """A batch on the GPU, and its means by the CPU."""

    def __init__(self, layout: str, lengths: list[int], seed: int = 0) -> None:
        arguments = LAYOUTS[layout].make(sequences(lengths, 256, torch.bfloat16, seed=seed), False)
        with fastpool.backend("native"):
            self.expected = fastpool.mean(**arguments, normalize=True)
        self.arguments: dict[str, Any] = all_moved(arguments)

    def __call__(self) -> Tensor:
        return fastpool.mean(**self.arguments, normalize=True)

    def is_right(self, result: Tensor) -> bool:
        return same_bits(result.cpu(), self.expected)


def warm(*calls: Split) -> None:
    for call in calls:
        call()
    torch.cuda.synchronize()


@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_calls_of_any_size_follow_each_other(backend: str, layout: str) -> None:
    calls = [Split(layout, lengths) for lengths in LENGTHS]
    order = random.Random(0).choices(calls, k=100)
    for call, result in [(call, call()) for call in order]:
        assert call.is_right(result)


def test_many_streams_at_once(backend: str) -> None:
    """Whoever comes last finishes a segment: of its own call, not of another stream's."""
    calls = [Split("packed", lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    warm(*calls)
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for turn in range(40):
        for i, stream in enumerate(streams):
            call = calls[(turn + i) % len(calls)]
            with torch.cuda.stream(stream):
                results.append((call, call()))
    torch.cuda.synchronize()
    assert all(call.is_right(result) for call, result in results)


def test_graphs_on_other_streams_beside_eager_calls(backend: str) -> None:
    """A graph may be replayed on any stream, and runs beside what is called where it was captured."""
    calls = [Split(layout, lengths) for layout, lengths in zip(SPLIT_LAYOUTS, LENGTHS, strict=False)]
    warm(*calls)
    graphs = [(call, *captured(call), torch.cuda.Stream()) for call in calls]
    torch.cuda.synchronize()
    results = []
    for turn in range(40):
        for call, graph, memory, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
                results.append((call, memory.clone()))
        call = calls[turn % len(calls)]
        results.append((call, call()))
    torch.cuda.synchronize()
    assert all(call.is_right(result) for call, result in results)


def test_one_graph_on_one_stream_after_another(backend: str) -> None:
    """A graph's counters are clear at each replay, whichever stream the one before was on."""
    call = Split("packed", LENGTHS[0])
    warm(call)
    graph, memory = captured(call)
    for stream in [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()] * 3:
        stream.synchronize()
        with torch.cuda.stream(stream):
            memory.fill_(torch.nan)
            graph.replay()
            eager = call()
        stream.synchronize()
        assert call.is_right(memory)
        assert call.is_right(eager)


POISONS = ([0, 4000, 30, 2**31 - 1, 8701], [8701, 5001, 5000, 1, 0], [70, 8000, 8000, 69, -5], [0, 8771, 0, 8771, 0])


def test_graphs_that_torch_captures(backend: str) -> None:
    """torch.compile runs a call once with memory of the graph-to-be, then captures it, then replays it: what is kept
    from one call to the next must not be of that memory, and eager calls in between must not disturb it."""
    call, eager = Split("padded_lengths", [5000, 1, 3000]), Split("packed", LENGTHS[0])

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def embed(hidden: Tensor, lengths: Tensor) -> Tensor:
        return fastpool.mean(hidden, lengths=lengths, normalize=True)

    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        assert call.is_right(embed(**call.arguments))
        assert eager.is_right(eager())


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_cu_seqlens_that_runs_backwards_poisons_nothing(backend: str, graph: bool, times: int) -> None:
    """It is promised no result, but counters that do not come out must not be another call's."""
    call, other = Split("packed", LENGTHS[0]), Split("packed", LENGTHS[1])
    warm(call, other)
    replayed, memory = captured(call) if graph else (None, None)

    def run() -> Tensor:
        if replayed is None or memory is None:
            return call()
        memory.fill_(torch.nan)
        replayed.replay()
        return memory

    cu_seqlens = call.arguments["cu_seqlens"]
    good = cu_seqlens.clone()
    for poison in POISONS:
        cu_seqlens.copy_(torch.tensor(poison, dtype=torch.int32))
        for _ in range(times):
            run()
        cu_seqlens.copy_(good)
        for _ in range(4):
            assert call.is_right(run()), poison
            assert other.is_right(other()), poison


DECREASING = ([0, 4000, 30, 2**31 - 1, 8701], [9000, 5001, 5000, 1, 0], [0, 9000, 0, 9000, 0], [0, 9000] * 40)


@pytest.mark.sanitized
def test_nothing_else_is_read_or_written(backend: str) -> None:
    """Whatever cu_seqlens say. (Without a graph: torch captures none where tools have every tensor allocated apart.)"""
    hidden = torch.zeros(9000, 64, device=DEVICE)
    for poison in DECREASING:
        result = fastpool.mean(hidden, cu_seqlens=torch.tensor(poison, device=DEVICE))
        assert result.isfinite().all(), poison


def test_no_row_is_as_the_memory_was(backend: str) -> None:
    """Where cu_seqlens decrease, some segments are found by nobody: their rows are zeros."""
    hidden = torch.zeros(9000, 64, device=DEVICE)
    for poison in DECREASING:
        cu_seqlens = torch.tensor(poison, device=DEVICE)
        graph, result = captured(lambda cu_seqlens=cu_seqlens: fastpool.mean(hidden, cu_seqlens=cu_seqlens))
        result.fill_(7.0)
        graph.replay()
        assert not (result == 7.0).any(), poison


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_split_and_merged(backend: str, layout: str) -> None:
    """A few, for tools that look at every access."""
    call = Split(layout, [700, 3, 0, 300])
    for _ in range(3):
        assert call.is_right(call())


def test_two_threads_on_one_stream(backend: str) -> None:
    """Choosing counters and launching are one step, or somebody has counters of his own."""
    calls = [Split("packed", lengths) for lengths in LENGTHS]
    stream, together = torch.cuda.Stream(), Barrier(2, timeout=60)
    with torch.cuda.stream(stream):
        warm(*calls)

    def work(first: int) -> list[tuple[Split, Tensor]]:
        order = [calls[(first + n) % len(calls)] for n in range(200)]
        with fastpool.backend(backend), torch.cuda.stream(stream):
            together.wait()
            return [(call, call()) for call in order]

    with ThreadPoolExecutor(2) as threads:
        results = [pair for done in threads.map(work, (0, 2)) for pair in done]
    stream.synchronize()
    assert all(call.is_right(result) for call, result in results)


def test_the_per_thread_default_stream(backend: str) -> None:
    """One handle for as many streams as there are threads."""
    calls = [Split("packed", lengths) for lengths in LENGTHS]
    torch.cuda.synchronize()
    stream = torch.cuda.ExternalStream(2)
    with torch.cuda.stream(stream):
        results = [(call, call()) for call in calls * 5]
    stream.synchronize()
    assert all(call.is_right(result) for call, result in results)


FAILED = """
from contextlib import suppress
import torch, fastpool

hidden = torch.randn(9000, 256, device="cuda")
cu_seqlens = torch.tensor([0, 5000, 5001, 9000], device="cuda")
def call(): return fastpool.mean(hidden, cu_seqlens=cu_seqlens)

torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    expected = [call() for _ in range(3)][0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    with suppress(RuntimeError):
        torch.cuda.synchronize()  # not allowed: from here to the end of the capture every launch fails
    try:
        call()
    except RuntimeError as error:
        print("failed:", error)
    with suppress(RuntimeError):
        graph.capture_end()
    assert all(torch.equal(call(), expected) for _ in range(4))
print("right")
"""


def test_after_a_launch_that_failed(backend: str) -> None:
    """In a process of its own: what a broken capture leaves behind in torch is no other test's."""
    environment = {**os.environ, "FASTPOOL_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", FAILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("failed:")
    assert done.stdout.endswith("right\n")


# ---- what a split call costs


@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_a_split_call_is_one_launch(backend: str, layout: str) -> None:
    """Once its stream has counters. In a graph it is two: there they are the call's own, and cleared each time."""
    calls = [Split(layout, lengths) for lengths in LENGTHS]
    for _ in range(2):  # there are two buffers, and each grows
        warm(*calls)
    gpu = Gpu()
    for call in calls:
        assert seen(gpu.launches_outside_graphs(call)) == 1
        assert seen(gpu.launches(call)) in (1, 2)


def test_counters_stay_small(backend: str) -> None:
    """However many calls there were, a stream keeps counters for its largest one."""
    call = Split("packed", [20_000, 40, 0, 9000])
    warm(*[call] * 4)
    before = torch.cuda.memory_allocated()
    warm(*[call] * 50)
    assert torch.cuda.memory_allocated() <= before
