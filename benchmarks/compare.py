"""Two records of one machine: what has become faster or slower from A to B.

    python -m benchmarks.compare A.json B.json [--all] [--fail-above PERCENT]

A ratio is B's time over A's, so below 1 is faster. Machines drift: the read stream of the same case says by how much,
and stands beside; so do the peers, whose code is torch's and not ours. A time counts as changed only if all hold:

1. the interquartile ranges of A and B do not overlap, as measured;
2. nor do they as multiples of the read stream's median, each of its own run;
3. the change is larger than the read stream's own, in whichever direction that went;
4. and larger than that of three quarters of the peers in the same case: two runs of one commit differ by more than the
   samples of one run tell. (Where torch differs between A and B, peers may have changed too: a warning says so.)

Everything else is "=". Where a case has no read stream in both records, the first has to do. --fail-above holds against
what is slower by more, as measured and over the read stream. Calls on tiny input and growth have no ranges in a record,
and get ratios without a verdict. The reference backend, whose speed is of no interest, counts among the others that
--all shows.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from benchmarks.case_results import Outcome, Result, Spread, from_json
from benchmarks.providers import FASTPOOL, PEERS
from benchmarks.record import load
from benchmarks.tables import WIDTH, table_of

_OURS = [provider.name for provider in FASTPOOL if provider.backend != "reference"]
_STYLES = {"faster": "green", "slower": "red", "=": "dim"}


@dataclass(frozen=True)
class Change:
    """A provider's time on a case; `drift`: the read stream's ratio, NaN where it was not measured in both."""

    case: str
    provider: str
    before: Spread
    after: Spread
    drift: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    @property
    def over_read(self) -> float:
        """The ratio of the multiples of the read stream."""
        return self.ratio / self.drift

    @property
    def surely(self) -> float:
        """By how much it is slower at least."""
        return self.ratio if math.isnan(self.drift) else min(self.ratio, self.over_read)


def verdict(before: Spread, after: Spread, drift: float, unrest: float = 0.0) -> str:
    """ "faster", "slower" or "=": the rule above; `unrest`: how much peers changed, a logarithm."""
    drift = 1.0 if math.isnan(drift) else drift
    change = math.log(after.median / before.median)
    if abs(change) <= max(abs(math.log(drift)), unrest):
        return "="
    if after.q1 > before.q3 and after.q1 > before.q3 * drift:
        return "slower"
    if after.q3 < before.q1 and after.q3 < before.q1 * drift:
        return "faster"
    return "="


def _common(before: Outcome | None, after: Outcome | None) -> tuple[Spread, Spread] | None:
    """The best column that both have: a graph's time says nothing against eager calls."""
    for column in ("graph", "eager", "cpu"):
        if before and after and column in before.us and column in after.us:
            return before.us[column], after.us[column]
    return None


def unrest(before: Result, after: Result) -> float:
    """What three quarters of the peers in a case stay within, a logarithm; 0 where there are not four of them."""
    pairs = (_common(before.outcomes.get(peer.name), after.outcomes.get(peer.name)) for peer in PEERS)
    ratios = [abs(math.log(pair[1].median / pair[0].median)) for pair in pairs if pair]
    return statistics.quantiles(ratios, n=4, method="inclusive")[2] if len(ratios) >= 4 else 0.0


def changes(before: Result, after: Result, providers: Iterable[str]) -> list[Change]:
    """The changes of one case, of every provider that was timed in both records."""
    noise = unrest(before, after)
    drift = after.read.median / before.read.median if before.read and after.read else math.nan
    found = []
    for name in providers:
        if spreads := _common(before.outcomes.get(name), after.outcomes.get(name)):
            found.append(Change(before.case, name, *spreads, drift, verdict(*spreads, drift, noise)))
    return found


def broken(before: Result, after: Result, providers: Iterable[str]) -> list[str]:
    """A sentence for each provider that had times in A and has none in B, or was right in A and is wrong in B."""
    found = []
    for name in providers:
        a, b = before.outcomes.get(name), after.outcomes.get(name)
        if a and b and a.us and not b.us:
            found.append(f"{before.case}, {name}: no time in B: {b.failure}")
        elif a and b and not before.is_wrong(a) and after.is_wrong(b):
            found.append(f"{before.case}, {name}: wrong in B: an error of {b.error:.1e}")
    return found


def _timed(record: dict[str, Any]) -> dict[str, Result]:
    results = [from_json(case) for case in record.get("cases", [])]
    return {result.case: result for result in results if any(outcome.us for outcome in result.outcomes.values())}


def _head(console: Console, records: Sequence[dict[str, Any]]) -> None:
    for name, record in zip("AB", records, strict=True):
        versions = ", ".join(f"{of} {version}" for of, version in record.get("versions", {}).items())
        machine = record.get("machine", {})
        where = machine.get("gpu") or machine.get("cpu", "unknown machine")
        sha, plus, changed = str(record["commit"]).partition("+")
        about = f"{name}: commit {sha[:12]}{plus}{changed}, {record.get('date', 'no date')}, {where}; {versions}"
        console.print(about, highlight=False, soft_wrap=True)
    a, b = (record.get("machine", {}) for record in records)
    if differing := sorted(key for key in {**a, **b} if a.get(key) != b.get(key)):
        _warn(console, f"the machines differ ({', '.join(differing)}): ratios say little about the code")
    torches = [record.get("versions", {}).get("torch") for record in records]
    if torches[0] != torches[1]:
        _warn(console, f"torch differs: {torches[0]} and {torches[1]}")


def _warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)


def _print_changes(console: Console, found: Sequence[Change]) -> None:
    table = table_of("B / A", "case", "", "A us", "B us", "ratio", "of read", "ratio\nover read", "")
    table.columns[1].justify = table.columns[-1].justify = "left"
    last = ""
    for one in found:
        digits = 2 if one.before.median < 100 else 1 if one.before.median < 10_000 else 0
        spreads = ((spread.median, (spread.q3 - spread.q1) / 2) for spread in (one.before, one.after))
        times = (f"{median:,.{digits}f} ±{half:,.{digits}f}" for median, half in spreads)
        ratios = (f"{one.ratio:.3f}", *("-" if math.isnan(r) else f"{r:.3f}" for r in (one.drift, one.over_read)))
        case, last = "" if one.case == last else one.case, one.case
        table.add_row(case, one.provider, *times, *ratios, Text(one.verdict, style=_STYLES[one.verdict]))
    console.print(table)


def _print_summary(console: Console, label: str, found: Sequence[Change]) -> None:
    if not found:
        return
    counts = ", ".join(f"{sum(one.verdict == word for one in found)} {word}" for word in ("faster", "slower"))
    same, known = sum(one.verdict == "=" for one in found), [one for one in found if not math.isnan(one.drift)]
    mean = f"geometric mean of ratios {_geometric_mean([one.ratio for one in found]):.3f}"
    over = f", over read {_geometric_mean([one.over_read for one in known]):.3f}" if known else ""
    console.print(f"{label}: {counts}, {same} the same; {mean}{over}", highlight=False, soft_wrap=True)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _print_others(console: Console, a: dict[str, Any], b: dict[str, Any]) -> None:
    """What has one number for each record, and no verdict."""
    rows = []
    for mode, calls in a.get("tiny_us", {}).items():
        other = b.get("tiny_us", {}).get(mode, {})
        rows += [(f"{call}, {mode}", us, other[call]) for call, us in calls.items() if call in other]
    later = {step["tokens"]: step["us"] for step in b.get("growth", [])}
    for step in a.get("growth", []):
        both = ((name, us, later.get(step["tokens"], {}).get(name)) for name, us in step["us"].items() if name in _OURS)
        rows += [(f"{step['tokens']:,} tokens, {name}", us, other) for name, us, other in both if other]
    if rows:
        table = table_of("B / A, without a verdict: one number each", "", "A us", "B us", "ratio")
        for label, before, after in rows:
            table.add_row(label, f"{before:,.2f}", f"{after:,.2f}", f"{after / before:.3f}")
        console.print(table)


def compare(
    console: Console, a: dict[str, Any], b: dict[str, Any], all_providers: bool = False
) -> tuple[float, list[str]]:
    """Prints; gives the largest ratio by which fastpool is surely slower, and what of fastpool's broke."""
    if a["device"] != b["device"]:
        raise SystemExit(f"A was measured on {a['device']}, B on {b['device']}: nothing to compare")
    _head(console, (a, b))
    before, after = _timed(a), _timed(b)
    found: list[Change] = []
    failures: list[str] = []
    for case in [case for case in before if case in after]:
        one, other = before[case], after[case]
        if (one.real_bytes, one.padded_bytes) != (other.real_bytes, other.padded_bytes):
            _warn(console, f"{case}: not the same input in A and in B, left out")
            continue
        found += changes(one, other, one.outcomes if all_providers else _OURS)
        failures += broken(one, other, _OURS)
    ours = [one for one in found if one.provider in _OURS]
    if found:
        _print_changes(console, found)
    for name, lone in (("A", before.keys() - after.keys()), ("B", after.keys() - before.keys())):
        if lone:
            console.print(f"only in {name}: {'; '.join(sorted(lone))}", highlight=False, soft_wrap=True)
    for failure in failures:
        _warn(console, failure)
    _print_others(console, a, b)
    if not found:
        console.print("no case was timed in both", highlight=False)
    _print_summary(console, "fastpool", ours)
    _print_summary(console, "others", [one for one in found if one not in ours])
    return max((one.surely for one in ours if one.verdict == "slower"), default=1.0), failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--all", action="store_true", help="every provider, not fastpool's alone")
    where = "exit 1 if fastpool is slower by more than this anywhere, or gives no time or a wrong result where it did"
    parser.add_argument("--fail-above", type=float, metavar="PERCENT", help=where)
    chosen = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    worst, failures = compare(console, load(chosen.a), load(chosen.b), chosen.all)
    if chosen.fail_above is None:
        return 0
    return int(worst > 1 + chosen.fail_above / 100 or bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
