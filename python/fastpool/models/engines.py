"""What engines make of a model's folder: their setting for its pooling, and what they do without one.

Facts as read in the sources named at each engine; a newer release may decide differently.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from .config import PoolingConfig
from .files import Document, Folder
from .read import POOLING_FLAGS, POOLING_MODES, is_bidirectional, is_decoder, is_encoder

_OLD = "sentence_transformers.models."  # module types as releases before 5.4 wrote them
_NEW = {
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.",
    "Normalize": "sentence_transformers.base.modules.normalize.",
    "Dense": "sentence_transformers.base.modules.dense.",
}


@dataclass(frozen=True)
class EngineReport:
    """One engine's."""

    engine: str
    version: str
    setting: str | None  # what gives the folder's pooling; None: not possible
    by_itself: str  # what it does without the setting
    differs: bool  # by itself it does not pool as the folder says
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A folder as engines see it, and what it wants."""

    folder: Folder
    wanted: PoolingConfig

    @property
    def transformer(self) -> Document:
        return self.folder.optional("config.json")

    def module(self, name: str, *prefixes: str) -> Document | None:
        """The configuration of the first module of that class, if its type has one of the prefixes."""
        for module in self.folder.modules() or []:
            if module.type in [prefix + name for prefix in prefixes]:
                return self.folder.optional(module.config)
        return None


@dataclass(frozen=True)
class EngineDefault:
    """What an engine does without a setting. Where it gives no sentence vectors, `pooling` has no modes."""

    pooling: PoolingConfig
    notes: tuple[str, ...] = ()


def describe(pooling: PoolingConfig) -> str:
    """mean + max, Dense to 768, first 256 columns, normalised"""
    if not pooling.modes:
        return "no sentence vectors"
    steps = [" + ".join(pooling.modes) + ("" if pooling.include_prompt else " without the prompt")]
    steps += [f"Dense to {dense.outputs}" for dense in pooling.dense]
    if pooling.truncate_dim is not None:
        steps.append(f"first {pooling.truncate_dim} columns")
    return ", ".join([*steps, "normalised" if pooling.normalize else "not normalised"])


def _differences(own: PoolingConfig, wanted: PoolingConfig) -> set[str]:
    fields = ("modes", "normalize", "truncate_dim", "dense", "include_prompt")
    return {field for field in fields if getattr(own, field) != getattr(wanted, field)}


def _option(wanted: PoolingConfig, own: PoolingConfig, names: dict[str, str]) -> str | None:
    """The engine's name for the mode; None if no option gives that pooling: engines have options for the mode, none for
    the prompt or for Dense layers."""
    if len(wanted.modes) != 1 or _differences(own, wanted) & {"dense", "include_prompt"}:
        return None
    return names.get(wanted.modes[0])


def _matryoshka(option: str, wanted: PoolingConfig) -> str:
    """vLLM and SGLang take the columns from requests, of models that allow it."""
    if wanted.truncate_dim is None:
        return ""
    return f" {option} '{{\"is_matryoshka\": true}}'; in requests: {json.dumps({'dimensions': wanted.truncate_dim})}"


def _unknown(model: Model, pooling: Document) -> str:
    """Why a Pooling module gives an engine no mode."""
    if pooling.values.get("pooling_mode") or any(pooling.values.get(flag) for flag in POOLING_FLAGS):
        return f"it knows no {' + '.join(model.wanted.modes)}"
    return "the Pooling module names no mode"


# sentence-transformers 6.2.0, sentence_transformer/model.py: _load_default_modules, and encode, which truncates what
# the modules gave.


def _sentence_transformers(model: Model) -> EngineDefault:
    wanted = model.wanted
    if not model.folder.has("modules.json"):
        causal = (wanted.architecture or "").endswith("ForCausalLM")
        causal = causal and model.transformer.get("is_causal", bool) is not False
        return EngineDefault(
            replace(wanted, modes=("last" if causal else "mean",), normalize=False, dense=(), include_prompt=True),
            ("modules.json is missing: it takes lasttoken for causal LMs, mean for all others",),
        )
    if wanted.normalize and wanted.truncate_dim is not None:
        note = "it normalises, then truncates, and does not normalise again; encode(normalize_embeddings=True) does"
        return EngineDefault(replace(wanted, normalize=False), (note,))
    return EngineDefault(wanted)


def _sentence_transformers_setting(model: Model, own: PoolingConfig) -> str | None:
    wanted = model.wanted
    names = {ours: theirs for theirs, ours in POOLING_MODES.items()}
    if not set(wanted.modes) <= set(names):
        return None
    modes = tuple(names[mode] for mode in wanted.modes)
    prompt = "" if wanted.include_prompt else ", include_prompt=False"
    steps = [f"Pooling({wanted.width or 'H'}, {modes if len(modes) > 1 else modes[0]!r}{prompt})"]
    steps += [f"Dense({dense.inputs}, {dense.outputs}, ...)" for dense in wanted.dense]
    setting = ", ".join([*steps, *(["Normalize()"] if wanted.normalize else [])])
    if wanted.truncate_dim is None:
        return setting
    again = ", normalize_embeddings=True" if wanted.normalize else ""
    return f"{setting}; encode(..., truncate_dim={wanted.truncate_dim}{again})"


# vLLM 0.33.0, transformers_utils/config.py: get_pooling_config, parse_pooling_type, try_get_dense_modules;
# config/model.py: __post_init__; models/*.py: default_pooling_type; layers/pooler/seqwise/heads.py.

_VLLM_MODES = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}
_VLLM_NORMALIZE = "sentence_transformers.sentence_transformer.modules.normalize."


def _vllm_default(model: Model) -> tuple[str, tuple[str, ...]]:
    """The pooling that vLLM takes for an architecture, and notes on it. Encoders are CLS, by class or as whatever the
    Transformers backend runs; decoders are LAST, bidirectional or not."""
    if model.wanted.architecture == "EmbeddingGemma2Model":
        return "mean", ()
    if is_decoder(model.transformer):
        return "last", ()
    if is_encoder(model.transformer):
        return "cls", ()
    note = f"{model.wanted.architecture or 'the architecture'} is not known here: cls if it is an encoder, else last"
    return "cls", (note,)


def _vllm(model: Model) -> EngineDefault:
    default, notes = _vllm_default(model)
    pooling = model.module("Pooling", _OLD, _NEW["Pooling"])
    known = model.wanted.dense if model.module("Dense", _OLD, _NEW["Dense"]) else ()
    dense = tuple(replace(layer, residual=False) for layer in known)
    plain = replace(model.wanted, modes=(default,), normalize=True, truncate_dim=None, dense=dense, include_prompt=True)
    if pooling is None:
        note = "no Pooling module that it knows in modules.json: the architecture decides, and vectors are normalised"
        return EngineDefault(plain, (note, *notes))
    normalize = model.module("Normalize", _OLD, _NEW["Normalize"], _VLLM_NORMALIZE) is not None
    mode: str | None = None
    for key, value in pooling.values.items():  # the last key that it knows wins
        if value is True or (key == "pooling_mode" and isinstance(value, str)):
            word = (value if isinstance(value, str) else key.removeprefix("pooling_mode_")).partition("_")[0]
            mode = {"mean": "mean", "cls": "cls", "lasttoken": "last"}.get(word, mode)
    if mode is None:
        note = f"{_unknown(model, pooling)}: the architecture decides"
        return EngineDefault(replace(plain, normalize=normalize), (note, *notes))
    return EngineDefault(replace(plain, modes=(mode,), normalize=normalize))


def _vllm_setting(model: Model, own: PoolingConfig) -> str | None:
    wanted = model.wanted
    mode = _option(wanted, own, _VLLM_MODES)
    pooler = {"seq_pooling_type": mode, "use_activation": wanted.normalize}
    return mode and f"--pooler-config '{json.dumps(pooler)}'" + _matryoshka("--hf-overrides", wanted)


# SGLang 0.5.23, srt/models/*.py: the Pooler of each class; srt/models/transformers.py: EmbeddingMixin, for all others;
# models/gemma3_causal.py: EmbeddingGemmaModel, which reads Dense modules of the older type.

_SGLANG_CLS = ("BertModel", "Contriever", "XLMRobertaModel", "Lfm2BidirectionalModel")


def _sglang(model: Model) -> EngineDefault:
    architecture = model.wanted.architecture or ""
    embedding_gemma = architecture == "Gemma3TextModel" and is_bidirectional(model.transformer)
    dense = model.wanted.dense if embedding_gemma and model.module("Dense", _OLD) else ()
    if embedding_gemma or architecture == "EmbeddingGemma2Model":
        mode = "mean"
    elif architecture in _SGLANG_CLS or (model.transformer.get("pooling_type", str) or "").upper() == "CLS":
        mode = "cls"
    else:
        mode = "last"
    plain = replace(model.wanted, modes=(mode,), normalize=True, truncate_dim=None, dense=dense, include_prompt=True)
    return EngineDefault(
        plain, ("the architecture decides; it reads no pooling configuration and has no option for one",)
    )


def _sglang_setting(model: Model, own: PoolingConfig) -> str | None:
    if _differences(own, model.wanted) - {"truncate_dim"}:
        return None
    return "--is-embedding" + _matryoshka("--json-model-override-args", model.wanted)


# text-embeddings-inference 1.9.3, router/src/lib.rs: get_backend_model_type, PoolConfig; backends/src/lib.rs:
# ModuleType; core/src/infer.rs, where requests normalise unless they say no.

_TEI_MODES = {"mean": "mean", "cls": "cls", "last": "last-token"}
_TEI_MODULES = tuple(_OLD + name for name in ("Dense", "Normalize", "Pooling", "Transformer"))


def _tei(model: Model) -> EngineDefault:
    known = all(module.type in _TEI_MODULES for module in model.folder.modules() or [])
    dense = tuple(replace(layer, residual=False) for layer in model.wanted.dense) if known else ()
    plain = replace(model.wanted, modes=(), normalize=True, truncate_dim=None, dense=dense, include_prompt=True)
    notes = () if known else ("a module type of modules.json is new to it: it would apply no Dense layer",)
    refuses = "it refuses to start without --pooling"
    if not model.folder.has("1_Pooling/config.json"):
        if "bert" in (model.transformer.get("model_type", str) or "").lower():
            return EngineDefault(
                replace(plain, modes=("cls",)), ("1_Pooling/config.json is missing: cls it is", *notes)
            )
        return EngineDefault(plain, (f"1_Pooling/config.json is missing: {refuses}",))
    pooling = model.folder.document("1_Pooling/config.json")
    flags = pooling.values
    if not {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= set(flags):
        return EngineDefault(
            plain, (f"it needs pooling_mode_cls_token and pooling_mode_mean_tokens: {refuses}", *notes)
        )
    for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"):
        if flags.get(key):
            return EngineDefault(replace(plain, modes=(POOLING_FLAGS[key],)), notes)
    return EngineDefault(plain, (f"{_unknown(model, pooling)}: {refuses}", *notes))


def _tei_setting(model: Model, own: PoolingConfig) -> str | None:
    wanted = model.wanted
    mode = _option(wanted, own, _TEI_MODES)
    request: dict[str, object] = {} if wanted.normalize else {"normalize": False}
    if wanted.truncate_dim is not None:
        request["dimensions"] = wanted.truncate_dim
    return mode and f"--pooling {mode}" + (f"; in requests: {json.dumps(request)}" if request else "")


# llama.cpp, conversion/base.py: _try_set_pooling_type, which conversion/llama.py never calls; conversion/gemma.py:
# EmbeddingGemma (2bbcf7fc); src/llama-graph.cpp: build_dense_out (00395eb2). Its server normalises unless a request
# says no.

_LLAMA_MODES = {"mean": "mean", "cls": "cls", "last": "last"}
_LLAMA_WITHOUT = ("llama", "mistral", "mixtral")  # the families of conversion/llama.py
_LLAMA_DENSE = "--sentence-transformers-dense-modules"


def _llama_dense(model: Model) -> bool:
    """The converter has an option for the Dense layers: EmbeddingGemma's, which are two products with a matrix."""
    dense, architecture = model.wanted.dense, model.wanted.architecture
    if architecture != "Gemma3TextModel" or model.module("Dense", _OLD) is None or len(dense) != 2:
        return False
    if dense[0].name != "2_Dense" or dense[1].outputs != dense[0].inputs:
        return False
    return not any(layer.bias or layer.residual or layer.activation != "Identity" for layer in dense)


def _llama(model: Model) -> EngineDefault:
    plain = replace(model.wanted, modes=(), normalize=True, truncate_dim=None, dense=(), include_prompt=True)
    pooling = model.module("Pooling", _OLD)
    if pooling is None:
        return EngineDefault(
            plain, ("the converter finds no Pooling module of the older type: token vectors without --pooling",)
        )
    family = model.transformer.get("model_type", str)
    if family in _LLAMA_WITHOUT:
        return EngineDefault(plain, (f"the converter writes no pooling for {family}: token vectors without --pooling",))
    notes = (f"the converter leaves Dense layers out without {_LLAMA_DENSE}",) if _llama_dense(model) else ()
    for key in ("pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_lasttoken"):
        if key not in pooling.values:
            return EngineDefault(plain, (f"the converter fails: {pooling.name} has no {key}", *notes))
        if pooling.values[key]:
            return EngineDefault(replace(plain, modes=(POOLING_FLAGS[key],)), notes)
    return EngineDefault(plain, (f"in the converter, {_unknown(model, pooling)}", *notes))


def _llama_setting(model: Model, own: PoolingConfig) -> str | None:
    wanted = model.wanted
    if wanted.truncate_dim is not None:
        return None
    converted = _llama_dense(model)
    mode = _option(wanted, replace(own, dense=wanted.dense) if converted else own, _LLAMA_MODES)
    server = f"--pooling {mode}" + ("" if wanted.normalize else " --embd-normalize -1")
    return mode and (f"convert_hf_to_gguf.py {_LLAMA_DENSE}; " if converted else "") + server


_ENGINES: tuple[
    tuple[str, str, Callable[[Model], EngineDefault], Callable[[Model, PoolingConfig], str | None]], ...
] = (
    ("sentence-transformers", "6.2.0", _sentence_transformers, _sentence_transformers_setting),
    ("vLLM", "0.33.0", _vllm, _vllm_setting),
    ("SGLang", "0.5.23", _sglang, _sglang_setting),
    ("text-embeddings-inference", "1.9.3", _tei, _tei_setting),
    ("llama.cpp", "2bbcf7fc", _llama, _llama_setting),
)


def answers(folder: Folder, wanted: PoolingConfig) -> list[EngineReport]:
    """Every engine's answer, in the order of the table above."""
    model, found = Model(folder, wanted), []
    for engine, version, decide, setting in _ENGINES:
        own = decide(model)
        differs = bool(_differences(own.pooling, wanted))
        found.append(
            EngineReport(engine, version, setting(model, own.pooling), describe(own.pooling), differs, own.notes)
        )
    return found
