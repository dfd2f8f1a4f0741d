"""What weighs token states on their way into Pooling: sentence-transformers' WordWeights, by a token's id, and its
WeightedLayerPooling, by the layer of the model that they come from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import functional, nn
from ..calls import accumulator
from ..checks import check_leading, check_memory
from ..dispatch import validates
from ..nn.weighted_layers import LAYERS, START
from ..token_rows import each, rows
from .files import Document, Folder, Module, held, inside
from .weights import Weights

_OWNER = "fastpool.PoolingConfig.apply"
_LARGEST = torch.finfo(torch.float32).max
_WEIGHT = f"a number from {-_LARGEST:g} to {_LARGEST:g}"  # of a word


@dataclass(frozen=True)
class LayerWeights:
    """sum(w_l * pooled_l) / sum(w_l) over the model's layers l from `layer_start` on: fastpool.nn.WeightedLayers."""

    name: str  # of its folder: "1_WeightedLayerPooling"
    num_hidden_layers: int
    layer_start: int
    folder: Folder | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(folder: Folder, module: Module, document: Document) -> "LayerWeights":
        """Raises ValueError, naming file and key."""
        number = document.positive("num_hidden_layers") or LAYERS
        start = document.get("layer_start", int)
        start = START if start is None else start
        if not 0 <= start <= number:
            raise document.error("layer_start", f"a whole number from 0 to num_hidden_layers, {number}")
        return LayerWeights(module.path, number, start, folder)

    def __str__(self) -> str:
        return f"layers {self.layer_start} to {self.num_hidden_layers} weighted"

    def first(self, states: object) -> Any:
        """The first layer that counts, of hidden_states; None where they are none, or too few."""
        counted = states[self.layer_start :] if isinstance(states, Sequence) else ()
        return counted[0] if len(counted) > 0 else None

    def module(self, modes: Sequence[str], out_dtype: torch.dtype | None = None) -> nn.WeightedLayers:
        """Without its weights; made once, as a compiler makes no modules in a graph."""
        key = (tuple(modes), out_dtype)
        if key not in self._modules:
            with torch.device("meta"):
                made = nn.WeightedLayers(modes, self.num_hidden_layers, self.layer_start, out_dtype=out_dtype)
            self._modules[key] = made
        return self._modules[key]

    @cached_property
    def _modules(self) -> dict[tuple[tuple[str, ...], torch.dtype | None], nn.WeightedLayers]:
        return {}

    def pool(self, modes: Sequence[str], states: Any, *arguments: Any, **more: Any) -> Tensor:
        """In the accumulator's precision, of what nn.WeightedLayers takes. Raises what it raises, and what reading the
        weights does."""
        one = self.first(states)
        wide = accumulator(one.dtype)
        shares = self._weights.like(one.new_empty(0, dtype=wide))
        result: Tensor = torch.func.functional_call(self.module(modes, wide), shares, (states, *arguments), more)
        return result

    @cached_property
    def _weights(self) -> Weights:
        shapes = {"layer_weights": (self.num_hidden_layers + 1 - self.layer_start,)}
        weights = Weights(held(self.name, self.folder), self.name, shapes, "WeightedLayerPooling")
        with torch.inference_mode(False):
            total = float(weights.stored["layer_weights"].double().sum())
        if total == 0 or not math.isfinite(total):
            raise ValueError(
                f"{weights.file}: layer_weights must add up to a finite number other than 0, as their sum divides, "
                f"got {total:g}"
            )
        return weights


@dataclass(frozen=True)
class WordWeights:
    """A weight for each token of the vocabulary, by its id: the mean is sum(w * x) / sum(w)."""

    name: str  # of its folder: "1_WordWeights"
    vocabulary: int
    weights: tuple[float, ...] = field(repr=False)  # as many

    @staticmethod
    def read(module: Module, document: Document) -> "WordWeights":
        """Raises ValueError, naming file and key."""
        words, said = document.need("vocab", list), document.need("word_weights", dict)
        otherwise = document.values.get("unknown_word_weight", 1)
        if not words or not all(isinstance(word, str) for word in words):
            raise document.error("vocab", "a list of strings")
        if not _is_weight(otherwise):
            raise document.error("unknown_word_weight", _WEIGHT)
        wrong = next((word for word, weight in said.items() if not _is_weight(weight)), None)
        if wrong is not None:
            raise Document(f"{document.name}: word_weights", said).error(wrong, _WEIGHT)
        found = tuple(said.get(word, said.get(word.lower(), otherwise)) for word in words)
        return WordWeights(module.path, len(words), found)

    def __str__(self) -> str:
        return "words weighted"

    def __call__(self, input_ids: Tensor | None, hidden: Tensor, *real: Any, **bounds: Any) -> Tensor:
        """Of each token, on hidden's device. `real` and `bounds` tell which ones are read, as they tell functions:
        mask, cu_seqlens, lengths, starts, ends. Raises TypeError, ValueError."""
        source = inside(self.name, "config.json")
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            got = "nothing" if input_ids is None else getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(f"{_OWNER}: input_ids must be int32 or int64, as {source} weighs words, got {got}")
        if input_ids.layout != (torch.jagged if input_ids.is_nested else torch.strided):
            raise TypeError(f"{_OWNER}: input_ids must be dense, or nested and jagged, got layout {input_ids.layout}")
        ids, states = rows(input_ids), rows(hidden)
        if ids.device != states.device:
            raise ValueError(f"{_OWNER}: input_ids must be on hidden's device, {states.device}, got {ids.device}")
        check_leading(_OWNER, "input_ids", ids, "hidden", states)
        check_memory(_OWNER, "input_ids", ids)
        if not torch.compiler.is_compiling() and (ids.device.type == "cpu" or validates()) and ids.numel() > 0:
            least, most = (int(one) for one in ids.aminmax())
            if least < 0 or most >= self.vocabulary:  # perhaps in padding, where nothing is read
                both = each(lambda x: torch.stack((ids, -ids), -1).to(torch.float64), hidden)
                most, least = (int(one) for one in functional.max(both, *real, **bounds).amax(0))
                least = -least
            if least < 0 or most >= self.vocabulary:
                raise ValueError(
                    f"{_OWNER}: input_ids must lie between 0 and {self.vocabulary - 1}, the last of the words in "
                    f"{source}, got {least if least < 0 else most}"
                )
        if states.device not in self._tables:
            with torch.inference_mode(False):
                self._tables[states.device] = self.table.to(states.device)
        return self._tables[states.device][ids.clamp(0, self.vocabulary - 1)]

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def table(self) -> Tensor:
        """[vocabulary], float32, on the CPU."""
        with torch.inference_mode(False):
            return torch.tensor(self.weights, dtype=torch.float32)


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
