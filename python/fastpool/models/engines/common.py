"""What the engines' files share: a folder as engines see it, their answers, and what several of them do alike."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ..config import PoolingConfig
from ..families import is_causal
from ..files import Document, Folder
from ..layers import Dense, Layer
from ..pooling import POOLING_FLAGS
from ..sources import Sources

OLD = "sentence_transformers.models."  # module types as releases before 5.4 wrote them
NEW = {
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.",
    "Normalize": "sentence_transformers.base.modules.normalize.",
    "Dense": "sentence_transformers.base.modules.dense.",
}


@dataclass(frozen=True)
class Model:
    """A folder as engines see it, and what it wants."""

    folder: Folder
    wanted: PoolingConfig

    @cached_property
    def sources(self) -> Sources:
        return Sources.read(self.folder)

    @property
    def transformer(self) -> Document:
        return self.sources.transformer

    @property
    def architecture(self) -> str:
        return self.wanted.architecture or ""

    def module(self, name: str, *prefixes: str) -> Document | None:
        """The configuration of the first module of that class, if its type has one of the prefixes."""
        for module in self.sources.modules or []:
            if module.type in [prefix + name for prefix in prefixes]:
                return self.folder.optional(module.config)
        return None

    @property
    def made_by_llm2vec(self) -> bool:
        """Its own code makes it bidirectional, which no engine runs."""
        alone = self.sources.modules is None and is_causal(self.transformer)
        return alone and self.wanted.decision("modes").source.endswith("llm2vec_config.json: pooling_mode")

    def out_of_place(self, *, paths: bool, top: bool) -> str | None:
        """Why nothing is found by who wants every module's path, or config.json at the model's top."""
        for module in self.sources.modules or []:
            if paths and not module.stated:
                return f"{module.entry.name} has no path"
        return "the model has no config.json at its top" if top and not self.folder.has("config.json") else None


@dataclass(frozen=True)
class Default:
    """What an engine does without a setting. Where it gives no sentence vectors, `pooling` has no modes; where it does
    not even start, no setting helps."""

    pooling: PoolingConfig
    notes: tuple[str, ...] = ()
    starts: bool = True


@dataclass(frozen=True)
class Engine:
    """One of them; facts as read in the sources named in its file, a newer release may decide differently."""

    name: str
    version: str
    default: Callable[[Model], Default]
    setting: Callable[[Model, PoolingConfig], str | None]  # what gives the folder's pooling; None: not possible


def differences(own: PoolingConfig, wanted: PoolingConfig) -> set[str]:
    fields = ["modes", "normalize", "truncate_dim", "layers", "token_layers", "layer_weights", "word_weights"]
    fields += ["include_prompt", "quantizer", "sparse", "multi_vector"]
    if wanted.modes == ("last",):
        fields.remove("include_prompt")  # a prompt stands in front
    return {field for field in fields if getattr(own, field) != getattr(wanted, field)}


def option(wanted: PoolingConfig, own: PoolingConfig, names: dict[str, str]) -> str | None:
    """The engine's name for the mode; None if no option gives that pooling: engines have options for the mode, none for
    the prompt or for layers."""
    if len(wanted.modes) != 1 or differences(own, wanted) - {"modes", "normalize", "truncate_dim"}:
        return None
    return names.get(wanted.modes[0])


def matryoshka(model: Model) -> dict[str, object]:
    """What to put over config.json for vLLM and SGLang, which take the columns from requests, to models that say they
    may be truncated."""
    dim = model.wanted.truncate_dim
    values = model.transformer.values
    sizes = values.get("matryoshka_dimensions")
    if dim is None or (isinstance(sizes, list) and dim in sizes) or (values.get("is_matryoshka") and sizes is None):
        return {}
    return {"is_matryoshka": True} if sizes is None else {"matryoshka_dimensions": [dim]}


def overrides(name: str, values: dict[str, object]) -> list[str]:
    return [f"{name} '{json.dumps(values)}'"] if values else []


def in_requests(wanted: PoolingConfig) -> str:
    return "" if wanted.truncate_dim is None else f"; in requests: {json.dumps({'dimensions': wanted.truncate_dim})}"


def plain(model: Model, *modes: str, layers: tuple[Layer, ...] = ()) -> PoolingConfig:
    """What engines do who take nothing of a folder but perhaps Dense layers: that mode, normalised."""
    return replace(
        model.wanted,
        modes=modes,
        normalize=True,
        truncate_dim=None,
        layers=layers,
        token_layers=(),
        layer_weights=None,
        word_weights=None,
        quantizer=None,
        sparse=None,
        multi_vector=None,
        include_prompt=True,
    )


def dense(model: Model, residual: bool = True) -> tuple[Dense, ...]:
    """All Dense layers, wherever they stand, and nothing of what stands between them; without their residual
    connections, which are new, if need be."""
    found = [layer for layer in (*model.wanted.token_layers, *model.wanted.layers) if isinstance(layer, Dense)]
    return tuple(layer if residual else replace(layer, residual=False) for layer in found)


def unknown(model: Model, pooling: Document) -> str:
    """Why a Pooling module gives an engine no mode."""
    if pooling.values.get("pooling_mode") or any(pooling.values.get(flag) for flag in POOLING_FLAGS):
        return f"it knows no {' + '.join(model.wanted.modes)}"
    return "the Pooling module names no mode"
