"""How things are timed on a GPU.

Caches are cold by rotation: each call of a sample works on another copy of the input, so many that together they are
four times the L2 cache, and before a sample a read evicts what is left of the one before. (Where that takes more copies
than 128, a sample uses each just once.) Events on the device are the clock; samples are long enough for their ends not
to count.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.bandwidth_gpu import READERS, reads_all
from benchmarks.case_results import Outcome, Result, Spread
from benchmarks.cases import Batch, Case, copy
from benchmarks.gpu import Gpu
from benchmarks.measure import Run, Turn, take_turns
from benchmarks.providers import Call, Provider
from benchmarks.targets import SMALL_BYTES

_CALLS = 24  # in a sample, at least, of calls that take less than _LONG seconds
_LONG = 1e-3
MOST_COPIES = 128
_REPLAYS = 8  # graphs of one call each, for `replay`
_SAMPLE_SECONDS = 0.1  # what all samples of a turn may take together, if they are three
_TOO_LONG = 0.2  # seconds: such calls are not repeated


def copies_of(batch: Batch, gpu: Gpu) -> list[Batch]:
    """A batch and as many copies as make caches cold."""
    needed = -(-4 * gpu.cache_bytes // batch.real_bytes)
    return [batch, *(copy(batch) for _ in range(max(2, min(MOST_COPIES, needed)) - 1))]


def seconds_of(gpu: Gpu, call: Run) -> float:
    call()  # what is made on first use is not billed
    return max(gpu.time(call, cold=False, ahead=False)[0], 1e-6)


def _in_order(calls: Sequence[Run], seconds: float) -> list[Run]:
    """The calls again and again, until they make a sample."""
    return [*calls] * (1 if seconds > _LONG else -(-_CALLS // len(calls)))


def _rounds(calls: int, seconds: float, most: int) -> int:
    return max(3, min(most, int(_SAMPLE_SECONDS / (calls * seconds))))


def _one_by_one(calls: Sequence[Run]) -> Run:
    def run() -> None:
        for call in calls:
            call()

    return run


def graph_turn(gpu: Gpu, name: str, calls: Sequence[Run], seconds: float, rounds: int, column: str = "graph") -> Turn:
    """Many calls in one CUDA graph."""
    order = _in_order(calls, seconds)
    graph = gpu.capture(order)
    graph.replay()

    def sample() -> dict[str, float]:
        return {column: gpu.time(graph.replay, cold=column != "warm", ahead=True)[0] / len(order)}

    return Turn(name, _rounds(len(order), seconds, rounds), sample)


def eager_turn(gpu: Gpu, name: str, calls: Sequence[Run], seconds: float, rounds: int, backend: str = "auto") -> Turn:
    """Calls from Python. The device waits for the first of them: a head start would hide what issuing them costs."""
    order = _in_order(calls, seconds)
    run = _one_by_one(order)

    def sample() -> dict[str, float]:
        device, host = gpu.time(run, cold=True, ahead=False)
        return {"eager": device / len(order), "host": host / len(order)}

    return Turn(name, _rounds(len(order), seconds, rounds), sample, backend)


def replay_turn(gpu: Gpu, name: str, calls: Sequence[Run], rounds: int) -> Turn:
    """A CUDA graph for every call, as servers replay one for a step."""
    replays = [gpu.capture([call]).replay for call in [*calls[:_REPLAYS]] * -(-_REPLAYS // len(calls))]
    run = _one_by_one(replays)
    run()
    return Turn(name, rounds, lambda: {"replay": gpu.time(run, cold=True, ahead=False)[0] / len(replays)})


def time_calls(calls: Sequence[Run], gpu: Gpu, rounds: int, column: str = "graph") -> Spread:
    """Microseconds of a call, in a CUDA graph of them all; "graph": cold, "warm": not."""
    turn = graph_turn(gpu, "", calls, seconds_of(gpu, calls[0]), rounds, column)
    return Spread.of([turn.sample()[column] for _ in range(turn.rounds)])


class Cuda:
    """A GPU as measure.py sees it. `deadline` (of time.monotonic) is when peers are left out."""

    builds = 1
    method = (
        "Median (and quartiles) of rounds in turn, clocked by events on the device, microseconds per call. All "
        "normalise. Compiling is not timed; torch.compile compiles each shape for itself.",
        "Cold: each call of a sample has another copy of the input, four times the L2 cache in all, and a read evicts "
        "the rest. eager: calls from Python, one after another. graph: many calls in one CUDA graph. replay: a graph "
        "for each call. warm: as graph, on one input. host: the CPU's share of an eager call.",
    )

    def __init__(self, gpu: Gpu, rounds: int, deadline: float = math.inf) -> None:
        self.gpu, self.rounds, self.deadline = gpu, rounds, deadline
        self.device: torch.device = gpu.device
        probe = torch.randn(1_000_016, device=gpu.device)  # no multiple of a block
        self.reading = [name for name in READERS if reads_all(name, probe)]

    @torch.inference_mode()
    def limits(self) -> tuple[dict[str, float], dict[str, Spread]]:
        """What the machine gives: GB/s of each reader over 32 times the cache, and an empty kernel."""
        buffer = torch.randn(8 * self.gpu.cache_bytes, device=self.gpu.device)
        turns = [self._read_turn(name, [buffer]) for name in self.reading]
        call = self.gpu.empty
        seconds = seconds_of(self.gpu, call)
        turns += [
            eager_turn(self.gpu, "empty", [call] * MOST_COPIES, seconds, self.rounds),
            graph_turn(self.gpu, "empty", [call] * MOST_COPIES, seconds, self.rounds),
            replay_turn(self.gpu, "empty", [call], self.rounds),
        ]
        taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        take_turns(turns, taken, lambda turn, error: None)
        spreads = {at: Spread.of(seconds) for at, seconds in taken.items()}
        rates = {name: buffer.nbytes / one.median / 1e3 for (name, _), one in spreads.items() if name != "empty"}
        return rates, {column: one for (name, column), one in spreads.items() if name == "empty"}

    def _read_turn(self, name: str, tensors: Sequence[Tensor]) -> Turn:
        calls = [READERS[name](one) for one in tensors]
        return graph_turn(self.gpu, name, calls, seconds_of(self.gpu, calls[0]), self.rounds, "read")

    def beside(self, case: Case, batch: Batch) -> list[Batch]:
        return copies_of(batch, self.gpu)[1:]

    def readers(self, batches: Sequence[Batch]) -> list[Turn]:
        return [self._read_turn(name, [one.packed for one in batches]) for name in self.reading]

    def turns(self, provider: Provider, calls: Sequence[Run], result: Result) -> list[Turn]:
        gpu, name, outcome = self.gpu, provider.name, result.outcomes[provider.name]
        seconds = seconds_of(gpu, calls[0])
        if seconds > _TOO_LONG:
            return [self._once(name, seconds, outcome)]
        turns = [eager_turn(gpu, name, calls, seconds, self.rounds, provider.backend)]
        if gpu.synchronizes(calls[0]):
            outcome.failure = "no graph: it waits for the device"
            return turns
        outcome.launches = gpu.launches(calls[0])
        turns.append(graph_turn(gpu, name, calls, seconds, self.rounds))
        if result.real_bytes <= gpu.cache_bytes // 2:
            turns.append(graph_turn(gpu, name, calls[:1], seconds, self.rounds, "warm"))
        if result.real_bytes < SMALL_BYTES:
            turns.append(replay_turn(gpu, name, calls, self.rounds))
        return turns

    def _once(self, name: str, seconds: float, outcome: Outcome) -> Turn:
        outcome.failure = "slow: called once"
        return Turn(name, 1, lambda: {"eager": seconds})

    def temporary_bytes(self, call: Call) -> int:
        return self.gpu.temporary_bytes(call)

    def seconds(self, call: Run) -> float:
        return time_calls([call], self.gpu, self.rounds, "warm").median / 1e6

    def free(self) -> None:
        self.gpu.free()
