"""One case after another on a GPU: every provider checked, then timed in turn with all others."""

import time
from collections.abc import Sequence

import torch

import fastpool
from cases import DTYPES, exact, relative_error
from cases_gpu import GpuCase, build, reorder
from fastpool.testing import same_bits
from goals_gpu import SMALL_BYTES, allowance
from gpu import Gpu, Run
from measure_gpu import MOST_COPIES, Turn, copies_of, eager_turn, graph_turn, replay_turn, seconds_of, take_turns
from providers import Call, Provider
from providers_gpu import FASTPOOL, backend_of, must_move
from samples_gpu import Outcome, Result, Spread
from stream_gpu import READERS, reads_all

_TOO_LONG = 0.2  # seconds: such calls are not repeated


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def skipped(case: GpuCase, why: str = "") -> Result:
    """A case of which nothing is measured (yet)."""
    lengths = case.lengths()
    row_bytes = case.width * DTYPES[case.dtype].itemsize
    return Result(
        case=case.name,
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


class GpuBench:
    """The settings of a run; `deadline` (of time.monotonic) is when peers are left out."""

    def __init__(self, gpu: Gpu, rounds: int, deadline: float) -> None:
        self.gpu, self.rounds, self.deadline = gpu, rounds, deadline
        probe = torch.randn(1_000_016, device=gpu.device)  # no multiple of a block
        self.readers = [name for name in READERS if reads_all(name, probe)]

    @torch.inference_mode()
    def limits(self) -> tuple[dict[str, float], dict[str, Spread]]:
        """What the machine gives: GB/s of each reader over 32 times the cache, and an empty kernel."""
        buffer = torch.randn(8 * self.gpu.cache_bytes, device=self.gpu.device)
        turns = []
        for name in self.readers:
            read = READERS[name](buffer)
            seconds = seconds_of(self.gpu, read)
            turns.append(graph_turn(self.gpu, name, [read], seconds, self.rounds))
        call = self.gpu.empty
        seconds = seconds_of(self.gpu, call)
        turns += [
            eager_turn("empty", [call] * MOST_COPIES, seconds, self.rounds),
            graph_turn(self.gpu, "empty", [call] * MOST_COPIES, seconds, self.rounds),
            replay_turn(self.gpu, "empty", [call], self.rounds),
        ]
        taken = take_turns(self.gpu, turns, lambda turn, error: None)
        rates = {name: buffer.nbytes / spread.median / 1e3 for (name, _), spread in taken.items() if name != "empty"}
        return rates, {column: spread for (name, column), spread in taken.items() if name == "empty"}

    @torch.inference_mode()
    def run(self, case: GpuCase, providers: Sequence[Provider]) -> Result:
        torch.compiler.reset()  # each shape is compiled for itself, without the memory of an earlier one
        result = skipped(case)
        try:
            self._measure(case, providers, result)
        except Exception as error:  # out of memory, above all: a line of the report, not the end of it
            result.failure = words(error)
        self.gpu.free()
        return result

    def _measure(self, case: GpuCase, providers: Sequence[Provider], result: Result) -> None:
        batch = build(case, str(self.gpu.device))
        # For sequences to have other neighbours and another place.
        order = list(reversed(range(case.batch))) if case.batch > 1 else [0, 0]
        expected, elsewhere = exact(batch), reorder(batch, order)
        copies = copies_of(batch, self.gpu)
        result.copies = len(copies)
        turns: list[Turn] = []
        for name in self.readers:
            calls = [READERS[name](one.packed) for one in copies]
            turns.append(graph_turn(self.gpu, name, calls, seconds_of(self.gpu, calls[0]), self.rounds, "read"))
        for provider in providers:
            outcome = result.outcomes[provider.name] = Outcome(must_move=must_move(provider, batch))
            if time.monotonic() > self.deadline and provider not in FASTPOOL:
                outcome.failure = "out of time"
                continue
            try:
                with fastpool.backend(provider.backend):
                    outcome.backend, outcome.failure = backend_of(provider, batch)
                    if not outcome.failure:
                        calls = [provider.prepare(one) for one in copies]
                        self._check(calls[0], provider.prepare(elsewhere), expected, order, outcome)
                        self._schedule(provider, calls, result, turns)
            except Exception as error:
                outcome.failure = words(error)
        del elsewhere

        def failed(turn: Turn, error: Exception) -> None:
            if turn.name in result.outcomes:
                result.outcomes[turn.name].failure = words(error)

        taken = take_turns(self.gpu, turns, failed)
        for (name, column), spread in taken.items():
            if column != "read":
                result.outcomes[name].us[column] = spread
            elif result.read is None or spread.median < result.read.median:
                result.reader, result.read = name, spread

    def _check(self, call: Call, elsewhere: Call, expected: torch.Tensor, order: list[int], outcome: Outcome) -> None:
        """A provider's result against float64, and its bits against those at other places."""
        pooled = call()
        outcome.error = relative_error(pooled, expected)
        outcome.same_bits = same_bits(elsewhere(), pooled[order])
        del pooled
        outcome.temporary_bytes = self.gpu.temporary_bytes(call)

    def _schedule(self, provider: Provider, calls: Sequence[Run], result: Result, turns: list[Turn]) -> None:
        gpu, name, outcome = self.gpu, provider.name, result.outcomes[provider.name]
        seconds = seconds_of(gpu, calls[0])
        if seconds > _TOO_LONG:
            outcome.us["eager"], outcome.failure = Spread.of([seconds]), "slow: called once"
            return
        turns.append(eager_turn(name, calls, seconds, self.rounds, provider.backend))
        if gpu.synchronizes(calls[0]):
            outcome.failure = "no graph: it waits for the device"
            return
        outcome.launches = gpu.launches(calls[0])
        turns.append(graph_turn(gpu, name, calls, seconds, self.rounds))
        if result.real_bytes <= gpu.cache_bytes // 2:
            turns.append(graph_turn(gpu, name, calls[:1], seconds, self.rounds, "warm"))
        if result.real_bytes < SMALL_BYTES:
            turns.append(replay_turn(gpu, name, calls, self.rounds))
