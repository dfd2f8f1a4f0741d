"""sentence-transformers' SpladePooling: a sparse vector of a text, a weight for each word of the vocabulary, of the
logits that a masked language model's head gives for each token."""

from dataclasses import dataclass, field
from typing import Any

from .files import Document

_POOLINGS = ("max", "sum")
_ACTIVATIONS = {"relu": "log1p(relu(logit))", "log1p_relu": "log1p(log1p(relu(logit)))"}


@dataclass(frozen=True)
class Splade:
    """fastpool.splade(logits, mask, pooling=, activation=): the maximum or the sum over real tokens, CLS and SEP among
    them, of log1p(relu(logit)), or of log1p of that."""

    pooling: str = "max"
    activation: str = "relu"  # or "log1p_relu"
    max_active_dims: int | None = None  # as many of the largest weights are kept; None: all
    columns: int | None = field(default=None, repr=False, compare=False)  # of the logits, as the module says
    source: str = field(default="", repr=False, compare=False)  # "1_SpladePooling/config.json"

    @staticmethod
    def read(document: Document, model: Document) -> "Splade":
        """Of the module's configuration and the model's. Raises ValueError, naming file and key."""
        said: dict[str, Any] = {}
        for name, key, known in (
            ("pooling", "pooling_strategy", _POOLINGS),
            ("activation", "activation_function", tuple(_ACTIVATIONS)),
        ):
            value = document.values.get(key, known[0])  # sentence-transformers' default is the first
            if not isinstance(value, str) or value not in known:
                raise document.error(key, f"one of {', '.join(known)}")
            said[name] = value
        columns = document.positive("embedding_dimension") or document.positive("word_embedding_dimension")
        most = model.positive("max_active_dims")
        return Splade(max_active_dims=most, columns=columns, source=document.name, **said)

    def __str__(self) -> str:
        largest = "" if self.max_active_dims is None else f", the {self.max_active_dims} largest"
        return f"sparse, {self.pooling} over tokens of {_ACTIVATIONS[self.activation]}{largest}"

    @property
    def _kept(self) -> str:
        if self.max_active_dims is None:
            return ""
        return f", and fastpool.sparse_csr(vectors, top={self.max_active_dims}) keeps the largest weights"

    @property
    def instead(self) -> str:
        """What the model gives, and what gives it, where a vector pooled of token states is asked for."""
        return (
            f"sparse vectors ({self.source}): fastpool.splade(logits, mask, pooling={self.pooling!r}, "
            f"activation={self.activation!r}) makes them of the logits of its language model's head{self._kept}"
        )
