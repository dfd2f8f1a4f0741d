"""llama.cpp 00bd27a6: conversion/base.py: _try_set_pooling_type, which conversion/llama.py never calls;
conversion/gemma.py: EmbeddingGemma (2bbcf7fc); src/llama-graph.cpp: build_dense_out (00395eb2). Its server normalises
unless a request says no."""

from dataclasses import replace

from ..config import PoolingConfig
from ..files import Document
from ..layers import Dense
from ..pooling import POOLING_FLAGS, POOLING_MODES
from .common import Default, Engine, Model, option, plain, unknown

_MODES = {"mean": "mean", "cls": "cls", "last": "last"}
_FLAGS = ("pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_lasttoken")
# The families whose converters write it, besides all that have "bert" in their name.
_WITH = (
    "arcee",
    "camembert",
    "dream",
    "gemma3",
    "gemma3_text",
    "lfm2",
    "llada",
    "qwen2",
    "qwen3",
    "roberta",
    "xlm-roberta",
)
_DENSE = "--sentence-transformers-dense-modules"


def _converts_dense(model: Model) -> bool:
    """The converter has an option for the Dense layers: EmbeddingGemma's, which are two products with a matrix."""
    layers = model.wanted.layers
    if model.architecture != "Gemma3TextModel" or len(layers) != 2:
        return False
    down, up = layers
    if not isinstance(down, Dense) or not isinstance(up, Dense):
        return False
    if down.name != "2_Dense" or up.outputs != down.inputs:
        return False
    return not any(layer.bias or layer.residual or layer.activation != "Identity" for layer in (down, up))


def _pooling(model: Model) -> Document | None:
    """The configuration of what it takes for the Pooling module."""
    modules = model.sources.modules or []
    found = [module for module in modules if module.type.endswith("Pooling")]
    return model.folder.optional(found[0].config) if found else None


def _default(model: Model) -> Default:
    own = plain(model)
    if why := model.out_of_place(paths=True, top=True):
        return Default(own, (f"{why}: the converter fails",), starts=False)
    family = model.transformer.get("model_type", str) or "an unknown family"
    if family not in _WITH and "bert" not in family.lower():
        return Default(own, (f"the converter writes no pooling for {family}: token vectors without --pooling",))
    pooling = _pooling(model)
    if pooling is None:
        return Default(own, ("the converter finds no Pooling module: token vectors without --pooling",))
    notes = (f"the converter leaves Dense layers out without {_DENSE}",) if _converts_dense(model) else ()
    flag = next((key for key in _FLAGS if pooling.values.get(key)), None)
    said = pooling.values.get("pooling_mode")
    if flag is not None:
        return Default(replace(own, modes=(POOLING_FLAGS[flag],)), notes)
    if isinstance(said, str) and POOLING_MODES.get(said) in _MODES:
        return Default(replace(own, modes=(POOLING_MODES[said],)), notes)
    return Default(own, (f"the converter fails: {unknown(model, pooling)}", *notes), starts=False)


def _setting(model: Model, own: PoolingConfig) -> str | None:
    wanted = model.wanted
    if wanted.truncate_dim is not None:
        return None
    converted = _converts_dense(model)
    mode = option(wanted, replace(own, layers=wanted.layers) if converted else own, _MODES)
    server = f"--pooling {mode}" + ("" if wanted.normalize else " --embd-normalize -1")
    return mode and (f"convert_hf_to_gguf.py {_DENSE}; " if converted else "") + server


ENGINE = Engine("llama.cpp", "00bd27a6", _default, _setting)
