"""vLLM 0.33.0: transformers_utils/config.py: get_pooling_config, parse_pooling_type, try_get_dense_modules;
config/model.py: __post_init__, _SUFFIX_TO_DEFAULTS; models/config.py; models/*.py: default_pooling_type;
models/adapters.py: _load_st_projector; models/bert.py: SPLADESparsePooler, BertSpladeSparseEmbeddingModel;
layers/pooler/seqwise/heads.py; layers/pooler/tokwise/heads.py; pooling_params.py."""

import json
from dataclasses import replace

from ..config import PoolingConfig
from ..families import is_decoder, is_encoder
from ..files import Document, Folder, inside
from ..layers import Dense, Layer
from ..sources import PYLATE_DENSE
from ..splade import Splade
from .common import NEW, OLD, Default, Engine, Model, dense, in_requests, matryoshka, option, overrides, plain, unknown

_MODES = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}
_NORMALIZE = "sentence_transformers.sentence_transformer.modules.normalize."  # of 5.4 to 5.7
_ACTIVATIONS = ("GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh")
# Architectures by the end of their name that are served as generators, unless a Pooling module is there or one asks for
# --runner pooling; as is every architecture of no known end.
_GENERATORS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
_POOLED = ("ForTextEncoding", "ForRewardModeling", "Model", "Classification", "RobertaForMaskedLM")
# Their own class takes config.json's `pooling` over any other setting.
_NEMOTRON = ("LlamaBidirectionalModel", "LlamaNemotronVLModel")
_NEMOTRON_MODES = {"mean": "avg", "cls": "cls", "last": "last"}


def _architecture(model: Model) -> tuple[str, tuple[str, ...]]:
    """The pooling that vLLM takes for an architecture, and notes on it. Encoders are CLS, by class or as whatever the
    Transformers backend runs; decoders are LAST, bidirectional or not."""
    if model.architecture == "EmbeddingGemma2Model":
        return "mean", ()
    if is_decoder(model.transformer):
        return "last", ()
    if is_encoder(model.transformer):
        return "cls", ()
    note = f"{model.architecture or 'the architecture'} is not known here: cls if it is an encoder, else last"
    return "cls", (note,)


def _layers(model: Model) -> tuple[Layer, ...]:
    """Dense layers; none, if it does not know an activation. One that is not named is none to it, and Tanh to
    sentence-transformers."""
    if not model.module("Dense", OLD, NEW["Dense"], PYLATE_DENSE.removesuffix("Dense")):
        return ()
    found = dense(model, residual=False)
    if any(layer.activation not in _ACTIVATIONS for layer in found):
        return ()
    return tuple(replace(layer, activation=_activation(model.folder, layer)) for layer in found)


def _activation(folder: Folder, layer: Dense) -> str:
    return (
        layer.activation
        if folder.document(inside(layer.name, "config.json")).get("activation_function", str)
        else "Identity"
    )


def _nemotron(model: Model) -> str | None:
    word: object = model.transformer.values.get("pooling")
    if word is None and model.architecture == "LlamaNemotronVLModel":
        inner = model.transformer.get("llm_config", dict) or {}
        word = inner.get("pooling", "avg")
    return None if word is None else str(word)


def _generates(model: Model) -> bool:
    name = model.architecture
    return bool(name) and (name.endswith(_GENERATORS) or not name.endswith(_POOLED))


def _default(model: Model) -> Default:
    if why := model.out_of_place(paths=True, top=True):
        return Default(plain(model), (f"{why}: it does not start",), starts=False)
    mode, notes = _architecture(model)
    if model.wanted.multi_vector is not None:
        notes += ("its token_embed gives every token's vector: it skips no words and fills up no queries",)
    pooling = model.module("Pooling", OLD, NEW["Pooling"])
    own = plain(model, mode, layers=_layers(model))
    if model.architecture == "BertForMaskedLM":
        note = "it gives the logits of each token for BertForMaskedLM"
        return Default(replace(own, modes=()), (note, *_about_splade(model)))
    if pooling is None and _generates(model):
        note = "no Pooling module that it knows in modules.json: it starts as a generator without --runner pooling"
        return Default(replace(own, modes=()), (note, *notes))
    normalize = pooling is None or model.module("Normalize", OLD, NEW["Normalize"], _NORMALIZE) is not None
    if model.architecture in _NEMOTRON:
        word = _nemotron(model)
        said = [ours for ours, theirs in _NEMOTRON_MODES.items() if theirs == word]
        if not said:
            note = "it does not start unless `pooling` in config.json is avg, cls or last"
            return Default(replace(own, modes=()), (note,))
        note = "`pooling` in config.json decides, whatever --pooler-config says"
        return Default(replace(own, modes=(*said,), normalize=normalize), (note,))
    if pooling is None:
        note = "no Pooling module that it knows in modules.json: the architecture decides, and vectors are normalised"
        return Default(own, (note, *notes))
    if pooling.name == "config.json":  # of a module without a folder of its own, it finds none
        pooling = Document(pooling.name, {})
    mode_said: str | None = None
    for key, value in pooling.values.items():  # the last key that it knows wins
        if value is True or (key == "pooling_mode" and isinstance(value, str)):
            word = (value if isinstance(value, str) else key.removeprefix("pooling_mode_")).partition("_")[0]
            mode_said = {"mean": "mean", "cls": "cls", "lasttoken": "last"}.get(word, mode_said)
    if mode_said is None:
        note = f"{unknown(model, pooling)}: the architecture decides"
        return Default(replace(own, normalize=normalize), (note, *notes))
    return Default(replace(own, modes=(mode_said,), normalize=normalize))


def _with_dimensions(model: Model) -> Default:
    """The same, and whether requests may ask for fewer columns, of which only config.json's word counts."""
    own, values = _default(model), model.transformer.values
    if not (own.starts and own.pooling.modes) or values.get("is_matryoshka") or values.get("matryoshka_dimensions"):
        return own
    note = "it refuses requests with `dimensions`: config.json has neither is_matryoshka nor matryoshka_dimensions"
    return replace(own, notes=(*own.notes, note))


def _special_tokens(model: Model) -> list[str]:
    """The keys of config.json by which its SPLADE pooler knows CLS and SEP, which it leaves out."""
    return [key for key in ("cls_token_id", "sep_token_id") if model.transformer.values.get(key) is not None]


def _about_splade(model: Model) -> tuple[str, ...]:
    if model.wanted.sparse is None:
        return ()
    left_out = " and ".join(_special_tokens(model)) or "neither"
    return (
        "its SPLADE pooler leaves CLS and SEP out where config.json says their ids, cls_token_id and sep_token_id "
        f"(here {left_out}); fastpool.splade leaves them out where starts= and ends= do",
    )


def _splade(model: Model) -> str | None:
    """The maximum of log1p(relu(logit)) for BERT, with CLS and SEP as in sentence-transformers; nothing else."""
    splade = model.wanted.sparse
    if model.architecture != "BertForMaskedLM" or splade != Splade():
        return None
    changed: dict[str, object] = {"architectures": ["BertSpladeSparseEmbeddingModel"]}
    return " ".join(overrides("--hf-overrides", changed | dict.fromkeys(_special_tokens(model))))


def _token_embed(model: Model) -> str | None:
    """Every token's vector, through Dense layers, normalised or not; no rule which of them count."""
    wanted = model.wanted
    if wanted.multi_vector is None or not wanted.multi_vector.counts_all or _layers(model) != wanted.token_layers:
        return None
    pooler = {"task": "token_embed", "use_activation": wanted.normalize}
    parts = ["--runner pooling", f"--pooler-config '{json.dumps(pooler)}'"]
    return " ".join([*parts, *overrides("--hf-overrides", matryoshka(model))]) + in_requests(wanted)


def _setting(model: Model, own: PoolingConfig) -> str | None:
    wanted, architecture = model.wanted, model.architecture
    if wanted.sparse is not None:
        return _splade(model)
    if wanted.multi_vector is not None:
        return _token_embed(model)
    mode = option(wanted, own, _MODES)
    if mode is None:
        return None
    changed: dict[str, object] = {}
    parts = []
    if architecture == "BertForMaskedLM":
        changed["architectures"] = ["BertModel"]
    elif not own.modes and _generates(model):
        parts.append("--runner pooling")
    if architecture in _NEMOTRON:
        parts.append("--trust-remote-code")
        changed["pooling"] = _NEMOTRON_MODES[wanted.modes[0]]
        pooler: dict[str, object] = {"use_activation": wanted.normalize}
    else:
        pooler = {"seq_pooling_type": mode, "use_activation": wanted.normalize}
    parts.append(f"--pooler-config '{json.dumps(pooler)}'")
    parts += overrides("--hf-overrides", changed | matryoshka(model))
    return " ".join(parts) + in_requests(wanted)


ENGINE = Engine("vLLM", "0.33.0", _with_dimensions, _setting)
