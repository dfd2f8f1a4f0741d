"""How things are timed.

One thread, and the CPU time of that thread, so that other processes of the machine count as little as they can. The
floor and all providers take turns in one loop, so that drift hits all alike. Before every sample a read of a buffer
larger than the last cache evicts the data (a read: lines left dirty by a write would be billed to the next in turn),
then a call on a tiny batch brings the code back, as in a loop that walks over fresh inputs. Every case is built several
times, with other lengths: where in memory a batch happens to lie is worth 10 % of a read.
"""

import gc
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

import fastpool
from cases import Case, build, exact, relative_error
from floor import Floor
from providers import FASTPOOL_PACKED, FASTPOOL_PADDED, Call, Provider
from samples import Outcome, Result, Samples

# The first is the unit.
TINY_CALLS = ("add(a, b)", "mean(hidden, mask)", "mean(hidden, mask, normalize=True)")
# Providers that take longer than this many seconds get fewer rounds a build: they are off by more than their noise.
_SLOW = ((0.25, 1), (0.02, 3))
BUILDS = 3


@dataclass(frozen=True)
class Timer:
    """One that takes turns: what is called before its sample, and the sample, which returns seconds."""

    prime: Callable[[], object]
    sample: Callable[[], float]
    rounds: int


class Bench:
    """The settings of a run: the floor, the buffer that evicts the caches, the rounds for each build of a case."""

    def __init__(self, floor: Floor, cache_bytes: int, rounds: int) -> None:
        self.floor = floor
        self.rounds = rounds
        self.buffer = torch.ones(max(3 * cache_bytes, 64 << 20) // 8, dtype=torch.int64)

    @torch.inference_mode()
    def run(self, case: Case, providers: tuple[Provider, ...]) -> Result:
        torch.set_num_threads(1)
        torch.compiler.reset()  # each shape is compiled for itself, without the memory of an earlier one
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        errors: defaultdict[str, list[float]] = defaultdict(list)
        failures: dict[str, str] = {}
        for seed in range(BUILDS):
            batch, small = build(case, seed), build(Case(2, 4, case.width, case.dtype, False))
            expected = exact(batch)
            timers = {
                name: Timer(partial(read, small.packed), partial(read, batch.packed), self.rounds)
                for name, read in self.floor.readers.items()
            }
            for provider in providers:
                try:
                    prime, call = provider.prepare(small), provider.prepare(batch)
                    prime()
                    errors[provider.name].append(relative_error(call(), expected))
                except Exception as error:  # a peer that cannot run here is a line of the report, not the end of it
                    failures[provider.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                slow = _cpu_seconds(call)
                rounds = next((min(few, self.rounds) for limit, few in _SLOW if slow > limit), self.rounds)
                timers[provider.name] = Timer(prime, partial(_cpu_seconds, call), rounds)
            self._take_turns(timers, seconds)
        samples = {name: Samples(tuple(taken)) for name, taken in seconds.items()}
        outcomes = {
            provider.name: Outcome(failure=failures[provider.name])
            if provider.name in failures
            else Outcome(samples[provider.name], torch.tensor(errors[provider.name]).max().item())  # NaN stays NaN
            for provider in providers
        }
        reader = min(self.floor.readers, key=lambda name: samples[name].median)
        return Result(case, batch.real_bytes, reader, samples[reader], outcomes)

    def _take_turns(self, timers: dict[str, Timer], seconds: defaultdict[str, list[float]]) -> None:
        names = list(timers)
        with no_collection():
            for turn in range(self.rounds):
                first = turn % len(names)  # nobody starts every round
                for name in names[first:] + names[:first]:
                    if turn < timers[name].rounds:
                        self.floor.read(self.buffer)
                        timers[name].prime()
                        seconds[name].append(timers[name].sample())

    @torch.inference_mode()
    def threads(self, case: Case, rounds: int) -> dict[str, dict[int, float]]:
        """Seconds of wall time on one and on two threads, the best of all rounds: what it takes with both cores free.

        torch.sum of the same bytes stands beside fastpool, since memory may not give two cores twice the speed.
        """
        batch = build(case)
        calls: dict[str, Call] = {
            "torch.sum": batch.packed.view(-1).view(torch.int64).sum,
            FASTPOOL_PADDED.name: FASTPOOL_PADDED.prepare(batch),
            FASTPOOL_PACKED.name: FASTPOOL_PACKED.prepare(batch),
        }
        taken: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in calls}
        with no_collection():
            for _ in range(rounds):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    for name, call in calls.items():
                        self.buffer.sum()  # on these threads: evicts every core's caches and leaves the workers awake
                        start = time.perf_counter()
                        call()
                        taken[name][threads].append(time.perf_counter() - start)
        torch.set_num_threads(1)
        return {
            name: {threads: min(seconds) for threads, seconds in by_threads.items()}
            for name, by_threads in taken.items()
        }


def tiny(repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of a call from Python on 1 x 16 x 384 float32, caches warm, the best of many; by mode, by call."""
    torch.set_num_threads(1)
    inputs = {"hidden": torch.randn(1, 16, 384), "mask": torch.ones(1, 16, dtype=torch.int64)}
    names = {"add": torch.add, "mean": fastpool.mean, "a": torch.randn(4), "b": torch.randn(4), **inputs}
    timers = {call: timeit.Timer(call, globals=names) for call in TINY_CALLS}
    results = {}
    for label, inference in (("inference mode", True), ("gradients on", False)):
        best = dict.fromkeys(timers, float("inf"))
        with torch.inference_mode(inference):
            for _ in range(repeats):
                for call, timer in timers.items():
                    best[call] = min(best[call], timer.timeit(2000) / 2000 * 1e6)
        results[label] = best
    return results


def _cpu_seconds(call: Call) -> float:
    start = time.thread_time()
    result = call()
    seconds = time.thread_time() - start
    del result  # freed after the clock has stopped
    return seconds


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
