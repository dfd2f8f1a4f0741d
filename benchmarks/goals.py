"""What fastpool promises on CPUs, and whether a run bears it out."""

from collections.abc import Callable
from dataclasses import dataclass

from providers import BMM, COMPILED, EMBEDDING_BAG, FASTPOOL_PACKED, FASTPOOL_PADDED, SENTENCE_TRANSFORMERS, Provider
from samples import Result

# The goals are about bytes that come from memory. Caches are cold here at any size; below this, fixed costs show.
LARGE_BYTES = 16 << 20
TINY_LIMIT = 4.0  # additions of four elements


@dataclass(frozen=True)
class Goal:
    """A limit on a ratio; `below` says on which side of it a value should be."""

    name: str
    limit: float
    below: bool
    value: Callable[[Result], float | None]

    @property
    def text(self) -> str:
        return f"{'≤' if self.below else '≥'} {self.limit:g}x"

    def met(self, value: float) -> bool:
        return value <= self.limit if self.below else value >= self.limit


def _over_floor(provider: Provider) -> Goal:
    return Goal(f"{provider.name} / floor", 1.15, True, lambda result: result.over_floor(provider))


def _faster(than: Provider, limit: float) -> Goal:
    return Goal(f"faster than {than.name}", limit, False, lambda result: result.times_faster(than))


GOALS = (
    _over_floor(FASTPOOL_PADDED),
    _over_floor(FASTPOOL_PACKED),
    _faster(EMBEDDING_BAG, 1.5),
    _faster(BMM, 2.5),
    _faster(COMPILED, 3),
    _faster(SENTENCE_TRANSFORMERS, 15),
)


def counts(result: Result) -> bool:
    """Whether the goals are about this case."""
    return result.real_bytes >= LARGE_BYTES


@dataclass(frozen=True)
class Verdict:
    """In how many of the cases that count a goal was met, and the worst of them."""

    goal: str
    met: int
    of: int
    worst: float
    where: str


def verdicts(results: list[Result], tiny_us: dict[str, float]) -> list[Verdict]:
    """One for every goal that a case of this run is about; `tiny_us` starts with its unit."""
    found = []
    for goal in GOALS:
        values = {result.case.name: goal.value(result) for result in results if counts(result)}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            worst = (max if goal.below else min)(known, key=lambda name: known[name])
            met = sum(goal.met(value) for value in known.values())
            found.append(Verdict(f"{goal.name} {goal.text}", met, len(known), known[worst], worst))
    (unit, unit_us), *calls = tiny_us.items()
    for call, us in calls:
        ratio = us / unit_us
        found.append(Verdict(f"{call} / {unit} ≤ {TINY_LIMIT:g}x", int(ratio <= TINY_LIMIT), 1, ratio, "1 x 16 x 384"))
    return found
