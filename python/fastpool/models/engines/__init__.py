"""What engines make of a model's folder: their setting for its pooling, and what they do without one. A file for each
engine, which says where in its source that was read."""

from dataclasses import dataclass

from ...text import told
from ..config import PoolingConfig
from ..files import Folder
from . import llama_cpp, sentence_transformers, sglang, text_embeddings_inference, vllm
from .common import Default, Model, differences, plain

_ENGINES = tuple(
    module.ENGINE for module in (sentence_transformers, vllm, sglang, text_embeddings_inference, llama_cpp)
)
NAMES = tuple(engine.name for engine in _ENGINES)


@dataclass(frozen=True)
class EngineReport:
    """One engine's answer."""

    engine: str
    version: str
    setting: str | None  # what gives the folder's pooling; None: not possible
    by_itself: str  # what it does without the setting
    differs: bool  # by itself it does not pool as the folder says
    notes: tuple[str, ...]


def describe(pooling: PoolingConfig) -> str:
    """mean + max, Dense to 768, first 256 columns, normalised"""
    if pooling.sparse is not None:
        return told(str(pooling.sparse))
    if not (pooling.modes or pooling.multi_vector):
        return "no sentence vectors"
    steps = [f"each token {layer}" for layer in pooling.token_layers]
    steps += [str(weights) for weights in (pooling.layer_weights, pooling.word_weights) if weights is not None]
    if pooling.multi_vector is not None:
        steps.append(str(pooling.multi_vector))
    else:
        steps.append(" + ".join(pooling.modes) + ("" if pooling.include_prompt else " without the prompt"))
    steps += map(str, pooling.layers)
    if pooling.truncate_dim is not None:
        steps.append(f"first {pooling.truncate_dim} columns")
    steps.append("normalised" if pooling.normalize else "not normalised")
    return told(", ".join([*steps, *(["quantised to round(127 * tanh(x))"] if pooling.quantizer else [])]))


def answers(folder: Folder, wanted: PoolingConfig) -> list[EngineReport]:
    """Every engine's answer, in the order of NAMES."""
    model, found = Model(folder, wanted), []
    for engine in _ENGINES:
        try:
            own = engine.default(model)
            setting = engine.setting(model, own.pooling) if own.starts else None
        except ValueError as error:  # about a file that only this engine reads
            own, setting = Default(plain(model), (f"it cannot read {error}",), starts=False), None
        differs, notes = bool(differences(own.pooling, wanted)), own.notes
        if model.made_by_llm2vec:
            setting, differs = None, True
            notes = ("LLM2Vec's own code makes the model bidirectional, which this engine does not run", *notes)
        if own.pooling.modes and wanted.quantizer is not None and own.pooling.quantizer is None:
            notes = (f"it quantises nothing: fastpool.quantize(vectors, {wanted.quantizer!r}) does", *notes)
        setting, notes = setting and told(setting), tuple(map(told, notes))
        found.append(EngineReport(engine.name, engine.version, setting, describe(own.pooling), differs, notes))
    return found
