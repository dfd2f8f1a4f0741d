"""Questions to the standard library, and where the right answer comes out in each pooling mode."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastpool

from .corpus import Doc
from .model import TokenStates

# What the model was trained with comes first; every other one runs as smoothly and is wrong for it.
RIGHT_MODE = "mean"
MODES = (RIGHT_MODE, "cls", "last", "max")


@dataclass(frozen=True)
class Question:
    text: str
    expected: str | None = None  # the name of the docstring that answers it, where that is known


# Picked by hand as questions that mean pooling answers; `by_name` in run.py is the measure that nobody picked.
QUESTIONS = (
    Question("How do I create a temporary folder that is deleted afterwards?", "tempfile.TemporaryDirectory"),
    Question("How do I open a web page in the browser?", "webbrowser.open"),
    Question("How do I merge several sorted lists?", "heapq.merge"),
    Question("What are the most frequent items in a list?", "collections.Counter.most_common"),
    Question("How many days are in February?", "calendar.monthrange"),
)


class Vectors:
    """The vectors of a list of texts, in every mode, from one run of the transformer."""

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._vectors: dict[str, Tensor] = {}

    def add(self, states: TokenStates) -> None:
        for mode in MODES:
            pooled = getattr(fastpool, mode)(states.hidden, states.mask, normalize=True)
            if mode not in self._vectors:
                self._vectors[mode] = pooled.new_empty(self._texts, pooled.shape[1])
            self._vectors[mode][states.indices] = pooled

    def __getitem__(self, mode: str) -> Tensor:
        return self._vectors[mode]


def vectors(texts: int, batches: Iterable[TokenStates]) -> Vectors:
    found = Vectors(texts)
    for states in batches:
        found.add(states)
    return found


@dataclass(frozen=True)
class Answers:
    """What one mode answers to one question."""

    best: list[tuple[float, Doc]]
    rank: int | None  # of the expected answer, counted from 1


def answers(question: Question, vector: Tensor, docs: list[Doc], doc_vectors: Tensor, count: int = 3) -> Answers:
    """The docs closest to the question, by cosine: all vectors have length 1."""
    scores = doc_vectors @ vector
    order = scores.argsort(descending=True, stable=True).tolist()
    names = [docs[i].name for i in order]
    rank = names.index(question.expected) + 1 if question.expected in names else None
    return Answers([(scores[i].item(), docs[i]) for i in order[:count]], rank)


def found_by_name(names: Tensor, doc_vectors: Tensor, within: int = 3) -> float:
    """The share of docs that their own name, asked as a question, finds among the first `within`."""
    scores = names @ doc_vectors.T
    ahead = (scores > scores.diagonal().unsqueeze(1)).sum(1)
    return (ahead < within).to(torch.float64).mean().item()
