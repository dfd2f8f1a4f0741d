"""A run as tables on the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.case_results import NOISY, Outcome, Result, Spread
from benchmarks.providers import BACKENDS, FASTPOOL
from benchmarks.targets import Verdict

WIDTH = 170
COLUMNS = {"cpu": ("cpu",), "cuda": ("eager", "graph", "warm", "replay", "host")}


def table_of(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.box = box.SIMPLE_HEAD
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def size_of(count: float | None) -> str:
    """A number of bytes with a unit, such as 4.7 MB."""
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _us(spread: Spread | None) -> Text:
    if spread is None:
        return Text("-", style="dim")
    digits = 2 if spread.median < 100 else 1 if spread.median < 10_000 else 0
    noisy = "~" if spread.share > NOISY else ""
    return Text(f"{noisy}{spread.median:.{digits}f}") + Text(f" ±{(spread.q3 - spread.q1) / 2:.{digits}f}", style="dim")


def _error(result: Result, outcome: Outcome) -> Text:
    if result.is_wrong(outcome):
        return Text(f"wrong: {outcome.error:.1e}", style="red")
    return Text(f"{outcome.error:.1e}")


def _row(device: str, result: Result, name: str, outcome: Outcome) -> list[Text | str]:
    over, share, rate = result.over_read(name), result.share(name), result.gigabytes_per_second(name)
    took = f" = {outcome.backend}" if name.startswith("fastpool auto") else ""
    bits = {True: Text("yes"), False: Text("no", style="red"), None: Text("-")}[outcome.same_bits]
    return [
        name + took,
        *(_us(outcome.us.get(column)) for column in COLUMNS[device]),
        "-" if rate is None else f"{rate:.4g}",
        "-" if over is None else f"{over:.2f}x" if over < 100 else f"{over:.0f}x",
        "-" if share is None else f"{100 * share:.1f} %",
        "-" if outcome.launches is None else str(outcome.launches),
        size_of(outcome.temporary_bytes),
        _error(result, outcome),
        bits,
    ]


def print_result(console: Console, device: str, result: Result) -> None:
    title = (
        f"{result.case} ({result.suite}): {result.tokens} tokens, the longest {result.longest}, "
        f"{size_of(result.real_bytes)} ({size_of(result.padded_bytes)} padded)"
    )
    columns = (*(f"{column}\nus" for column in COLUMNS[device]), "GB/s", "time /\nread", "of\nread")
    table = table_of(title, "", *columns, "launches", "tempo-\nraries", "error", "same\nbits")
    if result.read is not None:
        times: list[Text | str] = ["-"] * len(COLUMNS[device])
        times[COLUMNS[device].index("cpu" if device == "cpu" else "graph")] = _us(result.read)
        rate = f"{result.real_bytes / result.read.median / 1e3:.4g}"
        table.add_row(f"read ({result.reader})", *times, rate, "1.00x", "100.0 %")
    for name, outcome in result.outcomes.items():
        if outcome.us or not outcome.failure:
            table.add_row(*_row(device, result, name, outcome))
    console.print(table)
    if result.failure:
        console.print(Text(f"  failed: {result.failure}", style="red"), soft_wrap=True)
    for name, outcome in result.outcomes.items():
        if outcome.failure:
            console.print(Text(f"  {name}: {outcome.failure}", style="yellow"), soft_wrap=True)


def print_limits(console: Console, rates: dict[str, float], empty: dict[str, Spread], failure: str) -> None:
    """What a GPU gives."""
    table = table_of("what the machine gives", "", "")
    for name, rate in sorted(rates.items(), key=lambda one: -one[1]):
        table.add_row(f"read-only stream, {name}", f"{rate:.0f} GB/s")
    for column, spread in empty.items():
        table.add_row(f"empty kernel, {column}", _us(spread) + Text(" us"))
    console.print(table)
    if failure:
        console.print(Text(f"  failed: {failure}", style="red"), soft_wrap=True)


def print_summary(console: Console, device: str, results: Iterable[Result]) -> None:
    """The share of the read stream's rate that each backend reaches, by case and layout."""
    names = [provider.name for provider in FASTPOOL if device in provider.devices]
    headers = [name.removeprefix("fastpool ").replace(", ", ",\n") for name in names]
    table = table_of("share of the read stream's rate", "case", "MB", *headers)
    for result in results:
        if result.suite == "shapes":
            shares = [result.share(name) for name in names]
            cells = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
            table.add_row(result.case, f"{result.real_bytes / 1e6:.3g}", *cells)
    console.print(table)


def print_verdicts(console: Console, device: str, found: Sequence[Verdict]) -> None:
    backends = [name for name in BACKENDS[device] if any(verdict.backend == name for verdict in found)]
    columns = (column for name in backends for column in (name, "worst"))
    table = table_of("targets", "target", *columns, "where the worst is")
    table.columns[-1].justify = "left"
    for target in dict.fromkeys(verdict.goal for verdict in found):
        of_target = {verdict.backend: verdict for verdict in found if verdict.goal == target}
        cells: list[Text | str] = []
        for name in backends:
            verdict = of_target.get(name)
            if verdict is None:
                cells += ["-", ""]
                continue
            style = "green" if verdict.met == verdict.of else "red"
            cells += [Text(f"{verdict.met} of {verdict.of}", style=style), f"{verdict.worst:.3g}"]
        table.add_row(target, *cells, "; ".join(dict.fromkeys(verdict.where for verdict in of_target.values())))
    console.print(table)


def print_tiny(console: Console, tiny: dict[str, dict[str, float]]) -> None:
    table = table_of("tiny: 1 x 16 x 384 float32 from Python, caches warm", "call", *tiny)
    for call in next(iter(tiny.values())):
        cells = [f"{times[call]:.2f} us  {times[call] / next(iter(times.values())):.2f}x" for times in tiny.values()]
        table.add_row(call, *cells)
    console.print(table)


def print_threads(console: Console, threads: dict[str, dict[str, dict[str, float]]]) -> None:
    title = "two threads: wall time, the best of all rounds"
    table = table_of(title, "case", "", "1 thread ms", "2 threads ms", "speed-up")
    table.columns[1].justify = "left"
    for case, calls in threads.items():
        for name, ms in calls.items():
            table.add_row(case, name, f"{ms['1']:.3f}", f"{ms['2']:.3f}", f"{ms['1'] / ms['2']:.2f}x")
            case = ""
    console.print(table)
