"""modules.json as what happens to token states on their way to a vector."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..text import shown
from .files import Document, Folder, Module
from .layers import Dense, Layer, LayerNorm, Normalize
from .splade import Splade
from .unlike import MODULES
from .weighing import LayerWeights, WordWeights

_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"  # sentence-transformers' names for what modules pass on
_MOST = 100  # modules; models have three or four, and each is a warning or a layer that people are told of
CLASSES = (
    *("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "WordWeights", "WeightedLayerPooling", "Dropout"),
)
OTHERS = ("SpladePooling",)  # what stands in Pooling's place
# What else makes token states, as the first module.
_FIRST = ("Transformer", "MLMTransformer", "WordEmbeddings")


@dataclass(frozen=True)
class Chain:
    """Layers on each token's state, weights of these, Pooling, layers on the vector; or SPLADE alone."""

    tokens: tuple[Layer, ...] = ()
    layer_weights: LayerWeights | None = None
    word_weights: WordWeights | None = None
    pooling: Document | None = None  # its configuration; None: not pooled
    layers: tuple[Layer, ...] = ()
    sparse: Splade | None = None  # what takes logits

    def then(self, layer: Layer) -> "Chain":
        before = self.tokens if self.pooling is None else self.layers
        if isinstance(layer, Normalize) and before and isinstance(before[-1], Normalize):
            return self  # what is normalised stays what it is
        after = (*before, layer)
        return replace(self, tokens=after) if self.pooling is None else replace(self, layers=after)


def follow(folder: Folder, modules: Sequence[Module], states: str, model: Document) -> Chain:
    """What the modules make of token states, which the first of them gives under the name `states`: each reads what was
    passed on under one name, and passes it on under another or the same; what no later one reads has no effect. `model`
    is config_sentence_transformers.json.

    Raises:
        FileNotFoundError: a module's configuration is missing.
        ValueError: a module that is not supported, or is not given what it reads; names file and key.
    """
    if len(modules) > _MOST:
        raise ValueError(f"modules.json: expected at most {_MOST} modules, got {len(modules)}")
    passed: dict[str, Chain] = {}
    for i, module in enumerate(modules):
        _check(i, module)
        if i == 0:
            passed[states] = Chain()
        elif module.name == "Pooling":
            before = _given(passed, _TOKENS, module)
            if before.pooling is not None:
                raise module.entry.error("type", "something else, as what it would pool is one vector already")
            passed[_SENTENCE] = replace(before, pooling=folder.document(module.config))
        elif module.name == "Dense":
            document = folder.document(module.config)
            name, to = _names(document)
            passed[to] = _unweighted(passed, name, module).then(Dense.read(folder, module, document))
        elif module.name == "LayerNorm":
            layer = LayerNorm.read(folder, module, folder.document(module.config))
            passed[_SENTENCE] = _given(passed, _SENTENCE, module).then(layer)
        elif module.name == "Normalize":
            name, to = _names(folder.optional(module.config))
            if name in passed:  # else it does nothing
                passed[to] = _unweighted(passed, name, module).then(Normalize(module.entry.name))
        elif module.name == "WordWeights":
            weights = WordWeights.read(module, folder.document(module.config))
            passed[_TOKENS] = replace(_unweighted(passed, _TOKENS, module, layers=True), word_weights=weights)
        elif module.name == "WeightedLayerPooling":
            if _given(passed, _TOKENS, module) != Chain():
                raise module.entry.error(
                    "type", "something else here, as it takes the model's layers, whatever it is given"
                )
            shares = LayerWeights.read(folder, module, folder.document(module.config))
            passed[_TOKENS] = Chain(layer_weights=shares)
        elif module.name == "SpladePooling":
            if i != 1 or len(modules) != 2:
                raise ValueError(
                    f"{module.entry.name}: type {module.type} is SPLADE's, which must stand alone behind what gives "
                    f"logits, got {', '.join(one.type for one in modules)}"
                )
            passed[_SENTENCE] = Chain(sparse=Splade.read(folder.document(module.config), model))
        else:  # Dropout, which does nothing outside training
            _given(passed, _SENTENCE, module)
    chain = passed.get(_SENTENCE, Chain())
    if chain.pooling is None and chain.sparse is None:
        found = ", ".join(module.type for module in modules) or "nothing"
        raise ValueError(
            f"modules.json: type must be sentence-transformers' Pooling for one module, which gives "
            f"sentence_embedding, got {found}"
        )
    return chain


def _check(i: int, module: Module) -> None:
    name = "MultiVectorMask" if module.type.startswith("pylate.") else module.name
    if name in MODULES:
        raise ValueError(f"{module.entry.name}: type {module.type} is {MODULES[name]}")
    ours = module.type.startswith("sentence_transformers.")
    if i == 0 and (module.name in _FIRST or not ours):
        return  # also one of the model's own code: what makes the token states is not ours to run
    *words, last = (*CLASSES[1:], *OTHERS)
    if not ours or module.name not in (*words, last):
        raise module.entry.error(
            "type", f"sentence-transformers' Transformer (first), {', '.join(words)} or {last}; other code is not run"
        )
    if i == 0:
        raise module.entry.error("type", "what makes token states, as sentence-transformers' Transformer")


def _given(passed: dict[str, Chain], name: str, module: Module) -> Chain:
    if name not in passed:
        raise ValueError(
            f"{module.entry.name}: type {module.type} reads {shown(name)}, which must come from a module before it, "
            f"got {', '.join(map(shown, passed))} from those"
        )
    return passed[name]


def _unweighted(passed: dict[str, Chain], name: str, module: Module, layers: bool = False) -> Chain:
    """The same, where nothing weighs tokens yet; it may weigh `layers`."""
    found = _given(passed, name, module)
    if found.pooling is None and (found.word_weights or (found.layer_weights and not layers)):
        raise module.entry.error(
            "type", "sentence-transformers' Pooling, which follows where token states are weighted"
        )
    return found


def _names(document: Document) -> tuple[str, str]:
    """What a module reads, and as what it passes it on."""
    name = document.get("module_input_name", str) or _SENTENCE
    return name, document.get("module_output_name", str) or name


def unnamed(modules: Sequence[Module]) -> list[str]:
    """Warnings about folders that modules.json does not name."""
    return [
        f"{module.entry.name}: path is missing: {module.path or 'the model itself'} is taken, as sentence-transformers "
        "would have named it, but it loads no module without a path"
        for module in modules
        if not module.stated
    ]
