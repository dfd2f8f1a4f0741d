"""Pairs of related and of unrelated texts: of our own making, or from a file."""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..text import shown

SEED = 0
OWN = Path(__file__).parent / "pairs.tsv"
_LARGEST = 2**25  # characters of a file
FEWEST = 8  # of either kind; what is measured on fewer says nothing

Kind = Literal["pairs", "labels", "scores"]

# What columns of texts are called: text_a, "Sentence 1", query. Such words are not compared as texts.
_COLUMN_NAME = re.compile(
    r"[ab]|[qs]\d|(anchor|answer|article|body|claim|completion|doc|document|evidence|hypothesis|input|neg|negative|passage"
    r"|phrase|pos|positive|premise|prompt|query|question|response|sent|sentence|source|src|string|summary|target|text|tgt"
    r"|title|word)([ _-]?text)?[ _-]?[ab\d]?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pairs:
    """Texts side by side, and how closely each two are related: 1 and 0, or a person's scores."""

    source: str
    kind: Kind  # what the source gave
    a: list[str]
    b: list[str]
    scores: list[float]

    @property
    def middle(self) -> float:
        """What lies above is related: of the range of scores; of 0 and 1 where there are none."""
        return (min(self.scores) + max(self.scores)) / 2 if self.kind == "scores" else 0.5

    @property
    def related(self) -> list[bool]:
        middle = self.middle
        return [score > middle for score in self.scores]


@dataclass(frozen=True)
class _Row:
    """One line: its texts, and its label or score where it has one."""

    a: str
    b: str
    key: str | None = None  # "label" or "score"; TSV has no names and says "label or score"
    value: float = 1.0


def _checked(row: _Row) -> _Row:
    for name, text in (("a", row.a), ("b", row.b)):
        if not text.strip():
            raise ValueError(f"expected two texts, got an empty text_{name}")
        # JSON can name half of a surrogate pair, which no tokenizer takes.
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"text_{name} holds {half[0]!r}, which is no character")
    if not math.isfinite(row.value) or (row.key == "label" and row.value not in (0, 1)):
        raise ValueError(f"{row.key} must be {'0 or 1' if row.key == 'label' else 'a number'}, got {row.value}")
    return row


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_header(line: str) -> bool:
    """A first line of names, and no number behind them: as a pair it would count for two related texts."""
    names = [column.strip(' "') for column in line.rstrip("\r").split("\t")]
    return len(names) in (2, 3) and all(map(_COLUMN_NAME.fullmatch, names[:2])) and not any(map(_is_number, names[2:]))


def _tsv(line: str) -> _Row:
    columns = line.split("\t")
    if len(columns) not in (2, 3):
        raise ValueError(
            f"expected text_a, text_b and maybe a label or score, with tabs between, got {len(columns)} columns"
        )
    if len(columns) == 2:
        return _Row(columns[0], columns[1])
    if not _is_number(columns[2]):
        raise ValueError(f"label or score must be a number, got {shown(columns[2])}")
    return _Row(columns[0], columns[1], "label or score", float(columns[2]))


def _jsonl(line: str) -> _Row:
    expected = 'expected {"a": ..., "b": ...} and maybe "label" or "score"'
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}, got no JSON: {error}") from None
    # A key that is not known may be a "scores" misspelt, which must not be left out without a word.
    if not isinstance(found, dict) or not {"a", "b"} <= set(found) <= {"a", "b", "label", "score"}:
        raise ValueError(f"{expected}, got {', '.join(found) if isinstance(found, dict) else type(found).__name__}")
    for name in ("a", "b"):
        if not isinstance(found[name], str):
            raise ValueError(f"{name} must be a string, got {shown(found[name])}")
    keys = [key for key in ("label", "score") if key in found]
    if not keys:
        return _Row(found["a"], found["b"])
    if len(keys) == 2:
        raise ValueError(f"{expected}, got both")
    value = found[keys[0]]
    if not isinstance(value, int | float):
        raise ValueError(f"{keys[0]} must be {'0 or 1' if keys[0] == 'label' else 'a number'}, got {shown(value)}")
    return _Row(found["a"], found["b"], keys[0], float(value))


def _rows(path: Path) -> list[_Row]:
    parse: Callable[[str], _Row] = _jsonl if path.suffix in (".jsonl", ".ndjson") else _tsv
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_LARGEST + 1)
    except OSError as error:
        if error.filename is not None:  # it could not be opened
            raise
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror or error}") from None
    except ValueError as error:  # a name that no file may have is one, too
        raise ValueError(f"{path}: expected UTF-8, got {error}") from None
    if len(text) > _LARGEST:
        raise ValueError(f"{path}: expected at most {_LARGEST} characters, got more")
    lines = text.split("\n")  # not splitlines(): texts may hold U+2028 and the like
    rows: list[_Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if parse is _tsv and not rows and _is_header(line):
                raise ValueError(
                    "expected pairs from the first line on (or a label, if these are two texts), got the header row "
                    f"{shown(line)}"
                )
            row = _checked(parse(line))
            if rows and row.key != rows[0].key:
                raise ValueError(f"expected {rows[0].key or 'no label or score'}, as in the lines before")
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def _with_unrelated(rows: Sequence[_Row], order: Sequence[int]) -> list[_Row]:
    """The rows, and each text_a with the text_b of the row that follows in `order`, of the last row with the first."""
    given = {(row.a, row.b) for row in rows}
    follow = zip(order, [*order[1:], *order[:1]], strict=True)
    paired = [_Row(rows[i].a, rows[j].b, value=0.0) for i, j in follow]
    return [*rows, *(row for row in paired if (row.a, row.b) not in given and row.a != row.b)]


def read(path: Path | None = None) -> Pairs:
    """Pairs of a TSV file (text_a, text_b, maybe a label or score; no header row) or a JSONL one ({"a", "b", maybe
    "label" or "score"}); without a path, our own.

    Labels are 1 for related and 0 for unrelated; in TSV, numbers that are all 0 or 1 are labels. With scores, what
    lies above the middle of their range is related. Without either the given pairs are related, and shuffled ones
    (seeded) unrelated.

    Raises:
        OSError: no such file.
        ValueError: it is malformed, or holds too few pairs or scores; names the file, the line and what was expected.
    """
    rows = _rows(path or OWN)
    if rows and rows[0].key is not None:
        kind: Kind = "labels" if {row.value for row in rows} <= {0.0, 1.0} and rows[0].key != "score" else "scores"
    else:
        kind = "pairs"
        order = list(range(len(rows)))
        if path is not None:
            random.Random(SEED).shuffle(order)
        # Ours stand by subject, so that the next one is about the same: easier ones, every mode tells apart.
        rows = _with_unrelated(rows, order)
    pairs = Pairs(
        "fastpool's own pairs" if path is None else str(path),
        kind,
        [row.a for row in rows],
        [row.b for row in rows],
        [row.value for row in rows],
    )
    related, different = sum(pairs.related), len(set(pairs.scores))
    if kind == "scores":  # ranks need no two kinds
        if len(rows) < 2 * FEWEST or different < 2:
            raise ValueError(
                f"{pairs.source}: expected at least {2 * FEWEST} pairs and 2 different scores, got {len(rows)} and "
                f"{different}"
            )
    elif min(related, len(rows) - related) < FEWEST:
        raise ValueError(
            f"{pairs.source}: expected at least {FEWEST} related and {FEWEST} unrelated pairs, got {related} and "
            f"{len(rows) - related}"
        )
    return pairs
