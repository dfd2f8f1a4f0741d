"""The model's vectors in every mode, from one run of its transformer."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import Normalize, PoolingConfig
from ..models.layers import columns
from ..models.tokens import is_failure
from ..modes import MODES
from .finite import HINT, not_finite
from .trace import Trace

Modes = tuple[str, ...]  # one, or several whose vectors stand side by side

_BATCH = 32


def _told(error: BaseException) -> str:
    """On one line, with its type: the text of a KeyError or an AttributeError alone says little."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def candidates(config: PoolingConfig) -> list[Modes]:
    """Every mode of token states that needs no scores by itself, and the configured ones where they are several.

    Raises:
        ValueError: several modes meet in a Dense or LayerNorm layer, which no single one fits.
    """
    single: list[Modes] = [(name,) for name, mode in MODES.items() if not (mode.softmax or mode.of_logits)]
    if len(config.modes) == 1:
        return single
    sized = [layer for layer in config.layers if not isinstance(layer, Normalize)]
    if sized:
        raise ValueError(
            f"{sized[0].name}: takes the columns of {', '.join(config.modes)} together; expected one mode before a "
            f"{type(sized[0]).__name__} layer, since no other one can be compared"
        )
    return [config.modes, *single]


def load(folder: Path) -> Any:
    """The folder's SentenceTransformer; asks no network and runs no code of the folder's.

    Raises:
        ValueError: it cannot be loaded, and why.
    """
    # Before the imports below, which read them once.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        from sentence_transformers import SentenceTransformer, __version__
        from transformers.utils import logging

        logging.disable_progress_bar()  # for whoever has imported them before
        model = SentenceTransformer(str(folder)).eval()
    except BaseException as error:  # each architecture, tokenizer and file format has its own
        if not is_failure(error):
            raise
        raise ValueError(f"{folder}: sentence-transformers cannot load it: {_told(error)}") from error
    if not hasattr(model, "preprocess"):
        raise ValueError(
            f'expected sentence-transformers 6.2 or later, got {__version__}: pip install "fastpool[doctor]"'
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

    Dense layers, truncation and what is left out of a prompt are the configuration's. Token states of one batch at a
    time are held. `advance` hears of each batch's texts, `trace` watches the modules.

    Raises:
        ValueError: what `candidates` raises; the model weighs words or layers; it does not run on the texts; its first
            module gives no token states, or such that are not finite at a real token, and by the trace why.
    """
    weights = config.layer_weights or config.word_weights
    if weights is not None:
        raise ValueError(f"{weights.name}: {weights}; expected a model whose token states are pooled as they are")
    found: dict[Modes, Tensor] = {}
    modes = candidates(config)
    prompt = config.prompts.get(config.default_prompt_name or "")
    # Longest texts first, as SentenceTransformer.encode has it: a batch then holds little padding.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for at in range(0, len(order), _BATCH):
        indices = order[at : at + _BATCH]
        batch = [texts[i] for i in indices]
        features = _run(model, batch, prompt, trace)
        if complaint := not_finite(model, batch, features):
            raise ValueError(f"{complaint}; {HINT if trace is None else trace.why()}")
        for one in modes:
            pooled = _pool(replace(config, modes=one, normalize=False), features)
            if one not in found:
                found[one] = pooled.new_empty(len(texts), pooled.shape[1], device="cpu")
            found[one][indices] = pooled.cpu()
        advance(len(indices))
    return found


def _run(model: Any, texts: list[str], prompt: str | None, trace: Trace | None) -> Mapping[str, Any]:
    try:
        batch = model.preprocess(texts, prompt=prompt)
        batch = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        with nullcontext() if trace is None else trace.watch(batch):
            features: Mapping[str, Any] = model[0](batch)
    except BaseException as error:  # positions that it does not have, memory, a tokenizer's own
        if not is_failure(error):
            raise
        longest = max(map(len, texts))
        raise ValueError(f"the model does not run on texts of up to {longest} characters: {_told(error)}") from error
    for name in ("token_embeddings", "attention_mask"):
        if name not in features:
            raise ValueError(f"the model's first module must give {name}, got {', '.join(features)}")
    return features


def _pool(config: PoolingConfig, features: Mapping[str, Any]) -> Tensor:
    # Wide, so that a 16-bit model's modes are compared and not what rounding leaves of them.
    hidden, mask = features["token_embeddings"].float(), features["attention_mask"]
    pooled = (columns(config.token_layers, hidden.shape[-1]) or 0) * len(config.modes)
    if config.truncate_dim is not None:  # of several modes, one alone may have fewer columns
        config = replace(config, truncate_dim=min(config.truncate_dim, columns(config.layers, pooled) or 0))
    starts = None
    if not config.include_prompt and "prompt_length" in features:
        starts = (mask != 0).int().argmax(dim=1) + int(features["prompt_length"])
    return config.apply(hidden, mask, starts=starts)
