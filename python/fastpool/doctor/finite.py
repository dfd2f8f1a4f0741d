"""Token states that are not finite, in the words of a text: fastpool's own validation knows rows and columns alone, and
only of tokens that a mode looks at."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import name_of
from ..text import shown

HINT = "--trace tells which layer began; an overflow of float16 is the usual cause"
_SHOWN = 60  # characters of a text


def not_finite(model: Any, texts: Sequence[str], features: Mapping[str, Any]) -> str | None:
    """The first state of a real token that is inf or NaN: its text, token, column and value; None if there is none.
    What stands in padding is nobody's."""
    states, real = features["token_embeddings"], features["attention_mask"] != 0
    if states.shape[:-1] != real.shape:
        return None  # pooling says what is wrong
    wrong = ~states.isfinite() & real[..., None]
    if not wrong.any():
        return None
    text, at, column = wrong.nonzero()[0].tolist()
    token = at - int(real[text].int().argmax())
    beginning = repr(texts[text][:_SHOWN]) + ("..." if len(texts[text]) > _SHOWN else "")
    return (
        f"states must be finite, got {states[text, at, column].item()} in {name_of(states.dtype)}: text "
        f"{beginning}, token {token}{_spelt(model, features, text, at)} (the first is 0), column {column}"
    )


def _spelt(model: Any, features: Mapping[str, Any], text: int, at: int) -> str:
    """What the tokenizer calls a token, where there is one."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    ids = features.get("input_ids")
    if ids is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return ""
    return f" {shown(tokenizer.convert_ids_to_tokens(int(ids[text, at])))}"
