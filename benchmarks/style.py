"""How the figures are drawn: the colours and marks of providers, and what all figures share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.case_results import Result, from_json
from benchmarks.providers import BARE_LOOP, LAYOUTS, PEERS, ours

INK, FAINT, BLUE = "#333333", "#777777", "#0072B2"
_OURS = {"triton": ("#56B4E9", BLUE), "native": ("#E69F00", "#D55E00")}  # mask, packed
THEIRS = {"padded": "#A9845C", "packed": "#868C94"}
EPSILON = {"fp32": 2**-23, "bf16": 2**-7, "fp16": 2**-10}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fastpool",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.edgecolor": "#AAAAAA",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlecolor": FAINT,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 5,
    "lines.linewidth": 1.1,
}


@dataclass(frozen=True)
class Style:
    label: str
    colour: str
    marker: str = ""
    ours: str = ""  # the colour of fastpool's name

    @property
    def line(self) -> dict[str, Any]:
        weight = {"linewidth": 2.4, "markersize": 6.5, "zorder": 5} if self.ours else {"zorder": 3}
        return {"color": self.colour, "marker": self.marker, **weight}


READ = Style("one plain read", "black")


def styles_of(device: str) -> dict[str, Style]:
    """The styles of all providers that are drawn, by name, the least important first."""
    peers = [peer.name for peer in PEERS if peer is not BARE_LOOP]
    found = {name: Style(name, THEIRS[LAYOUTS[name]], mark) for name, mark in zip(peers, "s^Dvs^DvPX", strict=True)}
    for backend in ("native",) if device == "cpu" else ("native", "triton"):
        colours = _OURS["triton" if device == "cpu" else backend]
        for input_layout, colour, mark in zip(("mask", "packed"), colours, "do", strict=True):
            name = ours(backend, input_layout)
            found[name] = Style(name.replace(" native", "") if device == "cpu" else name, colour, mark, colours[1])
    return found


def suite_of(record: dict[str, Any], suite: str) -> list[Result]:
    return [result for result in map(from_json, record.get("cases", [])) if result.suite == suite and result.outcomes]


def between(values: Sequence[float], digits: str) -> str:
    low, high = format(min(values), digits), format(max(values), digits)
    return low if low == high else f"{low} to {high}"


def time_of(us: float) -> str:
    for unit in ("us", "ms"):
        if us < 1000:
            return f"{us:.3g} {unit}"
        us /= 1000
    return f"{us:.3g} s"


def clock_of(record: dict[str, Any]) -> str:
    return "time of a call, us" if record["device"] == "cuda" else "CPU time of a call on one thread, us"


def figure_of(record: dict[str, Any], height: float, title: str, *grid: int, **options: Any) -> tuple[Any, Any]:
    """9 inches wide, the message above, where it comes from below."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    machine, versions = record.get("machine", {}), record.get("versions", {})
    sha, plus, changes = str(record.get("commit", "unknown")).partition("+")
    footer = (
        machine.get("gpu") or f"{machine.get('cpu', 'unknown machine')}, {machine.get('cores', '?')} cores",
        f"torch {versions.get('torch', 'unknown')}",
        f"fastpool commit {sha[:8]}{plus}{changes}, {str(record.get('date', ''))[:10]}",
        "benchmarks/run.py",
    )
    figure = Figure(figsize=(9, height))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    figure.supxlabel("; ".join(footer), x=0.01, ha="left", fontsize=7, color=FAINT)
    return figure, figure.subplots(*grid, **options)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, Style]], inches: float) -> None:
    """Names at the right of lines that end in (x, y), moved apart where they would overlap."""
    axes.autoscale_view()
    fraction, line = axes.transScale + axes.transLimits, 0.145 / inches
    placed = sorted(([fraction.transform((x, y))[1], x, y, style] for x, y, style in ends), key=lambda one: one[0])
    for _ in range(500):
        for below, above in pairwise(placed):
            lines = 1 + (below[3].label.count("\n") + above[3].label.count("\n")) / 2
            if (missing := lines * line - (above[0] - below[0])) > 1e-6:
                below[0], above[0] = below[0] - missing / 2, above[0] + missing / 2
        placed[0][0], placed[-1][0] = max(placed[0][0], 0), min(placed[-1][0], 1)
    for height, x, y, style in placed:
        leader = {
            "arrowstyle": "-",
            "color": style.colour,
            "linewidth": 0.6,
            "relpos": (0, 0.5),
            "shrinkA": 0,
            "shrinkB": 4,
        }
        text = axes.annotate(style.label, (x, y), (1.035, height), "data", "axes fraction", leader, False, va="center")
        text.set(fontsize=8.5, color=style.ours or INK, fontweight="bold" if style.ours else "normal")


@contextmanager
def styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a figure must not depend on the settings of the process that draws it
        matplotlib.rcParams.update(_STYLE)
        yield
