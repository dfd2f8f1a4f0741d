"""SGLang 0.5.23: srt/models/*.py: the Pooler of each class; srt/models/transformers.py: EmbeddingMixin, for all others;
models/gemma3_causal.py: EmbeddingGemmaModel, which reads Dense modules of the older type; configs/model_config.py."""

from dataclasses import replace

from ..config import PoolingConfig
from ..families import is_bidirectional, is_encoder
from .common import OLD, Default, Engine, Model, dense, differences, in_requests, matryoshka, overrides, plain

_CLS = ("BertModel", "Contriever", "XLMRobertaModel", "Lfm2BidirectionalModel")
_GENERIC_MODES = {"cls": "CLS", "last": "LAST"}


def _generic(model: Model) -> bool:
    """An encoder without a class of its own, which follows two keys of config.json."""
    return is_encoder(model.transformer) and model.architecture not in _CLS


def _default(model: Model) -> Default:
    if why := model.out_of_place(paths=False, top=True):
        return Default(plain(model), (f"{why}: it does not start",), starts=False)
    embedding_gemma = model.architecture == "Gemma3TextModel" and is_bidirectional(model.transformer)
    layers = dense(model) if embedding_gemma and model.module("Dense", OLD) else ()
    note = "the architecture decides; it reads no pooling configuration and has no option for one"
    if embedding_gemma or model.architecture == "EmbeddingGemma2Model":
        mode = "mean"
    elif model.architecture in _CLS:
        mode = "cls"
    elif _generic(model):
        values = model.transformer.values
        mode = "cls" if str(values.get("pooling_type")).upper() == "CLS" else "last"
        note = "keys of config.json decide: `pooling_type` CLS, else last, and `normalize`"
        return Default(replace(plain(model, mode), normalize=bool(values.get("normalize", True))), (note,))
    else:
        mode = "last"
    return Default(plain(model, mode, layers=layers), (note,))


def _setting(model: Model, own: PoolingConfig) -> str | None:
    wanted, changed = model.wanted, matryoshka(model)
    different = differences(own, wanted) - {"truncate_dim"}
    if _generic(model) and len(wanted.modes) == 1 and wanted.modes[0] in _GENERIC_MODES:
        if "modes" in different:
            changed["pooling_type"] = _GENERIC_MODES[wanted.modes[0]]
        if "normalize" in different:
            changed["normalize"] = wanted.normalize
        different -= {"modes", "normalize"}
    if different:
        return None
    return " ".join(["--is-embedding", *overrides("--json-model-override-args", changed)]) + in_requests(wanted)


ENGINE = Engine("SGLang", "0.5.23", _default, _setting)
