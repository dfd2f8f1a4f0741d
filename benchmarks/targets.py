"""What fastpool promises, and whether a run bears it out: for each backend by itself, in each layout."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.case_results import Outcome, Result
from benchmarks.providers import BACKENDS, FASTPOOL, LAYOUTS, Provider

SMALL_BYTES = 8e6
# On CPUs caches are cold at any size; below this, fixed costs show.
LARGE_BYTES = 16 << 20
SPLADE_LIMIT = 10.0  # times as fast as sentence-transformers' module
TINY_LIMIT = 4.0  # additions of four elements
# Of calls that weigh tokens by scores, or of several modes: calls that read the same tokens once, of which the dearest
# counts, and how much more is allowed.
ATTENTION_LIMITS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("softmax_mean", ("weighted_mean",), 1.3),
    ("attention", ("mean",), 2.0),
    ("mean, max, cls", ("mean", "max"), 1.1),
)


@dataclass(frozen=True)
class Measured:
    """A provider's outcome on a case, and what else of the run a target may look at."""

    provider: str
    outcome: Outcome
    result: Result
    results: dict[str, Result]
    empty_replay_us: float | None


@dataclass(frozen=True)
class Target:
    """A limit on a value; `below` says on which side of it the value should be."""

    device: str
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
    """Temporary bytes within the targets: O(result), and partial results of long texts. In numbers: a float32 row for
    each text and for each 32 tokens, and room for counters and for what the allocator rounds up."""
    rows = sum(1 + length // 32 for length in lengths)
    return 4 * width * rows + 32 * rows + (64 << 10)


def _large(result: Result) -> bool:
    return result.real_bytes >= LARGE_BYTES


def _over_read(m: Measured) -> float | None:
    return m.result.over_read(m.provider)


def _times_faster(than: str, m: Measured) -> float | None:
    """Given the same input as that peer."""
    mine, theirs = m.result.over_read(m.provider), m.result.over_read(than)
    return theirs / mine if mine and theirs and LAYOUTS[m.provider] == LAYOUTS[than] else None


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


def _faster(than: str, limit: float) -> Target:
    return Target(
        "cpu", f"times faster than {than}, 16 MiB and more", limit, False, _large, partial(_times_faster, than)
    )


def _both(
    name: str, limit: float, applies: Callable[[Result], bool], value: Callable[[Measured], float | None]
) -> list[Target]:
    return [Target(device, name, limit, True, applies, value) for device in BACKENDS]


TARGETS = (
    Target("cpu", "time / one read, 16 MiB and more", 1.15, True, _large, _over_read),
    _faster("embedding_bag", 1.5),
    _faster("bmm", 2.5),
    _faster("torch.compile", 3),
    _faster("sentence-transformers", 15),
    Target("cuda", "share of the read stream, 100 MB and more", 0.95, False, lambda r: r.real_bytes >= 100e6, _share),
    Target(
        "cuda", "share of the read stream, 30 to 60 MB", 0.75, False, lambda r: 30e6 <= r.real_bytes <= 60e6, _share
    ),
    Target("cuda", "launches, below 8 MB", 1, True, lambda r: r.real_bytes < SMALL_BYTES, lambda m: m.outcome.launches),
    Target("cuda", "replay / empty replay, below 8 MB", 1.3, True, lambda r: r.real_bytes < SMALL_BYTES, _over_empty),
    *_both("skewed lengths / level ones", 1.15, lambda r: "levelled" in r.twin, _over_twin),
    *_both("half padding / none", 1.15, lambda r: bool(r.twin) and "levelled" not in r.twin, _over_twin),
    *_both("temporaries / allowance", 1, lambda r: True, _temporaries),
)
_PROMISED = {"cpu": ("native",), "cuda": BACKENDS["cuda"]}


@dataclass(frozen=True)
class Verdict:
    """In how many of the measurements that count a backend met a target, and the worst of them.

    Result files hold it: the target's text is their `goal`."""

    goal: str
    backend: str
    met: int
    of: int
    worst: float
    where: str


def verdicts(device: str, results: Iterable[Result], empty_replay_us: float | None = None) -> list[Verdict]:
    """One for each target and backend that this run says something about: of the shapes alone, the other suites walk
    through extremes."""
    by_name = {result.case: result for result in results if result.suite == "shapes"}
    found = []
    for target in (target for target in TARGETS if target.device == device):
        for backend in _PROMISED[device]:
            providers = [p for p in FASTPOOL if p.backend == backend]
            values = _values(target, providers, by_name, empty_replay_us)
            if values:
                worst = (max if target.below else min)(values, key=lambda where: values[where])
                met = sum(map(target.met, values.values()))
                found.append(Verdict(target.text, backend, met, len(values), round(values[worst], 4), worst))
    return found


def _values(
    target: Target, providers: list[Provider], by_name: dict[str, Result], empty_replay_us: float | None
) -> dict[str, float]:
    values: dict[str, float] = {}
    for result in filter(target.applies, by_name.values()):
        for provider in (p.name for p in providers):
            outcome = result.outcomes.get(provider)
            if outcome is None or not outcome.us:
                continue
            value = target.value(Measured(provider, outcome, result, by_name, empty_replay_us))
            if value is not None:
                values[f"{result.case}, {provider.partition(', ')[2]}"] = value
    return values


def tiny_verdicts(tiny_us: dict[str, float]) -> list[Verdict]:
    """Verdicts on what timing_cpu.tiny gives for one mode, whose first value is the unit of the others."""
    (unit, unit_us), *calls = tiny_us.items()
    ratios = {f"{call} / {unit} ≤ {TINY_LIMIT:g}": us / unit_us for call, us in calls}
    return [
        Verdict(text, "native", int(ratio <= TINY_LIMIT), 1, round(ratio, 4), "1 x 16 x 384")
        for text, ratio in ratios.items()
    ]


def sparse_verdicts(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Verdicts on what sparse.measure gives."""
    ours, theirs = "splade max", "sentence-transformers, max"
    ratios = {row["case"]: row["us"][theirs] / row["us"][ours] for row in rows if {ours, theirs} <= set(row["us"])}
    if not ratios:
        return []
    worst = min(ratios, key=lambda case: ratios[case])
    met = sum(ratio >= SPLADE_LIMIT for ratio in ratios.values())
    text = f"{theirs} / {ours} ≥ {SPLADE_LIMIT:g}"
    return [Verdict(text, "native", met, len(ratios), round(ratios[worst], 4), worst)]


def attention_verdicts(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Verdicts on what attention.measure gives, of its large cases."""
    large = [row for row in rows if row["bytes"] >= LARGE_BYTES]
    found = []
    for call, units, limit in ATTENTION_LIMITS:
        timed = [row for row in large if {call, *units} <= set(row["us"])]
        ratios = {row["case"]: row["us"][call] / max(row["us"][one] for one in units) for row in timed}
        if ratios:
            worst = max(ratios, key=lambda case: ratios[case])
            met = sum(ratio <= limit for ratio in ratios.values())
            text = f"{call} / {' or '.join(units)}, 16 MiB and more ≤ {limit:g}"
            found.append(Verdict(text, "native", met, len(ratios), round(ratios[worst], 4), worst))
    return found
