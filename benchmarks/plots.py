"""A record as figures: what was measured, with one plain read of the same bytes beside it.

    python -m benchmarks.plots results/cpu/2027-01-02-01234567.json [--out FOLDER]

fastpool is blue (on a GPU Triton is blue and CUDA is orange); ways that read padding are brown, ways over packed tokens
grey. The same record gives the same bytes, so that a figure under version control changes when its data do.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.case_results import Result, Spread
from benchmarks.providers import LAYOUTS, ours
from benchmarks.record import load
from benchmarks.style import (
    BLUE,
    EPSILON,
    FAINT,
    READ,
    THEIRS,
    Style,
    between,
    clock_of,
    figure_of,
    label_ends,
    styled,
    styles_of,
    suite_of,
    time_of,
)
from benchmarks.tables import size_of

# ---- the figures: None where the record has no data for one


def _shapes(record: dict[str, Any]) -> Any:
    """A row per case: providers as marks on a logarithmic rate, the read stream as a bar across."""
    results = [one for one in suite_of(record, "shapes") if one.read is not None]
    results.sort(key=lambda one: -one.real_bytes)
    if not results:
        return None
    drawn = styles_of(record["device"])
    name, best = list(drawn.items())[-1]
    shares = [100 / over for one in results if (over := one.over_read(name)) is not None]
    reached = f": {best.label}, at {between(shares, '.0f')} % of one plain read" if shares else ""
    figure, axes = figure_of(record, 2 + 0.34 * len(results), f"Useful bytes per second{reached}")
    rows, across = range(len(results)), axes.get_yaxis_transform()
    axes.barh(rows[1::2], 1, height=1, transform=across, color="#F7F7F7", zorder=0)
    rates = [one.real_bytes / one.read.median / 1e3 for one in results if one.read]
    reads = axes.vlines(rates, [row - 0.45 for row in rows], [row + 0.45 for row in rows], "black", lw=1.8, zorder=4)
    legend = {READ.label: reads}
    for name, style in reversed(drawn.items()):
        offset = 0 if style.ours else 0.2 if LAYOUTS[name] == "padded" else -0.2
        for row, one in enumerate(results):
            if (rate := one.gigabytes_per_second(name)) is not None:
                wrong = one.is_wrong(one.outcomes[name])
                fill = "white" if wrong else style.colour
                (mark,) = axes.plot(rate, row + offset, **style.line, linestyle="", markerfacecolor=fill)
                if not wrong:
                    legend[style.label] = mark
    axes.text(1.03, 1, "read,\nGB/s", transform=axes.transAxes, ha="center", va="bottom", fontsize=8)
    for row, rate in enumerate(rates):
        told = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        axes.text(1.03, row, told, transform=across, ha="center", va="center", fontsize=8)
    axes.set_yticks(rows, [f"{one.case}   {size_of(one.real_bytes)}" for one in results])
    axes.set(xscale="log", ylim=(-0.6, len(results) - 0.4))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", visible=False)
    about = "brown: ways that read padding; grey: over packed tokens; hollow: wrong by more than rounding"
    axes.set_xlabel(f"GB/s: bytes of real tokens / {clock_of(record).removesuffix(', us')}\n{about}")
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(legend.values(), legend, ncols=4 if len(legend) <= 12 else 3, **place)
    return figure


def _fill(record: dict[str, Any]) -> Any:
    results = suite_of(record, "fill")
    about = "{one.batch} texts in rows of 512, H{one.width} {one.dtype}"
    label = "real tokens, of all rows of the padded batch"
    return _times(record, results, lambda one: one.real_bytes / one.padded_bytes, "Rows filled", label, about)


def _skew(record: dict[str, Any]) -> Any:
    results = suite_of(record, "skew")
    about = "always {one.tokens:,} tokens in {one.batch} texts, H{one.width} {one.dtype}"
    label = "the longest text's share of all tokens (padding grows with it)"
    return _times(record, results, lambda one: one.longest / one.tokens, "Longest text", label, about)


def _times(
    record: dict[str, Any],
    results: list[Result],
    share_of: Callable[[Result], float],
    what: str,
    label: str,
    about: str,
) -> Any:
    """Time against a share. The title says how times grow."""
    if not results:
        return None
    results.sort(key=share_of)
    shares = [round(100 * share_of(one), 1) for one in results]
    lines = {"read": READ} | styles_of(record["device"])
    points: dict[str, list[tuple[float, Spread]]] = {name: [] for name in lines}
    for share, one in zip(shares, results, strict=True):
        for name, spread in [("read", one.read), *((name, outcome.best) for name, outcome in one.outcomes.items())]:
            if name in lines and spread is not None:
                points[name].append((share, spread))
    grown = {name: at[-1][1].median / at[0][1].median for name, at in points.items() if at}
    told = ((name, short) for name, short in ((list(lines)[-1], "fastpool"), ("bmm", "bmm")) if name in grown)
    growth = ", ".join(
        f"{grown[name]:.{1 if grown[name] < 10 else 0}f} times the time for {short}" for name, short in told
    )
    figure, axes = figure_of(record, 5, f"{what} from {between(shares, 'g')} %: {growth}")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=clock_of(record))
    axes.set_title(f"{about.format(one=results[0])}; bands: interquartile ranges")
    for name, style in lines.items():
        if points[name]:
            x, spreads = zip(*points[name], strict=True)
            axes.plot(x, [one.median for one in spreads], **style.line)
            low, high = [one.q1 for one in spreads], [one.q3 for one in spreads]
            axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
    axes.set_xticks(shares, [f"{share:g} %" for share in shares])
    axes.set_xticks([], minor=True)
    label_ends(axes, [(at[-1][0], at[-1][1].median, lines[name]) for name, at in points.items() if at], 3.9)
    return figure


def _error(record: dict[str, Any]) -> Any:
    """A panel per dtype; providers with the same errors share a line."""
    results = sorted(suite_of(record, "length"), key=lambda one: one.tokens)
    dtypes = [dtype for dtype in EPSILON if any(one.dtype == dtype for one in results)]
    if not dtypes:
        return None
    drawn = styles_of(record["device"])
    ours_roundings = [
        one.outcomes[name].error / EPSILON[one.dtype] * 2
        for one in results
        for name, style in drawn.items()
        if style.ours and _checked(one, name)
    ]
    title = "Relative error to float64 by length of a text"
    title += f": fastpool's at most {max(ours_roundings):.2g} roundings" if ours_roundings else ""
    figure, panels = figure_of(record, 1 + 2.7 * len(dtypes), title, len(dtypes), sharex=True, squeeze=False)
    for axes, dtype in zip(panels[:, 0], dtypes, strict=True):
        rounding = EPSILON[dtype] / 2
        _errors(axes, [one for one in results if one.dtype == dtype], rounding, drawn)
        about = "" if dtype == "fp32" else "; what lies far below gives its results in float32"
        axes.set_title(f"{dtype}; dashed: one rounding, eps / 2 = {rounding:.1e}{about}")
    panels[-1, 0].set_xlabel("tokens of one text")
    return figure


def _errors(axes: Any, results: list[Result], rounding: float, drawn: dict[str, Style]) -> None:
    curves: dict[tuple[tuple[int, float], ...], list[Style]] = {}
    for name, style in drawn.items():
        errors = {one.tokens: one.outcomes[name].error for one in results if _checked(one, name)}
        if errors:  # NaN counts as infinite, to be equal to itself
            points = tuple((tokens, error if math.isfinite(error) else math.inf) for tokens, error in errors.items())
            curves.setdefault(points, []).append(style)
    finite = [rounding, *(error for points in curves for _, error in points if 0 < error < math.inf)]
    bottom, top = min(finite) / 2, 10 * max(finite)
    ends: list[tuple[float, float, Style]] = []
    overflown: dict[int, list[str]] = {}
    for points, sharing in curves.items():
        lengths, drawn_errors = zip(*((one, min(max(error, bottom), top)) for one, error in points), strict=True)
        axes.plot(lengths, drawn_errors, **sharing[-1].line, clip_on=False)
        ours_here, all_ours = ([one.label for one in styles if one.ours] for styles in (sharing, drawn.values()))
        names = ["fastpool"] if ours_here == all_ours else ours_here
        names += [one.label for one in sharing if not one.ours]
        beyond = [one for one, error in points if error == math.inf]
        if beyond:
            overflown.setdefault(beyond[0], []).extend(names)
        else:
            ends.append((lengths[-1], drawn_errors[-1], replace(sharing[-1], label=fill(", ".join(names), 28))))
    for tokens, names in overflown.items():
        label = fill(f"{', '.join(names)}: NaN or inf from {tokens:,} tokens", 28)
        ends.append((results[-1].tokens, top, Style(label, THEIRS["packed"])))
    axes.axhline(rounding, color="black", linestyle="--", linewidth=1, zorder=2)
    axes.set(xscale="log", yscale="log", ylabel="relative error", ylim=(bottom, top))
    label_ends(axes, ends, 2.1)


def _checked(result: Result, name: str) -> bool:
    return name in result.outcomes and result.outcomes[name].same_bits is not None


def _growth(record: dict[str, Any]) -> Any:
    steps = [step for step in record.get("growth", []) if step["us"]]
    if not steps:
        return None
    lines = styles_of(record["device"]) | {ours("auto", "packed"): Style("fastpool, packed", BLUE, "o", BLUE)}
    lines = {name: style for name, style in lines.items() if any(name in step["us"] for step in steps)}
    tokens, ours_us = [step["tokens"] for step in steps], [step["us"].get(list(lines)[-1]) for step in steps]
    told = "; ".join(f"{time_of(ours_us[i])} for {tokens[i]:,} tokens" for i in (0, -1) if ours_us[i])
    figure, axes = figure_of(record, 5, f"Cost as work grows: fastpool takes {told}" if told else "Cost as work grows")
    for name, style in reversed(lines.items()):
        points = [(step["tokens"], step["us"][name]) for step in steps if name in step["us"]]
        axes.plot(*zip(*points, strict=True), **style.line, label=style.label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=clock_of(record))
    axes.set_title("texts of 100 tokens, H384 bf16, caches as warm as they get")
    machine, token_bytes = record.get("machine", {}), steps[0]["bytes"] / steps[0]["tokens"]
    cache = machine.get("l2_bytes") or max(machine.get("caches_bytes", {}).values(), default=0)
    if cache:
        about = f"  states outgrow\n  the cache, {cache >> 20} MiB"
        axes.axvline(cache / token_bytes, color=FAINT, linestyle=":")
        axes.annotate(about, (cache / token_bytes, 0.99), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    if rate := _memory_rate(record):
        x = [max(min(tokens), cache / token_bytes), max(tokens)]
        axes.plot(
            x,
            [one * token_bytes / rate / 1e3 for one in x],
            color="black",
            label=f"one plain read, {rate:,.{0 if rate >= 100 else 1}f} GB/s",
        )
    floor, about = _fixed_cost(record)
    if floor:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
        axes.annotate(f"{about}: {floor:.1f} us", (1, floor), **where)
    axes.legend(loc="upper left")
    return figure


def _memory_rate(record: dict[str, Any]) -> float:
    """GB/s of reading what no cache holds: on a GPU measured by itself, on a CPU in the largest case."""
    if rates := record.get("read_gb_per_s"):
        return float(max(rates.values()))
    largest = max((one for one in suite_of(record, "shapes") if one.read), key=lambda one: one.real_bytes, default=None)
    return largest.real_bytes / largest.read.median / 1e3 if largest and largest.read else 0


def _fixed_cost(record: dict[str, Any]) -> tuple[float, str]:
    if record["device"] == "cuda":
        return record.get("empty_us", {}).get("graph", {}).get("median", 0), "an empty kernel"
    tiny_us = record.get("tiny_us", {}).get("inference mode", {})
    return tiny_us.get("mean(hidden, mask, normalize=True)", 0), "a call on 16 tokens"


def _end_to_end(record: dict[str, Any]) -> Any:
    """Rates as shares of the model's own, since queries and documents have nothing else in common."""
    found = record.get("end_to_end", [])
    if not found:
        return None
    # Not the gain in texts per second: with so small a share, most of that is the machine's noise.
    own, fast = (between([100 * one[name]["pooling_share"] for one in found], ".2f") for name in ("own", "fastpool"))
    title = f"Whole encode calls: pooling is {own} % of the time, with fastpool {fast} %"
    figure, (rates, shares) = figure_of(record, 1.2 + 0.75 * len(found), title, 1, 2, sharey=True)
    for name, label, colour, offset in (("own", "own", THEIRS["padded"], -0.2), ("fastpool",) * 2 + (BLUE, 0.2)):
        at = [row + offset for row in range(len(found))]
        speeds = [one[name]["texts_per_second"] for one in found]
        relative = [100 * speed / one["own"]["texts_per_second"] for speed, one in zip(speeds, found, strict=True)]
        pooling = [100 * one[name]["pooling_share"] for one in found]
        bars = rates.barh(at, relative, height=0.36, color=colour)
        rates.bar_label(bars, [f"{speed:.4g} texts/s" for speed in speeds], padding=3, fontsize=8)
        bars = shares.barh(at, pooling, height=0.36, color=colour, label=f"{label} pooling")
        shares.bar_label(bars, [f"{share:.2g} %" for share in pooling], padding=3, fontsize=8)
    for axes in (rates, shares):
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.3)
    rates.invert_yaxis()
    names = [f"{one['workload']}\n{one['tokens'] / one['texts']:.0f} tokens each" for one in found]
    rates.set_yticks(range(len(found)), names)
    threads = "" if record["device"] == "cuda" else ", one thread"
    rates.set(xlabel="texts per second, % of the model's own", title=f"all-MiniLM-L6-v2, float32{threads}")
    shares.set_title("rates that differ by more than these shares are noise")
    shares.set(xlabel="pooling, % of the whole time")
    shares.legend()
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shapes": _shapes,
    "fill": _fill,
    "skew": _skew,
    "error": _error,
    "growth": _growth,
    "end_to_end": _end_to_end,
}


def digest(record: dict[str, Any]) -> str:
    """A hash of a record's contents, which its figures hold: those of another record do not have it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the figures that the record has data for, as PNG and SVG."""
    try:
        import matplotlib  # noqa: F401  # a run on a bare GPU machine shall not end for the want of it
    except ImportError:
        print("no figures: matplotlib is not installed", file=sys.stderr)
        return []
    written = []
    with styled():
        for name, make in FIGURES.items():
            if (figure := make(record)) is None:
                for suffix in ("png", "svg"):
                    (folder / f"{name}.{suffix}").unlink(missing_ok=True)  # of an earlier run
                continue
            folder.mkdir(parents=True, exist_ok=True)
            for suffix, metadata in (
                ("png", {"Software": None}),
                ("svg", {"Date": None, "Creator": None, "Description": digest(record)}),
            ):
                written.append(folder / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=200, metadata=metadata)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="without it, a folder of the record's name")
    arguments = parser.parse_args()
    for path in draw(load(arguments.record), arguments.out or arguments.record.with_suffix("")):
        print(path)


if __name__ == "__main__":
    main()
