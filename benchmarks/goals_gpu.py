"""What fastpool promises on GPUs, and whether a run bears it out: for each backend by itself, in each spelling."""

from collections.abc import Callable
from dataclasses import dataclass

from providers_gpu import BACKENDS, FASTPOOL
from samples_gpu import Outcome, Result

SMALL_BYTES = 8e6


@dataclass(frozen=True)
class Measured:
    """A provider's outcome on a case, and what else of the run a goal may look at."""

    provider: str
    outcome: Outcome
    result: Result
    results: dict[str, Result]
    empty_replay_us: float | None


@dataclass(frozen=True)
class Goal:
    """A limit on a value; `below` says on which side of it the value should be."""

    name: str
    limit: float
    below: bool
    applies: Callable[[Result], bool]
    value: Callable[[Measured], float | None]

    @property
    def text(self) -> str:
        return f"{self.name} {'≤' if self.below else '≥'} {self.limit:g}"

    def met(self, value: float) -> bool:
        return value <= self.limit if self.below else value >= self.limit


def allowance(lengths: list[int], width: int) -> int:
    """Temporary bytes within the goals: O(result), and partial results of long segments. In numbers: a float32 row for
    each sequence and for each 32 tokens, and room for counters and for what the allocator rounds up."""
    rows = sum(1 + length // 32 for length in lengths)
    return 4 * width * rows + 32 * rows + (64 << 10)


def _share(m: Measured) -> float | None:
    return m.result.share(m.provider)


def _over_empty(m: Measured) -> float | None:
    replay = m.outcome.us.get("replay")
    return replay.median / m.empty_replay_us if replay and m.empty_replay_us else None


def _over_twin(m: Measured) -> float | None:
    twin = m.results.get(m.result.twin)
    other = twin.outcomes.get(m.provider) if twin else None
    return m.outcome.best.median / other.best.median if m.outcome.best and other and other.best else None


def _temporaries(m: Measured) -> float | None:
    known = m.outcome.temporary_bytes
    return None if known is None else known / m.result.allowance


GOALS = (
    Goal("share of the read stream, 100 MB and more", 0.95, False, lambda r: r.real_bytes >= 100e6, _share),
    Goal("share of the read stream, 30 to 60 MB", 0.75, False, lambda r: 30e6 <= r.real_bytes <= 60e6, _share),
    Goal("launches, below 8 MB", 1, True, lambda r: r.real_bytes < SMALL_BYTES, lambda m: m.outcome.launches),
    Goal("replay / empty replay, below 8 MB", 1.3, True, lambda r: r.real_bytes < SMALL_BYTES, _over_empty),
    Goal("skewed lengths / level ones", 1.15, True, lambda r: "levelled" in r.twin, _over_twin),
    Goal("half padding / none", 1.15, True, lambda r: bool(r.twin) and "levelled" not in r.twin, _over_twin),
    Goal("temporaries / allowance", 1, True, lambda r: True, _temporaries),
)


@dataclass(frozen=True)
class Verdict:
    """In how many of the measurements that count a backend met a goal, and the worst of them."""

    goal: str
    backend: str
    met: int
    of: int
    worst: float
    where: str


def verdicts(results: list[Result], empty_replay_us: float | None) -> list[Verdict]:
    """One for each goal and backend that this run says something about."""
    by_name = {result.case: result for result in results}
    found = []
    for goal in GOALS:
        for backend in BACKENDS:
            values: dict[str, float] = {}
            for result in filter(goal.applies, results):
                for provider in (p.name for p in FASTPOOL if p.backend == backend):
                    outcome = result.outcomes.get(provider)
                    if outcome is None or not outcome.us:
                        continue
                    value = goal.value(Measured(provider, outcome, result, by_name, empty_replay_us))
                    if value is not None:
                        values[f"{result.case}, {provider.partition(', ')[2]}"] = value
            if values:
                worst = (max if goal.below else min)(values, key=lambda where: values[where])
                met = sum(map(goal.met, values.values()))
                found.append(Verdict(goal.text, backend, met, len(values), round(values[worst], 4), worst))
    return found
