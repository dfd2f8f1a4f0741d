"""What the doctor says: a verdict in words, a table, JSON, a picture."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..models import PoolingConfig
from ..terminal import console, text
from ..text import told
from .embed import WITHOUT
from .measure import CONFIDENCE, Measured, Row
from .pairs import Pairs
from .trace import FLOAT16_MAXIMUM, FLOAT16_OVERFLOWS, Peak, Trace

_LEVEL = f"{CONFIDENCE:.0%}"


def _measure(measured: Measured) -> str:
    return "Spearman" if measured.configured.spearman is not None else "AUC"


def _change(row: Row, own: Row) -> str:
    """What sets a row apart from the configured one, where it is one thing: "cls", or "not normalised"."""
    if row.normalize == own.normalize:
        return row.label
    return "normalised" if row.normalize else "not normalised"


def _source(config: PoolingConfig, what: str, own: Row) -> str:
    """Where the configured row's modes or normalisation come from; the latter from what vectors are compared by, where
    the model itself does not normalise, or gives sparse ones."""
    sparse = config.sparse is not None
    if what == "normalize" and (sparse or (own.normalize and not config.normalize)):
        if config.similarity is None:
            by = "cosine" if own.normalize else "the dot product"
            return f"no similarity_fn_name, for which sentence-transformers takes {by} (implied)"
        what = "similarity"
    if what == "modes" and sparse:
        what = "sparse"
    said = config.decision(what)
    return f"{said.source} ({said.certainty})"


@contextmanager
def progress(texts: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, gone in the end; gives what it is to be advanced with."""
    if not shown:
        yield lambda count: None
        return
    from rich.progress import Progress

    to = console(stderr=True)
    # What else is written meanwhile is not for rich to print, which would do so past terminal.Lines.
    with Progress(
        console=to, transient=True, disable=not to.is_terminal, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task("embedding", total=texts)
        yield lambda count: bar.advance(task, count)


def verdict(measured: Measured, config: PoolingConfig) -> list[str]:
    """Is the configured pooling the best, and what would a wrong one cost: a sentence or two each."""
    name, own, best = _measure(measured), measured.configured, measured.best
    told = f"{name} {own.decides:.3f} ({_LEVEL} interval {own.interval.low:.3f} to {own.interval.high:.3f})"
    if measured.better:
        # Of several that are better, the first has the highest figure, and need not be better than the second.
        first, *others = measured.better
        more = f"{first.difference.low:.3f} to {first.difference.high:.3f} more"
        changed = [what for what in ("modes", "normalize") if getattr(first, what) != getattr(own, what)]
        sources = [_source(config, what, own) for what in changed]
        lines = [
            f"The configured pooling is NOT the best here. {own.name}: {told}. {first.name}: {name} "
            f"{first.decides:.3f}, {more}.",
            *([f"Also better: {'; '.join(row.name for row in others)}."] if others else []),
            f"The configured one comes from {'; '.join(sources)}.",
        ]
    elif best is own:
        lines = [f"The configured pooling is the best measured here. {own.name}: {told}."]
    else:
        lines = [
            f"The configured pooling is as good as the best measured here. {own.name}: {told}. {best.name}: {name} "
            f"{best.decides:.3f}, which is within sampling error."
        ]
    if own.interval.low <= (0 if name == "Spearman" else 0.5):
        lines.append("It does not measurably tell related texts from unrelated ones at all.")

    def one_change(rows: list[Row]) -> list[Row]:
        return [row for row in rows if row.normalize == own.normalize or row.modes == own.modes]

    if tied := one_change(measured.tied):
        lines.append(f"These pairs do not tell it apart from: {', '.join(_change(row, own) for row in tied)}.")
    for row in one_change(measured.worse):
        instead = own.label if row.normalize == own.normalize else _change(own, row)
        less = f"{-row.difference.high:.3f} to {-row.difference.low:.3f} less"
        lines.append(f"{_change(row, own)} instead of {instead}: {name} {row.decides:.3f}, {less}.")
    if own.non_zeros is not None:
        lines.append(_about_special(measured))
    if not measured.worse:
        lines.append("No other pooling is measurably worse; more pairs, or harder ones, may tell.")
    return lines


def _about_special(measured: Measured) -> str:
    """How sparse the configured vectors are, and what [CLS] and [SEP] have to do with it."""
    own, name = measured.configured, _measure(measured)
    told = f"On average {own.non_zeros:.1f} weights of a text are not 0"
    for row in measured.rows:
        if row.modes == (WITHOUT,) and row.normalize == own.normalize:
            change = f"{row.difference.low:+.3f} to {row.difference.high:+.3f}"
            told += f"; without CLS and SEP {row.non_zeros:.1f}, and {name} is {row.decides:.3f} ({change})"
    return f"{told}."


def document(model: str, measured: Measured, config: PoolingConfig, trace: Trace | None = None) -> dict[str, Any]:
    """All of it, as JSON can hold it."""
    pairs, related = measured.pairs, sum(measured.pairs.related)
    return {
        "model": model,
        "configured": {
            "modes": list(measured.configured.modes),
            "normalize": config.normalize,
            "similarity": config.similarity and told(config.similarity),
        },
        "warnings": list(config.warnings),
        "pairs": {
            "source": pairs.source,
            "kind": pairs.kind,
            "related": related,
            "unrelated": len(pairs.scores) - related,
        },
        "decided_by": _measure(measured).lower(),
        "confidence": CONFIDENCE,
        "poolings": [_plain(row, row is measured.configured) for row in measured.rows],
        "configured_is_best": not measured.better,
        "verdict": verdict(measured, config),
        "trace": None if trace is None else _plain_trace(trace),
    }


def _plain_trace(trace: Trace) -> dict[str, Any]:
    def figures(peak: Peak | None) -> dict[str, Any]:
        names = {"largest": "largest", "dtype": "dtype", "of_float16_maximum": "of_float16"}
        return {key: None if peak is None else getattr(peak, name) for key, name in names.items()}

    top = trace.largest
    return {
        "largest": None if top is None else {"name": top.name, **figures(top)},
        "not_finite_within": None if trace.within is None else trace.within.name,
        "not_counted": trace.not_counted,
        "blocks": [
            {"name": block.name, **figures(block.peak), "not_counted": block.not_counted} for block in trace.blocks()
        ],
    }


def _plain(row: Row, configured: bool) -> dict[str, Any]:
    figures = {name: getattr(row, name) for name in ("related", "unrelated", "cohens_d", "auc", "spearman")}
    return {
        "modes": list(row.modes),
        "normalize": row.normalize,
        "compared_by": "cosine" if row.normalize else "dot",
        "configured": configured,
        # d is infinite where neither kind varies, which JSON cannot say.
        **{name: value if math.isfinite(value or 0) else None for name, value in figures.items()},
        "interval": [row.interval.low, row.interval.high],
        "difference": [row.difference.low, row.difference.high],
        "non_zeros": row.non_zeros,
    }


def render(model: str, measured: Measured, config: PoolingConfig, trace: Trace | None = None) -> None:
    """Prints it for people."""
    from rich.table import Table

    out = console()
    pairs, related, name = measured.pairs, sum(measured.pairs.related), _measure(measured)
    counts = f"{related} related and {len(pairs.scores) - related} unrelated pairs"
    out.print(text((model, "bold"), f" on {counts}"))
    out.print(text((_about_pairs(pairs), "dim")), end="\n\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("compared by", no_wrap=True)
    columns = ["related", "unrelated", "d", "AUC", *(["Spearman"] if name == "Spearman" else []), f"{name} against *"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in measured.rows:
        own = row is measured.configured
        figures = [(row.related, ".4g"), (row.unrelated, ".4g"), (row.cohens_d, ".2f"), (row.auc, ".3f")]
        cells = ["-" if figure is None else format(figure, digits) for figure, digits in figures]
        if row.spearman is not None:
            cells.append(f"{row.spearman:.3f}")
        cells.append("" if own else f"{row.difference.low:+.3f} to {row.difference.high:+.3f}")
        style = "bold green" if own else "red" if row in measured.worse else "yellow" if row in measured.better else ""
        by = "cosine" if row.normalize else "dot product"
        table.add_row(f"{'*' if own else ' '} {row.label}", by, *cells, style=style)
    out.print(table)
    out.print(
        "\n[dim]* the configured pooling. Cosine compares normalised vectors, the dot product those that are not. d: "
        f"difference of the means in standard deviations. Last column: difference, {_LEVEL} interval.[/dim]\n"
    )
    for line in verdict(measured, config):
        out.print(text(line))
    if measured.configured.normalize and not config.normalize:
        cosine = "asks for cosine" if config.similarity else "names no similarity: sentence-transformers takes cosine"
        out.print(f"\nThe model does not normalise, but {cosine}, which does: the normalised row is its own.")
    for warning in config.warnings:
        out.print()
        out.print(text(("Its folder:", "yellow"), " ", warning))
    if trace is not None:
        out.print()
        out.print(text(_about_trace(trace)), end="\n\n")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("layer", no_wrap=True)
        missing = ["modules not counted"] if trace.not_counted else []
        for column in ("largest", "of float16's maximum", *missing):
            table.add_column(column, justify="right", no_wrap=True)
        for block in trace.blocks():
            peak = block.peak
            cells = ["not seen", ""] if peak is None else [f"{peak.largest:.5g}", f"{peak.of_float16:.3%}"]
            table.add_row(text(block.name), *cells, *([str(block.not_counted)] if missing else []))
        out.print(table)
        out.print("\n[dim]What modules take and give; what they compute in between may be larger.[/dim]")


def _about_trace(trace: Trace) -> str:
    top = trace.largest
    told = "All final states are finite."
    if top is not None:
        told += (
            f" The largest that a module {'was seen to take or give' if trace.not_counted else 'took or gave'} was "
            f"{top.largest:.5g} in {top.dtype}, in {top.name or 'the model itself'}: {top.of_float16:.3%} of float16's "
            f"maximum, {FLOAT16_MAXIMUM:g}."
        )
        if top.largest >= FLOAT16_OVERFLOWS:
            told += " In float16 it would overflow."
    if trace.not_counted:
        told += f" {trace.not_counted_told()}."
    if trace.within is not None:
        told += f" Within, {trace.within.called} gave what is not finite, which later ones made finite again."
    return told


def _about_pairs(pairs: Pairs) -> str:
    if pairs.kind == "scores":
        return f"{pairs.source}; related is what scores above {pairs.middle:g}, the middle of the range"
    if pairs.kind == "pairs":
        return f"{pairs.source}; unrelated pairs are the same texts paired anew"
    return pairs.source


def plot(path: Path, model: str, measured: Measured) -> None:
    """Histograms of both kinds' similarities, a panel for each pooling."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    is_related = measured.pairs.related
    modes = list(dict.fromkeys(row.modes for row in measured.rows))
    figure = Figure(figsize=(9, 1.5 * len(modes) + 1), layout="constrained")
    panels = figure.subplots(len(modes), 2, squeeze=False)
    for row in measured.rows:
        panel = panels[modes.index(row.modes), 0 if row.normalize else 1]
        kinds = [
            [s for s, r in zip(row.similarities.tolist(), is_related, strict=True) if r is kind]
            for kind in (True, False)
        ]
        panel.hist(kinds, bins=30, histtype="stepfilled", alpha=0.6, label=["related", "unrelated"])
        mark = " (configured)" if row is measured.configured else ""
        panel.set_title(
            f"{row.name}: {_measure(measured)} {row.decides:.3f}{mark}", fontsize=9, weight="bold" if mark else "normal"
        )
        panel.set_yticks([])
        panel.tick_params(labelsize=8)
    for panel, label in zip(panels[-1], ("cosine", "dot product"), strict=True):
        panel.set_xlabel(label)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    # A folder's name may hold dollars, which are no formula.
    figure.suptitle(f"{told(model)}: how each pooling separates {len(is_related)} pairs", parse_math=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # which does not always say where
        raise ValueError(f"--plot: {path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
