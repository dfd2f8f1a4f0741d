"""The model's vectors in every mode, from one run of its transformer."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import Normalize, PoolingConfig, Splade
from ..models.layers import columns
from ..models.tokens import is_failure
from ..modes import MODES
from ..sparse import splade, splade_mode
from ..token_outputs import keep_mask
from .finite import HINT, not_finite
from .trace import Trace

Modes = tuple[str, ...]  # one, or several whose vectors stand side by side
Features = Mapping[str, Any]  # what a model's first module gives
Pool = Callable[[Features], Tensor]  # to vectors [B, D]

WITHOUT = "no CLS and SEP"  # the configured mode of logits, of the other tokens
_BATCH = 32


def _told(error: BaseException) -> str:
    """On one line, with its type: the text of a KeyError or an AttributeError alone says little."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def configured(config: PoolingConfig) -> tuple[Modes, bool]:
    """The model's own modes, and whether it compares vectors by cosine: where it says nothing, sentence-transformers
    does, but sparse ones, which it compares by dot product."""
    if config.sparse is not None:
        mode = splade_mode("fastpool doctor", config.sparse.pooling, config.sparse.activation)
        return (mode.name,), config.similarity == "cosine"
    return config.modes, config.normalize or config.similarity in (None, "cosine")


def candidates(config: PoolingConfig, special: Sequence[int] = ()) -> dict[Modes, Pool]:
    """What is compared, and how each pools what the first module gives. Of token states: every mode that needs no
    scores by itself, and the configured ones where they are several. Of logits: every mode of logits, and the
    configured one once more without the tokens whose ids are `special`.

    Raises:
        ValueError: several modes meet in a Dense or LayerNorm layer, which no single one fits.
    """
    if config.sparse is not None:
        pools: dict[Modes, Pool] = {}
        for mode in MODES.values():
            if mode.of_logits:
                pooling, activation = mode.reduce.name.lower(), mode.activation.name.lower()
                one = replace(config.sparse, pooling=pooling, activation=activation)
                pools[mode.name,] = partial(_pool_logits, config.width, one, ())
        if special:
            pools[WITHOUT,] = partial(_pool_logits, config.width, config.sparse, special)
        return pools
    single: list[Modes] = [(name,) for name, mode in MODES.items() if not (mode.softmax or mode.of_logits)]
    sized = [layer for layer in config.layers if not isinstance(layer, Normalize)]
    if len(config.modes) > 1 and sized:
        raise ValueError(
            f"{sized[0].name}: takes the columns of {', '.join(config.modes)} together; expected one mode before a "
            f"{type(sized[0]).__name__} layer, since no other one can be compared"
        )
    compared = single if config.modes in single else [config.modes, *single]
    return {modes: partial(_pool, replace(config, modes=modes, normalize=False)) for modes in compared}


def load(folder: Path, config: PoolingConfig) -> Any:
    """The folder's SentenceTransformer, or SparseEncoder; asks no network and runs no code of the folder's.

    Raises:
        ValueError: it cannot be loaded, and why.
    """
    # Before the imports below, which read them once.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        import sentence_transformers
        from transformers.utils import logging

        logging.disable_progress_bar()  # for whoever has imported them before
        kind = "SentenceTransformer" if config.sparse is None else "SparseEncoder"
        model = getattr(sentence_transformers, kind)(str(folder)).eval()
    except BaseException as error:  # each architecture, tokenizer and file format has its own
        if not is_failure(error):
            raise
        raise ValueError(f"{folder}: sentence-transformers cannot load it: {_told(error)}") from error
    if not hasattr(model, "preprocess"):
        raise ValueError(
            f"expected sentence-transformers 6.2 or later, got {sentence_transformers.__version__}: "
            'pip install "fastpool[doctor]"'
        )
    return model


@torch.inference_mode()
def vectors(
    model: Any,
    config: PoolingConfig,
    texts: Sequence[str],
    advance: Callable[[int], object],
    trace: Trace | None = None,
) -> dict[Modes, Tensor]:
    """For each candidate the vectors [N, D] of the texts, float32, before normalisation.

    Dense layers, truncation, how many weights are kept and what is left out of a prompt are the configuration's. Token
    states or logits of one batch at a time are held. `advance` hears of each batch's texts, `trace` watches the
    modules.

    Raises:
        ValueError: what `candidates` raises; the model weighs words or layers; it does not run on the texts; its first
            module gives no token states, or logits of another vocabulary, or such that are not finite at a real token,
            and by the trace why.
    """
    weights = config.layer_weights or config.word_weights
    if weights is not None:
        raise ValueError(f"{weights.name}: {weights}; expected a model whose token states are pooled as they are")
    found: dict[Modes, Tensor] = {}
    pools = candidates(config, _special(model))
    prompt = config.prompts.get(config.default_prompt_name or "")
    # Longest texts first, as SentenceTransformer.encode has it: a batch then holds little padding.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for at in range(0, len(order), _BATCH):
        indices = order[at : at + _BATCH]
        batch = [texts[i] for i in indices]
        features = _run(model, batch, prompt, trace)
        if complaint := not_finite(model, batch, features):
            raise ValueError(f"{complaint}; {HINT if trace is None else trace.why()}")
        for modes, pool in pools.items():
            pooled = pool(features)
            if modes not in found:
                found[modes] = pooled.new_empty(len(texts), pooled.shape[1], device="cpu")
            found[modes][indices] = pooled.cpu()
        advance(len(indices))
    return found


def _run(model: Any, texts: list[str], prompt: str | None, trace: Trace | None) -> Features:
    try:
        batch = model.preprocess(texts, prompt=prompt)
        batch = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        with nullcontext() if trace is None else trace.watch(batch):
            features: Features = model[0](batch)
    except BaseException as error:  # positions that it does not have, memory, a tokenizer's own
        if not is_failure(error):
            raise
        longest = max(map(len, texts))
        raise ValueError(f"the model does not run on texts of up to {longest} characters: {_told(error)}") from error
    for name in ("token_embeddings", "attention_mask"):
        if name not in features:
            raise ValueError(f"the model's first module must give {name}, got {', '.join(features)}")
    return features


def _special(model: Any) -> list[int]:
    """Ids of [CLS] and [SEP], whatever the tokenizer calls them."""
    tokenizer = getattr(model, "tokenizer", None)
    ids = [getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id")]
    return [id for id in ids if id is not None]


def _pool(config: PoolingConfig, features: Features) -> Tensor:
    # Wide, so that a 16-bit model's modes are compared and not what rounding leaves of them.
    hidden, mask = features["token_embeddings"].float(), features["attention_mask"]
    pooled = (columns(config.token_layers, hidden.shape[-1]) or 0) * len(config.modes)
    if config.truncate_dim is not None:  # of several modes, one alone may have fewer columns
        config = replace(config, truncate_dim=min(config.truncate_dim, columns(config.layers, pooled) or 0))
    starts = None
    if not config.include_prompt and "prompt_length" in features:
        starts = (mask != 0).int().argmax(dim=1) + int(features["prompt_length"])
    return config.apply(hidden, mask, starts=starts)


def _pool_logits(width: int | None, sparse: Splade, special: Sequence[int], features: Features) -> Tensor:
    logits, mask = features["token_embeddings"], features["attention_mask"]
    words = logits.shape[-1]
    if width not in (None, words):
        raise ValueError(f"the model's first module must give logits of {width} words, got {words} columns")
    if special:
        mask = keep_mask(features["input_ids"], mask, skip=special)
    # Wide, so that a 16-bit model's poolings are compared and not what rounding leaves of them.
    pooled = splade(logits, mask, pooling=sparse.pooling, activation=sparse.activation, out_dtype=torch.float32)
    if sparse.max_active_dims is None:
        return pooled
    kept, at = pooled.topk(min(sparse.max_active_dims, words))
    return torch.zeros_like(pooled).scatter(1, at, kept)
