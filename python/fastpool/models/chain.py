"""modules.json as what happens to token states on their way to a vector."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..text import shown
from .files import Document, Module
from .layers import Dense, Layer, LayerNorm, Normalize
from .multi_vector import MultiVector
from .sources import PYLATE_DENSE, Sources
from .splade import Splade
from .unlike import MODULES, misplaced
from .weighing import LayerWeights, WordWeights

_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"  # sentence-transformers' names for what modules pass on
_MOST = 100  # modules; models have three or four, and each is a warning or a layer that people are told of
CLASSES = (
    *("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "WordWeights", "WeightedLayerPooling", "Dropout"),
)
QUANTIZERS = {"st_quantize.FlexibleQuantizer": "int8_tanh"}  # Perplexity's code, to fastpool.quantize's name for it
OTHERS = ("SpladePooling", "MultiVectorMask")  # what stands in Pooling's place
# What else makes token states, as the first module.
_FIRST = ("Transformer", "MLMTransformer", "WordEmbeddings")


@dataclass(frozen=True)
class Chain:
    """Layers on each token's state, weights of these, Pooling, layers on the vector, a quantiser; or the first alone;
    or SPLADE."""

    tokens: tuple[Layer, ...] = ()
    layer_weights: LayerWeights | None = None
    word_weights: WordWeights | None = None
    pooling: Document | None = None  # its configuration; None: not pooled
    layers: tuple[Layer, ...] = ()
    quantizer: str | None = None
    sparse: Splade | None = None  # what takes logits
    multi_vector: MultiVector | None = None  # which tokens count, where their vectors stay several

    @property
    def gives_vectors(self) -> bool:
        return not (self.pooling is None and self.sparse is None and self.multi_vector is None)

    def then(self, layer: Layer) -> "Chain":
        before = self.tokens if self.pooling is None else self.layers
        if isinstance(layer, Normalize) and before and isinstance(before[-1], Normalize):
            return self  # what is normalised stays what it is
        after = (*before, layer)
        return replace(self, tokens=after) if self.pooling is None else replace(self, layers=after)


def follow(sources: Sources, modules: Sequence[Module]) -> Chain:
    """What the modules make of token states, which the first of them gives: each reads what was passed on under one
    name, and passes it on under another or the same; what no later one reads has no effect.

    Raises:
        FileNotFoundError: a module's configuration is missing.
        ValueError: a module that is not supported, or is not given what it reads; names file and key.
    """
    if len(modules) > _MOST:
        raise ValueError(f"modules.json: expected at most {_MOST} modules, got {len(modules)}")
    for i in range(len(modules)):
        _check(i, modules)
    folder, passed = sources.folder, {_states(sources, modules): Chain()}
    dense = _TOKENS if sources.family == "MultiVectorEncoder" else _SENTENCE
    for module in modules[1:]:
        if module.name == "Pooling":
            before = _given(passed, _TOKENS, module)
            if before.pooling is not None:
                raise module.entry.error("type", "something else, as what it would pool is one vector already")
            passed[_SENTENCE] = replace(before, pooling=folder.document(module.config))
        elif module.name == "Dense":
            document = folder.document(module.config)
            name, to = _names(document, dense)
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
            passed[_SENTENCE] = Chain(sparse=Splade.read(folder.document(module.config), sources.model))
        elif module.name == "MultiVectorMask":
            mask = MultiVector.read(folder.document(module.config), sources)
            passed[_TOKENS] = replace(_unweighted(passed, _TOKENS, module), multi_vector=mask)
        elif module.type in QUANTIZERS:
            passed[_SENTENCE] = replace(_given(passed, _SENTENCE, module), quantizer=QUANTIZERS[module.type])
        else:  # Dropout, which does nothing outside training
            _given(passed, _SENTENCE, module)
    if sources.of_pylate:
        chain = replace(_unpooled(passed), multi_vector=MultiVector.of_pylate(sources)).then(Normalize())
    elif sources.family == "MultiVectorEncoder":
        chain = _unpooled(passed)
    else:
        chain = passed.get(_SENTENCE, Chain())
    if not chain.gives_vectors:
        found = ", ".join(module.type for module in modules) or "nothing"
        raise ValueError(
            f"modules.json: type must be sentence-transformers' Pooling for one module, which gives "
            f"sentence_embedding, got {found}"
        )
    return chain


def _check(i: int, modules: Sequence[Module]) -> None:
    module = modules[i]
    unlike = MODULES.get(module.name) or misplaced(i, modules)
    if unlike is not None:
        raise ValueError(f"{module.entry.name}: type {module.type} is {unlike}")
    theirs = module.type.startswith("sentence_transformers.")
    known = module.type in (PYLATE_DENSE, *QUANTIZERS)
    own = not (theirs or known or module.type.startswith("pylate."))
    if i == 0 and ((theirs and module.name in _FIRST) or own):
        return  # also one of the model's own code: what makes the token states is not ours to run
    *words, last = (*CLASSES[1:], *OTHERS)
    if not (known or (theirs and module.name in (*words, last))):
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
    if passed[name].quantizer is not None:
        raise module.entry.error("type", "nothing behind a quantiser, which must stand at the end")
    if passed[name].multi_vector is not None and module.name not in ("Dense", "Normalize"):
        raise module.entry.error("type", "Dense or Normalize behind MultiVectorMask, which leaves several vectors")
    return passed[name]


def _unweighted(passed: dict[str, Chain], name: str, module: Module, layers: bool = False) -> Chain:
    """The same, where nothing weighs tokens yet; it may weigh `layers`."""
    found = _given(passed, name, module)
    if found.pooling is None and (found.word_weights or (found.layer_weights and not layers)):
        raise module.entry.error(
            "type", "sentence-transformers' Pooling, which follows where token states are weighted"
        )
    return found


def _states(sources: Sources, modules: Sequence[Module]) -> str:
    """The name under which the first module passes on what it makes. Raises ValueError where what follows takes
    something else."""
    sentence, key = sources.sentence, "transformer_task"
    logits = bool(modules) and modules[0].name == "MLMTransformer"
    task = sentence.get(key, str) or ("fill-mask" if logits else "feature-extraction")
    sparse = sources.family == "SparseEncoder"
    if sparse and task != "fill-mask":
        raise sentence.error(key, "'fill-mask', which gives the logits that SpladePooling takes")
    if logits and not sparse:
        expected = "sentence-transformers' Transformer, which gives token states and not logits"
        raise modules[0].entry.error("type", expected)
    if not sparse and task != "feature-extraction":
        raise sentence.error(key, "'feature-extraction', which gives token states")
    return sentence.get("module_output_name", str) or _TOKENS


def _unpooled(passed: dict[str, Chain]) -> Chain:
    """What is left of token states where no Pooling follows. Raises ValueError where there is none."""
    if _TOKENS not in passed:
        raise ValueError(
            f"modules.json: expected a module that gives {_TOKENS}, got {', '.join(map(shown, passed))} from those "
            "that are there"
        )
    found = passed[_TOKENS]
    if found.word_weights or found.layer_weights:
        raise ValueError("modules.json: expected Pooling where token states are weighted, got none")
    return found


def _names(document: Document, otherwise: str = _SENTENCE) -> tuple[str, str]:
    """What a module reads, and as what it passes it on."""
    name = document.get("module_input_name", str) or otherwise
    return name, document.get("module_output_name", str) or name


def unnamed(modules: Sequence[Module]) -> list[str]:
    """Warnings about folders that modules.json does not name."""
    return [
        f"{module.entry.name}: path is missing: {module.path or 'the model itself'} is taken, as sentence-transformers "
        "would have named it, but it loads no module without a path"
        for module in modules
        if not module.stated
    ]
