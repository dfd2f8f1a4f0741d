"""A run on a CPU as tables."""

import re

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

import goals
from providers import PROVIDERS
from samples import Outcome, Result

NOISY = 0.15  # an interquartile range above this share of the median is marked


def table_of(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.box = box.SIMPLE_HEAD
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x" if value < 99.95 else f"{value:.0f}x"


def _in_lines(name: str) -> str:
    """Broken into short lines, so that many columns fit."""
    return re.sub(r"(?<=[_.-])|than | (?=/)", lambda cut: cut[0].strip() + "\n", name)


def _cell(result: Result, outcome: Outcome | None) -> RenderableType:
    if outcome is None:
        return Text("-", style="dim")
    if outcome.samples is None:
        return Text(outcome.failure.split(":")[0], style="red")
    noisy = "~" if outcome.samples.spread > NOISY else ""
    times = Text(noisy + _times(outcome.samples.median / result.floor.median))
    error = Text(f"\n{outcome.error:.1e}", style="dim")
    if result.is_wrong(outcome):
        error = Text(f"\nwrong: {outcome.error:.1e}", style="red")
    return times + error


def print_results(console: Console, dtype: str, results: list[Result]) -> None:
    shown = [p for p in PROVIDERS if any(p.name in result.outcomes for result in results)]
    table = table_of(
        f"{dtype}: times the floor, error to float64 below",
        "shape",
        "floor ms",
        "GB/s",
        *(_in_lines(p.name.removesuffix(p.layout).strip()) + f"\n({p.layout})" for p in shown),
        caption="* usual dtype at this size   ~ interquartile range above 15 %   wrong: error beyond rounding",
    )
    for result in results:
        table.add_row(
            result.case.shape + (" *" if result.case.native else ""),
            f"{'~' if result.floor.spread > NOISY else ''}{1e3 * result.floor.median:.3f}",
            f"{result.gigabytes_per_second:.1f}",
            *(_cell(result, result.outcomes.get(p.name)) for p in shown),
        )
    console.print(table)


def print_goals(console: Console, results: list[Result], verdicts: list[goals.Verdict]) -> None:
    table = table_of(
        "goals",
        "case",
        *(f"{_in_lines(goal.name)}\n{goal.text}" for goal in goals.GOALS),
        caption=f"dim: fewer than {goals.LARGE_BYTES >> 20} MiB of real tokens, outside the goals",
    )
    for result in results:
        cells = []
        for goal in goals.GOALS:
            value = goal.value(result)
            if value is None:
                cells.append(Text("-", style="dim"))
            elif not goals.counts(result):
                cells.append(Text(f"{_times(value)}       ", style="dim"))
            else:
                met = goal.met(value)
                cells.append(Text(f"{_times(value)} {'met   ' if met else 'missed'}", style="green" if met else "red"))
        table.add_row(Text(result.case.name, style="" if goals.counts(result) else "dim"), *cells)
    console.print(table)
    table = table_of("goals, in short", "goal", "met", "worst", "where")
    for verdict in verdicts:
        share = Text(f"{verdict.met} of {verdict.of}", style="green" if verdict.met == verdict.of else "red")
        table.add_row(verdict.goal, share, _times(verdict.worst), verdict.where)
    console.print(table)


def print_tiny(console: Console, tiny: dict[str, dict[str, float]]) -> None:
    table = table_of("tiny: 1 x 16 x 384 float32 from Python, caches warm", "call", *tiny)
    for call in next(iter(tiny.values())):
        cells = [f"{times[call]:.2f} us  {times[call] / next(iter(times.values())):.2f}x" for times in tiny.values()]
        table.add_row(call, *cells)
    console.print(table)


def print_threads(console: Console, threads: dict[str, dict[str, dict[int, float]]]) -> None:
    table = table_of(
        "two threads: wall time, the best of all rounds", "case", "", "1 thread ms", "2 threads ms", "speed-up"
    )
    table.columns[1].justify = "left"
    for case, calls in threads.items():
        for name, seconds in calls.items():
            one, two = seconds[1], seconds[2]
            table.add_row(case, name, f"{1e3 * one:.3f}", f"{1e3 * two:.3f}", f"{one / two:.2f}x")
            case = ""
    console.print(table)
