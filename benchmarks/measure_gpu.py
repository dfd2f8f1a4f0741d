"""How things are timed on a GPU.

Caches are cold by rotation: each call of a sample works on another copy of the input, so many that together they are
four times the L2 cache, and before a sample a read evicts what is left of the one before. (Where that takes more copies
than 128, a sample uses each just once.) All that is timed on a case takes turns in one loop, so that drift hits all
alike. Events on the device are the clock; samples are long enough for their ends not to count.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import fastpool
from cases import Batch
from cases_gpu import copy
from gpu import Gpu, Run
from measure import no_collection
from samples_gpu import Spread

_CALLS = 24  # in a sample, at least, of calls that take less than _LONG seconds
_LONG = 1e-3
MOST_COPIES = 128
_REPLAYS = 8  # graphs of one call each, for `replay`
_SAMPLE_SECONDS = 0.1  # what all samples of a turn may take together, if they are three


@dataclass(frozen=True)
class Turn:
    """Something to be timed in turn with others."""

    name: str
    column: str
    run: Run
    calls: int  # of which `run` consists
    rounds: int
    backend: str = "auto"
    cold: bool = True
    ahead: bool = True


def copies_of(batch: Batch, gpu: Gpu) -> list[Batch]:
    """A batch and as many copies as make caches cold."""
    needed = -(-4 * gpu.cache_bytes // batch.real_bytes)
    return [batch, *(copy(batch) for _ in range(max(2, min(MOST_COPIES, needed)) - 1))]


def time_call(call: Callable[[Batch], object], rotate: Sequence[Batch], gpu: Gpu, rounds: int = 9) -> Spread:
    """Microseconds of `call`, cold, in a CUDA graph over the batches of `rotate` (see copies_of)."""
    calls = [partial(call, batch) for batch in rotate]
    turn = graph_turn(gpu, "", calls, seconds_of(gpu, calls[0]), rounds)
    return Spread.of([gpu.time(turn.run, cold=True, ahead=True)[0] / turn.calls for _ in range(turn.rounds)])


def seconds_of(gpu: Gpu, call: Run) -> float:
    call()  # what is made on first use is not billed
    return max(gpu.time(call, cold=False, ahead=False)[0], 1e-6)


def _in_order(calls: Sequence[Run], seconds: float) -> list[Run]:
    """The calls again and again, until they make a sample."""
    return [*calls] * (1 if seconds > _LONG else -(-_CALLS // len(calls)))


def _rounds(calls: int, seconds: float, most: int) -> int:
    return max(3, min(most, int(_SAMPLE_SECONDS / (calls * seconds))))


def graph_turn(gpu: Gpu, name: str, calls: Sequence[Run], seconds: float, rounds: int, column: str = "graph") -> Turn:
    """Many calls in one CUDA graph."""
    order = _in_order(calls, seconds)
    graph = gpu.capture(order)
    graph.replay()
    return Turn(name, column, graph.replay, len(order), _rounds(len(order), seconds, rounds), cold=column != "warm")


def _one_by_one(calls: Sequence[Run]) -> Run:
    def run() -> None:
        for call in calls:
            call()

    return run


def eager_turn(name: str, calls: Sequence[Run], seconds: float, rounds: int, backend: str = "auto") -> Turn:
    """Calls from Python. The device waits for the first of them: a head start would hide what issuing them costs."""
    order = _in_order(calls, seconds)
    return Turn(
        name, "eager", _one_by_one(order), len(order), _rounds(len(order), seconds, rounds), backend, ahead=False
    )


def replay_turn(gpu: Gpu, name: str, calls: Sequence[Run], rounds: int) -> Turn:
    """A CUDA graph for every call, as servers replay one for a step."""
    replays = [gpu.capture([call]).replay for call in [*calls[:_REPLAYS]] * -(-_REPLAYS // len(calls))]
    run = _one_by_one(replays)
    run()
    return Turn(name, "replay", run, len(replays), rounds, ahead=False)


def take_turns(gpu: Gpu, turns: list[Turn], failed: Callable[[Turn, Exception], None]) -> dict[tuple[str, str], Spread]:
    """Spreads by name and column; `host` is what the eager column takes of the host."""
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    waiting = dict(enumerate(turns))
    with no_collection():
        for round_ in range(max((turn.rounds for turn in turns), default=0)):
            order = list(waiting)
            first = round_ % max(len(order), 1)  # nobody starts every round
            for i in order[first:] + order[:first]:
                turn = turns[i]
                if round_ >= turn.rounds:
                    continue
                try:
                    with fastpool.backend(turn.backend):
                        device, host = gpu.time(turn.run, turn.cold, turn.ahead)
                except Exception as error:
                    del waiting[i]
                    failed(turn, error)
                    continue
                seconds[turn.name, turn.column].append(device / turn.calls)
                if turn.column == "eager":
                    seconds[turn.name, "host"].append(host / turn.calls)
    return {at: Spread.of(taken) for at, taken in seconds.items()}
