"""What was decided about a model, and what is to be said about it."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..text import told
from .files import Document

T = TypeVar("T")
Certainty = Literal["stated", "implied", "guessed"]


@dataclass(frozen=True)
class Decision:
    """One answer: what was decided, from which file and key, and how sure that is."""

    what: str  # the field of PoolingConfig
    value: Any
    source: str  # "1_Pooling/config.json: pooling_mode"
    certainty: Certainty


@dataclass
class Record:
    """Decisions as they are made, and warnings; some of these are about a guess, some about a contradiction between
    what different readers of the folder go by. Words in them come from the folder, so what people are told is made
    visible and bounded here; values are as they are."""

    decisions: list[Decision] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    def decide(self, what: str, value: T, source: str, certainty: Certainty) -> T:
        self.decisions.append(Decision(what, value, told(source), certainty))
        return value

    def guess(self, what: str, value: T, source: str, consequence: str) -> T:
        self.guesses.append(told(consequence))
        self.warn(consequence)
        return self.decide(what, value, source, "guessed")

    def stated(self, what: str, document: Document, key: str, kind: type[T]) -> T | None:
        value = document.get(key, kind)
        return None if value is None else self.decide(what, value, f"{document.name}: {key}", "stated")

    def warn(self, text: str) -> None:
        self.warnings.append(told(text))

    def contradiction(self, text: str) -> None:
        self.contradictions.append(told(text))
        self.warn(text)
