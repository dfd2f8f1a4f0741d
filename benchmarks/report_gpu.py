"""A run on a GPU as tables."""

from rich.console import Console
from rich.text import Text

from goals_gpu import Verdict
from providers_gpu import BACKENDS, FASTPOOL
from report import NOISY, table_of
from samples import WRONG_BEYOND
from samples_gpu import Outcome, Result, Spread

WIDTH = 170
_COLUMNS = ("eager", "graph", "warm", "replay", "host")


def _us(spread: Spread | None) -> Text:
    if spread is None:
        return Text("-", style="dim")
    digits = 2 if spread.median < 100 else 1
    noisy = "~" if spread.share > NOISY else ""
    return Text(f"{noisy}{spread.median:.{digits}f}") + Text(f" ±{(spread.q3 - spread.q1) / 2:.{digits}f}", style="dim")


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _error(result: Result, outcome: Outcome) -> Text:
    if outcome.error <= WRONG_BEYOND[result.dtype]:
        return Text(f"{outcome.error:.1e}")
    return Text(f"wrong: {outcome.error:.1e}", style="red")


def _row(result: Result, name: str, outcome: Outcome) -> list[Text | str]:
    share = result.share(name)
    took = f" = {outcome.backend}" if name.startswith("fastpool auto") else ""
    cells: list[Text | str] = [name + took, *(_us(outcome.us.get(column)) for column in _COLUMNS)]
    if outcome.best is None or share is None:
        cells += ["-", "-"]
    else:
        cells += [f"{result.real_bytes / outcome.best.median / 1e3:.0f}", f"{100 * share:.1f} %"]
    launches = "-" if outcome.launches is None else str(outcome.launches)
    bits = {True: Text("yes"), False: Text("no", style="red"), None: Text("-")}[outcome.same_bits]
    return [*cells, launches, _bytes(outcome.temporary_bytes), _error(result, outcome), bits]


def print_result(console: Console, result: Result) -> None:
    title = (
        f"{result.case}: {result.tokens} tokens, the longest {result.longest}, {result.real_bytes / 1e6:.3g} MB "
        f"({result.padded_bytes / 1e6:.3g} MB padded), {result.copies} copies in turn"
    )
    columns = (*(f"{column}\nus" for column in _COLUMNS), "GB/s", "of\nread", "launches", "tempo-\nraries")
    table = table_of(title, "", *columns, "error", "same\nbits")
    if result.read is not None:
        rate = f"{result.real_bytes / result.read.median / 1e3:.0f}"
        table.add_row(f"read ({result.reader})", "-", _us(result.read), "-", "-", "-", rate, "100.0 %")
    failed = [(name, outcome.failure) for name, outcome in result.outcomes.items() if outcome.failure]
    for name, outcome in result.outcomes.items():
        if outcome.us or not outcome.failure:
            table.add_row(*_row(result, name, outcome))
    console.print(table)
    if result.failure:
        console.print(Text(f"  failed: {result.failure}", style="red"), soft_wrap=True)
    for name, failure in failed:
        console.print(Text(f"  {name}: {failure}", style="yellow"), soft_wrap=True)


def print_limits(console: Console, rates: dict[str, float], empty: dict[str, Spread], failure: str) -> None:
    table = table_of("what the machine gives", "", "")
    for name, rate in sorted(rates.items(), key=lambda one: -one[1]):
        table.add_row(f"read-only stream, {name}", f"{rate:.0f} GB/s")
    for column, spread in empty.items():
        table.add_row(f"empty kernel, {column}", _us(spread) + Text(" us"))
    console.print(table)
    if failure:
        console.print(Text(f"  failed: {failure}", style="red"), soft_wrap=True)


def print_summary(console: Console, results: list[Result]) -> None:
    """The share of the read stream's rate that each backend reaches, by case and spelling."""
    names = [provider.name.removeprefix("fastpool ") for provider in FASTPOOL]
    table = table_of("share of the read stream's rate", "case", "MB", *names)
    for result in results:
        shares = [result.share(provider.name) for provider in FASTPOOL]
        cells = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
        table.add_row(result.case, f"{result.real_bytes / 1e6:.3g}", *cells)
    console.print(table)


def print_verdicts(console: Console, found: list[Verdict]) -> None:
    columns = (column for name in BACKENDS for column in (name, "worst"))
    table = table_of("goals", "goal", *columns, "where the worst is")
    table.columns[-1].justify = "left"
    for goal in dict.fromkeys(verdict.goal for verdict in found):
        of_goal = {verdict.backend: verdict for verdict in found if verdict.goal == goal}
        cells: list[Text | str] = []
        for name in BACKENDS:
            verdict = of_goal.get(name)
            if verdict is None:
                cells += ["-", ""]
                continue
            style = "green" if verdict.met == verdict.of else "red"
            cells += [Text(f"{verdict.met} of {verdict.of}", style=style), f"{verdict.worst:.3g}"]
        table.add_row(goal, *cells, "; ".join(dict.fromkeys(verdict.where for verdict in of_goal.values())))
    console.print(table)
