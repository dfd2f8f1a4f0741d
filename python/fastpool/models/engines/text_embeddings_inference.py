"""text-embeddings-inference 1.9.3: router/src/lib.rs: get_backend_model_type, PoolConfig; backends/src/lib.rs:
ModuleType; backends/candle/src/models/dense.rs; core/src/infer.rs, where requests normalise unless they say no;
backends/candle/src/models/bert.rs and distilbert.rs for SPLADE, pplx1.rs for what it quantises."""

import json
from dataclasses import replace

from ..config import PoolingConfig
from ..pooling import POOLING_FLAGS
from ..splade import Splade
from .common import OLD, Default, Engine, Model, dense, option, plain, unknown

_MODES = {"mean": "mean", "cls": "cls", "last": "last-token"}
_MODULES = tuple(OLD + name for name in ("Dense", "Normalize", "Pooling", "Transformer"))
_ACTIVATIONS = ("Identity", "Tanh")
_SPLADE = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")  # families with a head of their own for it
_QUANTISED = "bidirectional_pplx_qwen3"  # a family whose vectors it quantises, whatever modules.json says
_REFUSES = "it refuses to start without --pooling"


def _default(model: Model) -> Default:
    folder, nothing = model.folder, plain(model)
    if why := model.out_of_place(paths=False, top=True):
        return Default(nothing, (f"{why}: it does not start",), starts=False)
    if not model.architecture:
        return Default(nothing, ("config.json has no architectures: it does not start",), starts=False)
    if model.architecture.endswith("Classification"):
        return Default(nothing, (f"{model.architecture} is a classifier to it, whatever --pooling says",), starts=False)
    known = all(module.type in _MODULES for module in model.sources.modules or [])
    layers = dense(model, residual=False) if known else ()
    if any(layer.activation not in _ACTIVATIONS for layer in layers):
        return Default(
            nothing, ("it knows no activation of Dense but Tanh and Identity: it does not start",), starts=False
        )
    own = plain(model, layers=layers)
    if model.transformer.get("model_type", str) == _QUANTISED:
        own = replace(own, quantizer="int8_tanh")
    notes = () if known else ("a module type of modules.json is new to it: it would apply no Dense layer",)
    if model.wanted.sparse is not None:
        notes = (
            "--pooling splade keeps CLS and SEP; without flash attention, as on CPUs, it takes the maximum over "
            "padding, too, where texts of a batch differ in length",
        )
    if not folder.has("1_Pooling/config.json"):
        if "bert" in (model.transformer.get("model_type", str) or "").lower():
            return Default(replace(own, modes=("cls",)), ("1_Pooling/config.json is missing: cls it is", *notes))
        return Default(own, (f"1_Pooling/config.json is missing: {_REFUSES}",))
    pooling = folder.document("1_Pooling/config.json")
    flags = pooling.values
    if not {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= set(flags):
        note = f"it needs pooling_mode_cls_token and pooling_mode_mean_tokens: {_REFUSES}"
        return Default(own, (note, *notes))
    for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"):
        if flags.get(key):
            return Default(replace(own, modes=(POOLING_FLAGS[key],)), notes)
    return Default(own, (f"{unknown(model, pooling)}: {_REFUSES}", *notes))


def _setting(model: Model, own: PoolingConfig) -> str | None:
    wanted = model.wanted
    if wanted.sparse is not None:
        family = model.transformer.get("model_type", str)
        serves = model.architecture.endswith("MaskedLM") and family in _SPLADE
        return "--pooling splade; POST /embed_sparse" if serves and wanted.sparse == Splade() else None
    mode = option(wanted, own, _MODES)
    request: dict[str, object] = {} if wanted.normalize else {"normalize": False}
    if wanted.truncate_dim is not None:
        request["dimensions"] = wanted.truncate_dim
    return mode and f"--pooling {mode}" + (f"; in requests: {json.dumps(request)}" if request else "")


ENGINE = Engine("text-embeddings-inference", "1.9.3", _default, _setting)
