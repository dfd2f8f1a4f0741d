"""Where folders state their pooling, besides a Pooling module: llm2vec_config.json, and keys of config.json that
models' own code reads, among them the latent attention of NV-Embed and its like."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .families import architecture, parts
from .files import Document, inside
from .sources import Sources

# LLM2Vec's name -> ours (llm2vec 0.2.3, llm2vec.py: get_pooling).
_LLM2VEC = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "last",
    "last_token": "last",
    "bos_token": "cls",
}
_KEYS = (
    *("pooling", "pooling_type", "pooling_mode", "pooling_strategy", "pooling_method", "emb_pooler"),
    *("sentence_pooling_method", "single_vector_pool_strategy"),
)
# What they say in some models -> ours; in capitals or not.
_WORDS = {
    **dict.fromkeys(("mean", "avg", "average", "mean_pooling", "mean_tokens"), "mean"),
    **dict.fromkeys(("cls", "cls_token", "cls_pooling", "bos", "bos_token", "first", "first_token"), "cls"),
    **dict.fromkeys(("last", "lasttoken", "last_token", "last_token_pool", "eos", "eos_token"), "last"),
    **dict.fromkeys(("weightedmean", "weighted_mean", "weighted_avg"), "weighted_mean"),
    **dict.fromkeys(("max", "max_pooling", "max_tokens"), "max"),
    **dict.fromkeys(("mean_sqrt_len", "mean_sqrt_len_tokens"), "mean_sqrt_len"),
    "sum": "sum",
}
# Families in which such a key is about something inside of the model, or about a classifier's head.
_INSIDE = ("align", "align_vision_model", "cohere_compass", "cohere_compass_text", "efficientnet", "funnel", "patchtst")


@dataclass(frozen=True)
class Statement:
    """A mode, which key says it, and what else comes with it: other fields of PoolingConfig by name, each with its
    value and source."""

    mode: str
    source: str
    more: dict[str, tuple[Any, str]] = field(default_factory=dict)
    without_prompt: str = ""  # where the prompt is left out: what that means for whoever calls apply


def llm2vec(sources: Sources) -> Statement | None:
    """What llm2vec_config.json says, which LLM2Vec writes beside its models and adapters. It pads on the left and does
    not normalise.

    Raises:
        ValueError: it is malformed, or names a pooling that LLM2Vec does not know.
    """
    name = inside(sources.home, "llm2vec_config.json")
    if not sources.folder.has(name):
        return None
    document = sources.folder.document(name)
    said = document.get("pooling_mode", str) or "mean"  # LLM2Vec's default
    if said not in _LLM2VEC:
        raise document.error("pooling_mode", f"one of {', '.join(_LLM2VEC)}")
    skips = document.get("skip_instruction", bool)
    skips = (True if skips is None else skips) and said != "bos_token"
    more: dict[str, tuple[Any, str]] = {
        "include_prompt": (not skips, f"{name}: skip_instruction"),
        "prompt_counts": (not skips, f"{name}: skip_instruction"),
        "normalize": (False, f"{name}: LLM2Vec does not normalise"),
        "padding_side": ("left", f"{name}: LLM2Vec pads there"),
    }
    length = document.positive("max_length")
    if length is not None:
        more["max_length"] = (length, f"{name}: max_length")
    without = (
        "LLM2Vec pools a text's own tokens alone (skip_instruction): starts= for apply is the first one behind the "
        "instruction, or where there is none, behind the first token (BOS); for eos_token it appends an EOS"
    )
    return Statement(_LLM2VEC[said], f"{name}: pooling_mode", more, without)


def latent_attention(transformer: Document) -> Document | None:
    """The configuration of the latent attention that NV-Embed and its like have behind their last layer, if it has one;
    what is left out there has a value of NV-Embed's own."""
    key = "latent_attention_config"
    said = transformer.get(key, dict)
    if said is None and not (architecture(transformer) or "").startswith("NVEmbed"):
        return None
    return Document(f"{transformer.name}: {key}", said or {})


def _nv_embed(sources: Sources) -> Statement | None:
    """What NV-Embed's own code does behind its latent attention, unless modules.json says something else."""
    transformer = sources.transformer
    document = latent_attention(transformer)
    if document is None:
        return None
    normalizes, side = document.get("output_normalize", bool), transformer.get("padding_side", str) or "right"
    masks, name = transformer.get("is_mask_instruction", bool), transformer.name
    if side not in ("left", "right"):
        raise transformer.error("padding_side", "'left' or 'right'")
    more: dict[str, tuple[Any, str]] = {
        "include_prompt": (masks is False or side == "left", f"{name}: is_mask_instruction"),
        "normalize": (normalizes is not False, f"{document.name}: output_normalize"),
        "padding_side": (side, f"{name}: padding_side"),
    }
    without = (
        "NV-Embed's own code leaves the instruction out, but for its last token: it counts the instruction's tokens "
        "without BOS, and leaves out as many from BOS on. For its vectors starts= for apply is that number; it appends "
        "an EOS to each text, and pools it"
    )
    return Statement("mean", document.name, more, without)


def whole(sources: Sources) -> Statement | None:
    """The statement that comes with more than a mode, if there is one. Raises what these raise."""
    return llm2vec(sources) or _nv_embed(sources)


def _keys(transformer: Document) -> Iterator[tuple[Document, str]]:
    for document in parts(transformer):
        if document.values.get("model_type") not in _INSIDE:
            yield from ((document, key) for key in _KEYS if document.values.get(key) is not None)


def statements(sources: Sources) -> list[Statement]:
    """All there are, the one to be followed first.

    Raises:
        ValueError: one says what is no pooling by a formula.
    """
    said = whole(sources)
    found = [] if said is None else [said]
    for document, key in _keys(sources.transformer):
        word = document.need(key, str).lower()
        if word not in _WORDS:
            raise document.error(key, f"one of {', '.join(_WORDS)}, in capitals or not")
        found.append(Statement(_WORDS[word], f"{document.name}: {key}"))
    return found


def others(sources: Sources, modes: tuple[str, ...], source: str) -> list[str]:
    """What these say otherwise than the Pooling module, in words. A word that is not known here says nothing."""
    said = whole(sources)
    found = {} if said is None else {said.source: said.mode}
    for document, key in _keys(sources.transformer):
        word = document.values[key]
        if isinstance(word, str) and word.lower() in _WORDS:
            found[f"{document.name}: {key}"] = _WORDS[word.lower()]
    return [
        f"{where} says {mode}, {source} says {' + '.join(modes)}: sentence-transformers follows the latter, what reads "
        "the former, as the model's own code, pools differently"
        for where, mode in found.items()
        if (mode,) != modes
    ]


def own_class(transformer: Document) -> str | None:
    """The class of the model's own code that makes its token states, and may pool them: "modeling_x.XModel"."""
    for name, said in (transformer.get("auto_map", dict) or {}).items():
        if name.startswith("AutoModel"):
            return str(said[0] if isinstance(said, list) and said else said)
    return None
