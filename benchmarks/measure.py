"""One case after another: every provider checked, then timed in turn with all others.

What is timed on a case takes turns in one loop, so that drift hits all alike. How a sample is taken depends on the
device: timing_cpu.py and timing_cuda.py.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import fastpool
from benchmarks.case_results import Outcome, Result, Spread
from benchmarks.cases import DTYPES, Batch, Case, build, exact, relative_error, reorder
from benchmarks.providers import FASTPOOL, Call, Provider, backend_of, must_move
from benchmarks.targets import allowance
from fastpool.testing import same_bits

Run = Callable[[], object]
OUT_OF_TIME = "out of time"  # of what was left out since it was late


@dataclass(frozen=True)
class Turn:
    """Something to be timed in turn with others: `sample` takes one, and gives seconds per call by column."""

    name: str
    rounds: int
    sample: Callable[[], dict[str, float]]
    backend: str = "auto"


class Device(Protocol):
    """What measuring needs of a machine."""

    device: torch.device
    builds: int  # of each case, at other addresses
    deadline: float  # of time.monotonic: from then on peers are left out

    def beside(self, case: Case, batch: Batch) -> list[Batch]:
        """Further input for the calls of a sample."""

    def readers(self, batches: Sequence[Batch]) -> list[Turn]:
        """Ways to read the first one's real tokens once; column "read"."""

    def turns(self, provider: Provider, calls: Sequence[Run], result: Result) -> list[Turn]:
        """A provider's, with what can be said of its calls without timing them put into its outcome. `calls` are
        those of the batch and of what stands beside it."""

    def temporary_bytes(self, call: Call) -> int:
        """What a call holds at its peak, without what it returns."""

    def seconds(self, call: Run) -> float:
        """What a call takes, again and again on the same data: caches are as warm as they get."""

    def free(self) -> None:
        """Gives back what is not in use, after a case."""


def words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def skipped(case: Case, why: str = "") -> Result:
    """A case of which nothing is measured (yet)."""
    lengths = case.lengths()
    row_bytes = case.width * DTYPES[case.dtype].itemsize
    return Result(
        case=case.name,
        suite=case.suite,
        dtype=case.dtype,
        batch=case.batch,
        width=case.width,
        tokens=sum(lengths),
        longest=max(lengths),
        real_bytes=sum(lengths) * row_bytes,
        padded_bytes=case.batch * (case.rows or max(lengths)) * row_bytes,
        allowance=allowance(lengths, case.width),
        twin=case.twin.name if case.twin else "",
        failure=why,
    )


@torch.inference_mode()
def measure(device: Device, case: Case, providers: Sequence[Provider], timed: bool = True) -> Result:
    """Errors, bits and, where `timed`, times of every provider on one case."""
    torch.compiler.reset()  # each shape is compiled for itself, without the memory of an earlier one
    result = skipped(case)
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    try:
        for seed in range(device.builds if timed else 1):
            _build_and_measure(device, case, seed, providers, timed, result, seconds)
    except Exception as error:  # out of memory, above all: a line of the report, not the end of it
        result.failure = words(error)
    for (name, column), taken in seconds.items():
        spread = Spread.of(taken)
        if column != "read":
            result.outcomes[name].us[column] = spread
        elif result.read is None or spread.median < result.read.median:
            result.reader, result.read = name, spread
    device.free()
    return result


def _build_and_measure(
    device: Device,
    case: Case,
    seed: int,
    providers: Sequence[Provider],
    timed: bool,
    result: Result,
    seconds: defaultdict[tuple[str, str], list[float]],
) -> None:
    batch = build(case, device.device, seed)
    # For texts to have other neighbours and another place.
    order = list(reversed(range(case.batch))) if case.batch > 1 else [0, 0]
    expected, elsewhere = exact(batch), reorder(batch, order)
    batches = [batch, *device.beside(case, batch)] if timed else [batch]
    result.copies = len(batches)
    turns = device.readers(batches) if timed else []
    for provider in providers:
        outcome = result.outcomes.setdefault(provider.name, Outcome(must_move=must_move(provider, batch)))
        if outcome.failure:  # in an earlier build
            continue
        if time.monotonic() > device.deadline and provider not in FASTPOOL:
            outcome.failure = OUT_OF_TIME
            continue
        try:
            with fastpool.backend(provider.backend):
                outcome.backend, outcome.failure = backend_of(provider, batch)
                if outcome.failure:
                    continue
                calls = [provider.prepare(one, True) for one in batches]
                if outcome.same_bits is None:
                    _check(calls[0], provider.prepare(elsewhere, True), expected, order, outcome)
                if timed:
                    if outcome.temporary_bytes is None:
                        outcome.temporary_bytes = device.temporary_bytes(calls[0])
                    turns += device.turns(provider, calls, result)
        except Exception as error:
            outcome.failure = words(error)
    del elsewhere

    def failed(turn: Turn, error: Exception) -> None:
        if turn.name in result.outcomes:
            result.outcomes[turn.name].failure = words(error)

    take_turns(turns, seconds, failed)


def _check(call: Call, elsewhere: Call, expected: Tensor, order: list[int], outcome: Outcome) -> None:
    """A provider's result against float64, and its bits against those at other places."""
    pooled = call()
    del_me = torch.full_like(pooled, torch.nan)  # what is not written is this then, and no earlier result
    del pooled, del_me
    pooled = call()
    outcome.error = relative_error(pooled, expected)
    outcome.same_bits = same_bits(elsewhere(), pooled[order])


def take_turns(
    turns: Sequence[Turn],
    seconds: defaultdict[tuple[str, str], list[float]],
    failed: Callable[[Turn, Exception], None],
) -> None:
    """Adds samples, by name and column. One that fails is out."""
    waiting = dict(enumerate(turns))
    with no_collection():
        for round_ in range(max((turn.rounds for turn in turns), default=0)):
            order = list(waiting)
            first = round_ % max(len(order), 1)  # no turn starts every round
            for i in order[first:] + order[:first]:
                turn = turns[i]
                if round_ >= turn.rounds:
                    continue
                try:
                    with fastpool.backend(turn.backend):
                        sample = turn.sample()
                except Exception as error:
                    del waiting[i]
                    failed(turn, error)
                    continue
                for column, taken in sample.items():
                    seconds[turn.name, column].append(taken)


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
