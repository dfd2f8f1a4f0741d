"""How things are timed on a CPU.

One thread, and the CPU time of that thread, so that other processes of the machine count as little as they can. Before
every sample a read of a buffer larger than the last cache evicts the data (a read: lines left dirty by a write would be
billed to the next in turn), then a call on a tiny batch brings the code back, as in a loop that walks over fresh
inputs. Every case is built several times: where in memory a batch happens to lie is worth 10 % of a read.
"""

import math
import resource
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial

import torch

import fastpool
from benchmarks.bandwidth_cpu import build_floor
from benchmarks.case_results import Result
from benchmarks.cases import Batch, Case, build
from benchmarks.machine import last_cache_bytes
from benchmarks.measure import Run, Turn, no_collection
from benchmarks.providers import FASTPOOL, Call, Provider
from fastpool.demo.measure import peak_bytes

# Calls that take longer than this many seconds get fewer rounds a build: they are off by more than their noise.
_SLOW = ((0.1, 1), (0.02, 2))
# The first is the unit.
TINY_CALLS = ("add(a, b)", "mean(hidden, mask)", "mean(hidden, mask, normalize=True)")
# One long text, which has to be cut for two threads, and a batch, which falls into two halves by itself.
_THREAD_CASES = (Case(8192, 1, 4096), Case("chunks", 32, 768, "fp32"))


class Cpu:
    """`rounds`: for each build of a case. `deadline` (of time.monotonic) is when peers are left out."""

    device = torch.device("cpu")
    builds = 3

    def __init__(self, rounds: int, deadline: float = math.inf) -> None:
        torch.set_num_threads(1)
        self.rounds, self.deadline, self.floor = rounds, deadline, build_floor()
        self.buffer = torch.ones(max(3 * last_cache_bytes(), 64 << 20) // 8, dtype=torch.int64)

    @property
    def method(self) -> list[str]:
        return [
            f"CPU time of one thread, microseconds, median of {self.builds} x {self.rounds} rounds in turn (slow ones "
            "fewer); all normalise; compiling is not timed.",
            f"Before each sample: read {self.buffer.nbytes >> 20} MiB (data cold), one tiny call (code warm). "
            f"read: {self.floor.note}, over the real tokens.",
        ]

    def beside(self, case: Case, batch: Batch) -> list[Batch]:
        return [build(Case(4, 2, case.width, case.dtype), self.device)]

    def readers(self, batches: Sequence[Batch]) -> list[Turn]:
        batch, small = batches
        return [
            Turn(name, self.rounds, self.sample("read", partial(read, small.packed), partial(read, batch.packed)))
            for name, read in self.floor.readers.items()
        ]

    def turns(self, provider: Provider, calls: Sequence[Run], result: Result) -> list[Turn]:
        call, small = calls
        small()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        slow = cpu_seconds(call)
        result.outcomes[provider.name].page_faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        rounds = next((min(few, self.rounds) for limit, few in _SLOW if slow > limit), self.rounds)
        sample = self.sample("cpu", small, lambda: cpu_seconds(call))
        return [Turn(provider.name, rounds, sample, provider.backend)]

    def sample(self, column: str, prime: Run, seconds: Callable[[], float]) -> Callable[[], dict[str, float]]:
        def sample() -> dict[str, float]:
            self.floor.read(self.buffer)
            prime()
            return {column: seconds()}

        return sample

    def temporary_bytes(self, call: Call) -> int:
        return max(0, peak_bytes(call) - call().nbytes)

    def seconds(self, call: Run) -> float:
        """CPU time of one thread; the median of samples of a millisecond or more."""
        taken = max(cpu_seconds(call), 1e-6)
        calls = max(1, int(1e-3 / taken))
        rounds = max(3, min(31, int(1 / (taken * calls))))
        return statistics.median(cpu_seconds(lambda: [call() for _ in range(calls)]) / calls for _ in range(rounds))

    def free(self) -> None:
        pass

    @torch.inference_mode()
    def threads(self, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds of wall time on one and on two threads, the best of all rounds: what it takes with both cores
        free; by case, by call. torch.sum of the same bytes stands beside fastpool, since memory may not give two cores
        twice the speed."""
        return {case.name: self._threads(case, rounds) for case in _THREAD_CASES}

    def _threads(self, case: Case, rounds: int) -> dict[str, dict[str, float]]:
        batch = build(case, self.device)
        calls: dict[str, Call] = {"torch.sum": batch.packed.view(-1).view(torch.int64).sum}
        calls |= {provider.name: provider.prepare(batch, True) for provider in FASTPOOL if provider.backend == "native"}
        best = {name: {"1": math.inf, "2": math.inf} for name in calls}
        with no_collection():
            for _ in range(rounds):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    for name, call in calls.items():
                        self.buffer.sum()  # on these threads: evicts every core's caches and leaves the workers awake
                        start = time.perf_counter()
                        call()
                        taken = 1e3 * (time.perf_counter() - start)
                        best[name][str(threads)] = min(best[name][str(threads)], taken)
        torch.set_num_threads(1)
        return best


def tiny(repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of a call from Python on 1 x 16 x 384 float32, caches warm, the best of many; by mode, by call."""
    inputs = {"hidden": torch.randn(1, 16, 384), "mask": torch.ones(1, 16, dtype=torch.int64)}
    names = {"add": torch.add, "mean": fastpool.mean, "a": torch.randn(4), "b": torch.randn(4), **inputs}
    timers = {call: timeit.Timer(call, globals=names) for call in TINY_CALLS}
    results = {}
    for label, inference in (("inference mode", True), ("gradients on", False)):
        best = dict.fromkeys(timers, math.inf)
        with torch.inference_mode(inference):
            for _ in range(repeats):
                for call, timer in timers.items():
                    best[call] = min(best[call], timer.timeit(2000) / 2000 * 1e6)
        results[label] = best
    return results


def cpu_seconds(call: Run) -> float:
    start = time.thread_time()
    result = call()
    seconds = time.thread_time() - start
    del result  # freed after the clock has stopped
    return seconds
