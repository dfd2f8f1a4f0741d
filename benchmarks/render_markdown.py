"""A result file in Markdown: the tables and figures that the report's templates ask for."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.case_results import NOISY, Result, from_json
from benchmarks.cases import DTYPES
from benchmarks.providers import LAYOUTS, ours
from benchmarks.record import load
from benchmarks.tables import size_of
from benchmarks.targets import LARGE_BYTES

_MAIN = {"cpu": ("native",), "cuda": ("triton", "native")}
_LENGTHS = (128, 8192, 131072)  # of the errors in the table; the plot has them all
_PEERS = {
    "embedding_bag": "`F.embedding_bag` on the same packed tokens",
    "vLLM": "vLLM's `index_add_` on the same packed tokens",
    "bmm": "`bmm` with the mask",
    "torch.compile": "the `torch.compile`d formula",
    "sentence-transformers": "sentence-transformers' own modules",
}


def between(values: Sequence[float]) -> str:
    """1.11 to 1.32: the least and the most."""
    low, high = (
        f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
        for value in (min(values), max(values))
    )
    return low if low == high else f"{low} to {high}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _time(us: float | None) -> str:
    if us is None:
        return ""
    return f"{us:.3g} µs" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.3g} s"


def _worst(errors: Sequence[float]) -> float | None:
    """NaN is the worst of all."""
    return max(errors, key=lambda error: (error != error, error), default=None)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = dict.fromkeys(_OPTIONAL) | load(path)
        self.device: str = self.record["device"]
        self.results = [from_json(one) for one in self.record["cases"] or []]
        self.ours = [
            ours(backend, input_layout) for backend in _MAIN[self.device] for input_layout in ("mask", "packed")
        ]

    # ---- about the run

    @property
    def machine(self) -> str:
        machine = self.record["machine"]
        if self.device == "cuda":
            return str(machine["gpu"])
        return f"{machine['cpu']}, {machine['cores']} cores, {self._cache >> 20} MiB of last cache"

    @property
    def packages(self) -> str:
        return ", ".join(f"{name} {one}" for name, one in self.record["versions"].items() if one != "unknown")

    @property
    def commit(self) -> str:
        sha, plus, changes = str(self.record["commit"]).partition("+")
        return f"{sha[:8]}{plus}{changes}"

    @property
    def file(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def _cache(self) -> int:
        machine = self.record["machine"]
        return int(machine.get("l2_bytes") or max(machine["caches_bytes"].values()))

    def picture(self, name: str) -> str:
        """A paragraph with one of the run's figures; nothing where there is no such figure."""
        path = self.path.with_suffix("") / f"{name}.svg"
        return f"\n![{name}](../{path.relative_to(ROOT).as_posix()})\n" if path.exists() else ""

    def suite(self, name: str) -> list[Result]:
        return [result for result in self.results if result.suite == name]

    def _columns(self, results: Sequence[Result], has: Callable[[Any], object]) -> list[str]:
        """fastpool's main providers and all peers that have something to show somewhere."""
        names = dict.fromkeys(name for one in results for name, outcome in one.outcomes.items() if has(outcome))
        return [name for name in names if not name.startswith("fastpool") or name in self.ours]

    # ---- what memory limits

    @property
    def large(self) -> list[Result]:
        """Without those whose read stream was unsteady."""
        return [result for result in self._all_large if result.read and result.read.share <= NOISY]

    @property
    def unsteady(self) -> int:
        """How many were left out for that."""
        return len(self._all_large) - len(self.large)

    @property
    def _all_large(self) -> list[Result]:
        return [result for result in self.suite("shapes") if result.real_bytes >= LARGE_BYTES]

    def _over_read(self, result: Result, input_layout: str) -> float | None:
        """The faster backend's time on a case, as a multiple of the read stream's."""
        values = (result.over_read(ours(backend, input_layout)) for backend in _MAIN[self.device])
        return min((value for value in values if value is not None), default=None)

    def _times_faster(self, than: str) -> list[float]:
        """Given the same input as that peer."""
        input_layout = "mask" if LAYOUTS[than] == "padded" else "packed"
        pairs = ((result.over_read(than), self._over_read(result, input_layout)) for result in self.large)
        return [theirs / mine for theirs, mine in pairs if theirs and mine]

    def headline(self) -> str:
        tiny = self.record["tiny_us"]["inference mode"]
        unit, plain, normalized = tiny.values()
        over = {
            input_layout: [v for r in self.large if (v := self._over_read(r, input_layout))]
            for input_layout in ("packed", "mask")
        }
        rows = [
            (
                "time, as a multiple of one sequential read of the real tokens",
                f"{between(over['packed'])} packed, {between(over['mask'])} padded",
            ),
            *(
                (f"{words}, as a multiple of fastpool's time", between(self._times_faster(name)))
                for name, words in _PEERS.items()
            ),
            (
                "a tiny call (1 x 16 x 384) from Python, as a multiple of `torch.add` on four numbers",
                f"{plain / unit:.1f}; {normalized / unit:.1f} with `normalize=True`",
            ),
        ]
        return markdown(["`fastpool.mean`", ""], rows)

    # ---- tables

    def shapes(self) -> str:
        results = [result for result in self.suite("shapes") if result.read]
        columns = self._columns(results, lambda outcome: outcome.best)
        rows = [
            (
                result.case,
                size_of(result.real_bytes),
                ("~" if result.read.share > NOISY else "") + f"{result.real_bytes / result.read.median / 1e3:.3g}",
                *(self._cell(result, name) for name in columns),
            )
            for result in results
            if result.read
        ]
        return markdown(["case", "real tokens", "read, GB/s", *columns], rows)

    def besides(self) -> str:
        """What the shapes show besides time, of each provider: the worst of all cases."""
        rows = []
        for name in dict.fromkeys(name for result in self.suite("shapes") for name in result.outcomes):
            known = [(r, r.outcomes[name]) for r in self.suite("shapes") if name in r.outcomes]
            known = [(result, outcome) for result, outcome in known if outcome.best]
            if not known:
                continue
            memory = max(
                (o.temporary_bytes / r.real_bytes for r, o in known if o.temporary_bytes is not None), default=0
            )
            errors = (_worst([outcome.error for result, outcome in known if result.dtype == dtype]) for dtype in DTYPES)
            faults = max((o.page_faults or 0) / (r.real_bytes / 1e6) for r, o in known)
            launches = [outcome.launches for _, outcome in known if outcome.launches is not None]
            rows.append(
                (
                    name,
                    f"{memory:.2g}x",
                    *([f"{faults:.2g}"] if self.device == "cpu" else []),
                    *("" if error is None else f"{error:.0e}" for error in errors),
                    "yes" if all(outcome.same_bits for _, outcome in known) else "**no**",
                    *([f"{min(launches)} to {max(launches)}" if launches else ""] if self.device == "cuda" else []),
                )
            )
        head = [
            "temporary bytes / those of real tokens",
            *(["page faults per MB of them"] if self.device == "cpu" else []),
            *(f"error, {dtype}" for dtype in DTYPES),
            "same bits in another batch",
        ]
        return markdown(["", *head, *(["launches"] if self.device == "cuda" else [])], rows)

    def _cell(self, result: Result, name: str) -> str:
        outcome = result.outcomes.get(name)
        if outcome is None or outcome.best is None:
            return ""
        noisy, wrong = outcome.best.share > NOISY, result.is_wrong(outcome)
        return f"{'~' if noisy else ''}{_times(result.over_read(name))}{' (wrong)' if wrong else ''}"

    def targets(self) -> str:
        rows = (
            (one["goal"], one["backend"], f"{one['met']} of {one['of']}", f"{one['worst']:.3g}", one["where"])
            for one in self.record["goals"]
        )
        return markdown(["target", "backend", "met", "worst", "where"], rows)

    def times(self, suite: str) -> str:
        """The times of every provider along a suite's steps."""
        results = self.suite(suite)
        columns = self._columns(results, lambda outcome: outcome.best)
        head = {"fill": "real tokens", "skew": "the longest text's share"}[suite]
        rows = []
        for result in results:
            share = result.longest / result.tokens if suite == "skew" else result.real_bytes / result.padded_bytes
            best = [result.outcomes[name].best for name in columns]
            read = _time(result.read.median) if result.read else ""
            rows.append((f"{100 * share:.0f} %", read, *(_time(one.median) if one else "" for one in best)))
        return markdown([head, "read", *columns], rows)

    def errors(self) -> str:
        results = [result for result in self.suite("length") if result.tokens in _LENGTHS]
        columns = self._columns(results, lambda outcome: outcome.same_bits is not None)
        rows = [
            (
                f"{result.dtype}, {result.tokens:,}",
                *(
                    f"{one.error:.0e}" if (one := result.outcomes[name]).same_bits is not None else ""
                    for name in columns
                ),
            )
            for result in results
        ]
        return markdown(["dtype, tokens", *columns], rows)

    def _per_token(self, step: dict[str, Any]) -> float:
        """Nanoseconds that fastpool takes for a token in one step of the growth."""
        return 1e3 * float(next(iter(step["us"].values()))) / int(step["tokens"])

    def growth(self) -> str:
        steps = self.record["growth"]
        columns = list(dict.fromkeys(name for step in steps for name in step["us"]))
        rows = [
            (
                f"{step['tokens']:,}",
                size_of(step["bytes"]),
                *(_time(step["us"].get(name)) for name in columns),
                f"{self._per_token(step):.3g} ns",
            )
            for step in steps
        ]
        return markdown(["tokens", "states", *columns, "fastpool, per token"], rows)

    def bends(self) -> dict[str, str] | None:
        """Where the line of fastpool's cost bends; None where a run did not go far enough to tell."""
        steps = self.record["growth"]
        costs = [self._per_token(step) for step in steps]
        if steps[-1]["bytes"] < 4 * self._cache:
            return None
        cheapest = costs.index(min(costs))
        rise = max(range(cheapest + 1, len(steps)), key=lambda i: costs[i] / costs[i - 1], default=0)
        if not rise:
            return None
        return {
            "first": f"{steps[0]['tokens']:,}",
            "first_time": _time(next(iter(steps[0]["us"].values()))),
            "first_cost": f"{costs[0]:.3g}",
            "cheapest": f"{steps[cheapest]['tokens']:,}",
            "least": f"{costs[cheapest]:.3g}",
            "before": f"{steps[rise - 1]['tokens']:,}",
            "after": f"{steps[rise]['tokens']:,}",
            "bytes_before": size_of(steps[rise - 1]["bytes"]),
            "bytes_after": size_of(steps[rise]["bytes"]),
            "cache": size_of(self._cache),
            "outside": between(costs[rise:]),
            "most": f"{steps[-1]['tokens']:,}",
            "rows": f"{max((s['tokens'] for s in steps if len(s['us']) > 1), default=steps[-1]['tokens']):,}",
        }

    def tiny(self) -> str:
        modes = self.record["tiny_us"]
        calls = list(next(iter(modes.values())))
        rows = [
            (f"`{call}`", *(f"{us[call]:.2f} µs, {us[call] / us[calls[0]]:.2f}x" for us in modes.values()))
            for call in calls
        ]
        return markdown(["", *modes], rows)

    def threads(self) -> str:
        rows = [
            (case, name, f"{ms['1']:.3f}", f"{ms['2']:.3f}", f"{ms['1'] / ms['2']:.2f}x")
            for case, calls in self.record["threads_wall_ms"].items()
            for name, ms in calls.items()
        ]
        return markdown(["case", "", "1 thread, ms", "2 threads, ms", "speed-up"], rows)

    def attention(self) -> str:
        return self._multiples(self.record["attention"], "states", "mean")

    def sparse(self) -> str:
        return self._multiples(self.record["sparse"], "logits", "max")

    @staticmethod
    def _multiples(found: list[dict[str, Any]], what: str, unit: str) -> str:
        names = [name for name in dict.fromkeys(name for one in found for name in one["us"]) if name != unit]
        rows = (
            (
                one["case"],
                size_of(one["bytes"]),
                _time(one["us"][unit]),
                *(_times(one["us"][name] / one["us"][unit]) if name in one["us"] else "" for name in names),
            )
            for one in found
        )
        return markdown(["case", what, unit, *names], rows)

    def attention_failures(self) -> list[str]:
        """What a call has no figures for, and why; each reason once."""
        reasons = (f"{name}: {why}" for one in self.record["attention"] for name, why in one["failures"].items())
        return list(dict.fromkeys(reasons))

    def gradients(self, rows: list[dict[str, Any]]) -> str:
        names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "floor"))
        cells = []
        for row in rows:
            ms = row["ms"]
            ratios = (_times(ms[name] / ms["floor"]) if name in ms else "" for name in names)
            cells.append((row["case"], f"{ms['floor']:.2f}", *ratios))
        return markdown(["case", "torch.zeros, ms", *names], cells)

    def pooling_share(self) -> str:
        """Percent of an encode, with the model's own pooling."""
        return between([100 * one["own"]["pooling_share"] for one in self.record["end_to_end"]])

    def end_to_end(self) -> str:
        ways = ("own", "fastpool")
        rows = [
            (
                f"{one['workload']}: {one['texts']} texts, {one['tokens']:,} tokens",
                *(f"{one[way]['texts_per_second']:.1f} ({between(one[way]['quartiles'])})" for way in ways),
                *(f"{100 * one[way]['pooling_share']:.2f} %" for way in ways),
                *(size_of(one[way]["peak_bytes"]) for way in ways),
                f"{one['largest_difference']:.0e}",
            )
            for one in self.record["end_to_end"]
        ]
        names = ("texts/s", "pooling's share", "memory at the peak of a batch")
        head = [f"{name}, {way}" for name in names for way in ways]
        return markdown(["", *head, "largest difference"], rows)

    def quality(self) -> str:
        found = self.record["quality"]
        trials = list(next(iter(found.values())))
        rows = [
            (name, *(f"**{one['gave']}**" if one["fine"] is False else one["gave"] for one in findings.values()))
            for name, findings in found.items()
            if any(one["fine"] is not None for one in findings.values())
        ]
        return markdown(["", *trials], rows)

    def real_states(self) -> str:
        by_dtype = self.record["real_states"]
        names = dict.fromkeys(name for findings in by_dtype.values() for name in findings)
        rows = [
            (
                name,
                *(
                    f"{findings[name]['error']:.2g}, {findings[name]['cosine']:.7f}" if name in findings else ""
                    for findings in by_dtype.values()
                ),
            )
            for name in names
        ]
        return markdown(["largest error of a column, least cosine", *by_dtype], rows)


_OPTIONAL = (
    *("cases", "goals", "growth", "tiny_us", "threads_wall_ms", "attention", "sparse", "gradients"),
    *("end_to_end", "real_states", "quality", "quality_about", "load"),
)
