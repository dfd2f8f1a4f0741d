"""The demo from end to end."""

import platform
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastpool

from .. import terminal
from ..env import serves
from . import report
from .corpus import Doc, collect, sample
from .measure import Comparison
from .model import Model
from .quantized import stored
from .search import MODES, QUESTIONS, RIGHT_MODE, Question, Vectors, answers, found_by_name, vectors


def choose_docs(count: int) -> tuple[list[Doc], int]:
    """The docs to search, the questions' answers among them, and out of how many they were taken.

    Raises:
        FileNotFoundError: there are none.
    """
    docs = collect()
    if len(docs) < len(QUESTIONS):
        raise FileNotFoundError(
            "this Python came without the sources of its standard library, whose docstrings are searched"
        )
    return sample(docs, count, keep={question.expected for question in QUESTIONS if question.expected}), len(docs)


def _embed(model: Model, docs: list[Doc], batch_size: int, console: Console) -> tuple[Vectors, Vectors, Comparison]:
    """The vectors of the docs, those of their names, and what was measured on the way."""
    measured = Comparison(
        fastpool=lambda hidden, mask: fastpool.mean(hidden, mask, normalize=True), own=model.own_pooling
    )
    texts, names = Vectors(len(docs)), Vectors(len(docs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for_texts = progress.add_task("embedding docstrings", total=len(docs))
        for_names = progress.add_task("embedding their names", total=len(docs), start=False)
        for states in model.token_states([doc.text for doc in docs], batch_size):
            texts.add(states)
            measured.add(states)
            progress.advance(for_texts, len(states.indices))
        progress.start_task(for_names)
        for states in model.token_states([doc.words for doc in docs], batch_size):
            names.add(states)
            progress.advance(for_names, len(states.indices))
    return texts, names, measured


@torch.inference_mode()
def run(queries: Sequence[str], count: int, batch_size: int) -> int:
    """Runs the demo and prints it; 1 if fastpool's embeddings are not the model's.

    Raises:
        FileNotFoundError, ValueError: it cannot run here, and why.
    """
    start = time.perf_counter()
    console = terminal.console()
    backend = serves(torch.device("cpu"))
    docs, available = choose_docs(count)
    console.print(
        f"[bold]fastpool {fastpool.__version__}[/bold]: semantic search over {len(docs):,} of the {available:,} "
        f"docstrings of Python {platform.python_version()}'s standard library, embedded by all-MiniLM-L6-v2 on "
        f"{torch.get_num_threads()} CPU threads and pooled by fastpool's {backend} backend."
    )
    model = Model()
    texts, names, measured = _embed(model, docs, batch_size, console)
    report.agreement(console, measured, model.own_modules)
    report.costs(console, measured, measured.peak(), model.own_modules)

    questions = [*QUESTIONS, *(Question(query) for query in queries)]
    asked = vectors(len(questions), model.token_states([question.text for question in questions], batch_size))
    results = [
        (question, {mode: answers(question, asked[mode][i], docs, texts[mode]) for mode in MODES})
        for i, question in enumerate(questions)
    ]
    report.search(console, results)
    by_name = {mode: found_by_name(names[mode], texts[mode]) for mode in MODES}
    report.wrong_modes(console, results)
    report.summary(console, results, by_name, len(docs))
    report.quantized(console, stored(names[RIGHT_MODE], texts[RIGHT_MODE]), len(docs))
    console.print(f"\nTook {time.perf_counter() - start:.0f} s.")
    return 0 if measured.agree else 1
