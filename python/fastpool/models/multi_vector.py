"""Models that give a vector of each token, for late interaction (ColBERT and its like): which tokens count, as
sentence-transformers' MultiVectorMask and PyLate say it."""

import string
from dataclasses import dataclass, field
from typing import Any

from .files import Document
from .sources import Sources

_STRATEGIES = ("fixed", "min")
_PYLATE = (
    *("query_prefix", "document_prefix", "query_length", "document_length", "skiplist_words"),
    *("attend_to_expansion_tokens", "do_query_expansion"),
)
_LENGTH = 32  # tokens of an expanded query, where nothing says how many


@dataclass(frozen=True)
class MultiVector:
    """Which of the vectors of tokens count: fastpool.keep_mask(ids, mask, skip=, keep=) and fastpool.tokens. Words that
    are skipped are tokens of the tokenizer's; those that it does not know are none."""

    skiplist_words: tuple[str, ...] = ()  # do not count in texts of these tasks
    skiplist_tasks: tuple[str, ...] = ("document",)
    keep_only_token_ids: tuple[int, ...] | None = None  # none but these count, but in queries
    query_prefix: str | None = None  # PyLate's: a token behind the first one
    document_prefix: str | None = None
    query_length: int | None = None  # tokens at most
    document_length: int | None = None
    # Queries are filled up with mask tokens, which count, to query_length: "fixed", or "min" where longer ones stay.
    query_expansion: str | None = None
    attend_to_expansion_tokens: bool = False
    source: str = field(default="", repr=False, compare=False)  # "2_MultiVectorMask/config.json"

    @staticmethod
    def read(document: Document, sources: Sources) -> "MultiVector":
        """Of the configuration of a MultiVectorMask, and of what surrounds it. Raises ValueError, naming file and
        key."""
        tasks = document.values.get("skiplist_tasks")
        if isinstance(tasks, str):
            tasks = [tasks]
        kept = document.get("keep_only_token_ids", list)
        if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in kept or ()):
            raise document.error("keep_only_token_ids", "a list of whole numbers, none of them negative")
        return MultiVector(
            skiplist_words=_strings(document, "skiplist_words", document.values.get("skiplist_words")) or (),
            skiplist_tasks=("document",) if tasks is None else _strings(document, "skiplist_tasks", tasks) or (),
            keep_only_token_ids=tuple(kept) if kept else None,
            source=document.name,
            **_around(sources),
        )

    @staticmethod
    def of_pylate(sources: Sources) -> "MultiVector":
        """Of a folder of PyLate's, which names no such module: config_sentence_transformers.json has the words, or they
        are those of punctuation. Raises ValueError, naming file and key."""
        model, key = sources.model, "skiplist_words"
        words = _strings(model, key, model.values.get(key))
        return MultiVector(
            skiplist_words=tuple(string.punctuation) if words is None else words, source=model.name, **_around(sources)
        )

    def __str__(self) -> str:
        rules = []
        if self.skiplist_words and self.skiplist_tasks:
            rules.append(f"{len(self.skiplist_words)} words left out of {' and '.join(self.skiplist_tasks)} texts")
        if self.keep_only_token_ids is not None:
            rules.append(f"of ids {', '.join(map(str, self.keep_only_token_ids))} alone, but in queries")
        return "a vector of each token" + (f" ({', '.join(rules)})" if rules else "")

    @property
    def counts_all(self) -> bool:
        """Every token of a text counts, and no others do."""
        return self.keep_only_token_ids is None and self.query_expansion is None and not self.skips

    @property
    def skips(self) -> bool:
        return bool(self.skiplist_words and self.skiplist_tasks)

    @property
    def instead(self) -> str:
        """What the model gives, and what gives it, where a vector pooled of token states is asked for."""
        return (
            f"a vector of each token ({self.source}): fastpool.tokens makes them of what token_layers make of its "
            "states, with truncate_dim and normalize, and of a mask by fastpool.keep_mask where not every token counts"
        )


def _strings(document: Document, key: str, said: object) -> tuple[str, ...] | None:
    if said is None:
        return None
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise document.error(key, "a list of strings")
    return tuple(said)


def _around(sources: Sources) -> dict[str, Any]:
    """What surrounds a text's tokens: in sentence-transformers' file about its Transformer, or, of PyLate, in the
    model's. As sentence-transformers reads both."""
    sentence, model = sources.sentence, sources.model
    found: dict[str, Any] = {key: model.get(key, str) for key in ("query_prefix", "document_prefix")}
    for key in ("query_length", "document_length"):
        said = sentence.positive(key)
        found[key] = model.positive(key) if said is None else said
    holder = next((one for one in (sentence, model) if "query_expansion" in one.values), None)
    if holder is not None:
        expansion = holder.get("query_expansion", dict)
        if expansion is not None:
            document = Document(f"{holder.name}: query_expansion", expansion)
            strategy, length = document.need("strategy", str), document.positive("length")
            if strategy not in _STRATEGIES:
                raise document.error("strategy", f"one of {', '.join(_STRATEGIES)}")
            if length is None:
                raise document.error("length", "a whole number above 0")
            found |= {"query_expansion": strategy, "query_length": length}
            found["attend_to_expansion_tokens"] = document.get("attend", bool) or False
    elif any(key in model.values for key in _PYLATE) and model.get("do_query_expansion", bool) is not False:
        found |= {"query_expansion": "fixed", "query_length": found["query_length"] or _LENGTH}
        found["attend_to_expansion_tokens"] = model.get("attend_to_expansion_tokens", bool) or False
    return found
