"""What the demo prints."""

from rich.console import Console
from rich.table import Table

from ..terminal import text
from .corpus import Doc
from .measure import Comparison
from .quantized import Stored
from .search import MODES, QUESTIONS, RIGHT_MODE, Answers, Question

# For each question, what each mode answers.
Results = list[tuple[Question, dict[str, Answers]]]


def _size(size: float) -> str:
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("KB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _numbers(*headers: str) -> Table:
    """A table whose columns behind the first are numbers."""
    table = Table(*headers)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def agreement(console: Console, measured: Comparison, own: str) -> None:
    """Whether fastpool's vectors are the model's."""
    _heading(console, "Are they the same embeddings?")
    console.print(
        "Each text's token states went through fastpool.mean(hidden, mask, normalize=True), and the very same states "
        f"through the model's own {own}. Over all {measured.texts:,} texts:"
    )
    console.print(f"  largest difference of any number  {measured.max_difference:.1e}")
    console.print(f"  smallest cosine of the two        {measured.min_cosine:.9f}")
    console.print("  [green]Yes.[/green]" if measured.agree else "  [red]No: a cosine is below 0.99999.[/red]")


def costs(console: Console, measured: Comparison, peak: list[int], own: str) -> None:
    """What the pooling step costs in both ways."""
    _heading(console, "What does the pooling step cost?")
    ours, theirs = measured.seconds
    batches = measured.batches
    table = _numbers("", "fastpool", own, "ratio")
    table.add_row(
        f"time, all {batches} batches", f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms", f"{theirs / ours:.1f}"
    )
    table.add_row("time, one batch", f"{ours / batches * 1e6:.0f} us", f"{theirs / batches * 1e6:.0f} us", "")
    table.add_row("memory, largest batch", _size(peak[0]), _size(peak[1]), f"{peak[1] / max(peak[0], 1):.0f}")
    console.print(table)
    assert measured.largest is not None
    console.print(
        f"Only the pooling step, on {_size(measured.state_bytes)} of token states ({measured.real_tokens:,} tokens). "
        "Time: the fastest of several runs of each batch, taken in turns and added up; a busy machine blurs it. "
        "Memory: the most that PyTorch's allocator had handed out during the call, the result included, beside "
        f"{_size(measured.largest.hidden.nbytes)} of token states; the kilobytes per thread that fastpool's C++ takes "
        "from elsewhere are not in it.",
        style="dim",
    )


def _beginning(doc: Doc, width: int) -> str:
    return doc.text if len(doc.text) <= width else doc.text[: width - 3] + "..."


def search(console: Console, results: Results) -> None:
    """The answers of the right mode."""
    _heading(console, "Does search with them work?")
    console.print("The three docstrings closest to each question, by cosine; * is the answer that was expected:")
    for question, by_mode in results:
        console.print()
        console.print(text("  ", (question.text, "cyan")))
        for score, doc in by_mode[RIGHT_MODE].best:
            mark = ("*", "green") if doc.name == question.expected else " "
            beginning = _beginning(doc, max(console.width - len(doc.name) - 12, 24))
            line = text("  ", mark, f" {score:.2f}  ", (doc.name, "bold"), "  ", beginning)
            console.print(line, no_wrap=True, overflow="ellipsis")


def _place(rank: int | None) -> str:
    return "-" if rank is None else f"[{'green' if rank == 1 else 'red'}]{rank}[/]"


def wrong_modes(console: Console, results: Results) -> None:
    """The same questions in every mode."""
    _heading(console, "And with the wrong pooling mode?")
    console.print(
        "This model was trained with mean pooling. Another mode is one word of configuration away, and no error is "
        "raised with it: the vectors have the same shape and the same length. Only the answers change. Place: where "
        "the expected answer comes out."
    )
    table = Table(show_lines=True)
    table.add_column("question")
    table.add_column("mode", no_wrap=True)
    table.add_column("place", no_wrap=True, justify="right")
    # What the other columns need at least, or a long name would take it from them.
    table.add_column("first answer", no_wrap=True, max_width=max(console.width - 50, 20))
    table.add_column("cosine", no_wrap=True)
    for question, by_mode in results:
        answers = [by_mode[mode] for mode in MODES]
        table.add_row(
            text((question.text, "cyan")),
            "\n".join(MODES),
            "\n".join(_place(answer.rank) for answer in answers),
            "\n".join(answer.best[0][1].name for answer in answers),
            "\n".join(f"{answer.best[0][0]:.2f}" for answer in answers),
        )
    console.print(table)


def summary(console: Console, results: Results, by_name: dict[str, float], docs: int) -> None:
    """How often each mode is right."""
    known = [by_mode for question, by_mode in results if question.expected]
    table = _numbers("", *MODES)
    for title, place in (("expected answer first", 1), ("expected answer in the first three", 3)):
        hits = [sum((by_mode[mode].rank or docs) <= place for by_mode in known) for mode in MODES]
        table.add_row(title, *(f"{hit} of {len(known)}" for hit in hits))
    sure = [sum(by_mode[mode].best[0][0] for _, by_mode in results) / len(results) for mode in MODES]
    table.add_row("cosine of the first answer, average", *(f"{cosine:.2f}" for cosine in sure))
    table.add_row(f"found by name, of all {docs:,}", *(f"{by_name[mode]:.1%}" for mode in MODES))
    console.print(table)
    console.print(
        f"The {len(QUESTIONS)} questions were picked by hand as ones that mean pooling answers. The last row was not: "
        f'each of the {docs:,} names is asked as a question, textwrap.dedent as "textwrap dedent", and counts if its '
        "own docstring is among the first three answers. A higher cosine does not mean a better answer.",
        style="dim",
    )


def quantized(console: Console, kinds: dict[str, Stored], docs: int) -> None:
    """What vectors in bytes and bits cost and lose."""
    _heading(console, "And in less memory?")
    console.print(
        "fastpool.quantize makes a byte, or a bit, of each number of the docstrings' vectors; questions stay as they "
        f"are. With each of the {docs:,} names asked as a question:"
    )
    table = _numbers("", *kinds)
    every = kinds.values()
    table.add_row(f"memory, {docs:,} vectors", *(_size(kind.bytes) for kind in every))
    table.add_row("float32's first answer comes first", *(f"{kind.same_first:.1%}" for kind in every))
    table.add_row("of float32's first ten answers found", *(f"{kind.same_ten:.1%}" for kind in every))
    table.add_row(f"found by name, of all {docs:,}", *(f"{kind.by_name:.1%}" for kind in every))
    console.print(table)
