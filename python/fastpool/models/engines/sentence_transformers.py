"""sentence-transformers 6.2.0: sentence_transformer/model.py: _load_default_modules, and encode, which truncates what
the modules gave; base/model.py: _load_config_modules; sparse_encoder/model.py: _load_converted_modules, encode;
sparse_encoder/modules/splade_pooling.py; multi_vector_encoder/model.py: _parse_model_config, which reads PyLate's
folders, too."""

from dataclasses import replace

from ...text import shown
from ..config import PoolingConfig
from ..files import Document
from ..layers import LatentAttention, Layer, columns
from ..pooling import POOLING_FLAGS, POOLING_MODES
from .common import NEW, OLD, Default, Engine, Model, plain

_ON_TOKENS = "module_input_name='token_embeddings'"


def _default(model: Model) -> Default:
    wanted = model.wanted
    if why := model.out_of_place(paths=True, top=False):
        return Default(plain(model), (f"{why}: it does not load such a folder",), starts=False)
    family = model.sources.model_type
    if model.sources.modules is None or family not in (None, model.sources.family):
        causal = model.architecture.endswith("ForCausalLM") and model.transformer.values.get("is_causal", True)
        why = "modules.json is missing" if model.sources.modules is None else f"of a {family} it reads no modules.json"
        notes = [f"{why}: it takes lasttoken for causal LMs, mean for all others", *_own_code(wanted)]
        if model.sources.adapter.values:
            notes.append("of an adapter, the base model's config.json decides")
        own = replace(plain(model, "last" if causal else "mean"), normalize=False, truncate_dim=wanted.truncate_dim)
        return Default(replace(own, token_layers=_latent_attention(wanted)), tuple(notes))
    if wanted.normalize and wanted.truncate_dim is not None:
        note = "it normalises, then truncates, and does not normalise again; encode(normalize_embeddings=True) does"
        return Default(replace(wanted, normalize=False), (note,))
    if wanted.sparse is not None:
        notes = ["its SpladePooling keeps CLS and SEP"]
        if family is None:
            notes.append(
                "without model_type its SparseEncoder adds an untrained SparseAutoEncoder, or fails to load it"
            )
        return Default(wanted, (*notes, *_refused(model)))
    return Default(wanted, (*_own_code(wanted), *_refused(model)))


def _latent_attention(wanted: PoolingConfig) -> tuple[Layer, ...]:
    return tuple(layer for layer in wanted.token_layers if isinstance(layer, LatentAttention))


def _own_code(wanted: PoolingConfig) -> tuple[str, ...]:
    notes = []
    if _latent_attention(wanted):
        notes.append("its Transformer does the latent attention, by the model's own code (trust_remote_code=True)")
    if wanted.quantizer is not None:
        notes.append("the quantiser is the model's own code (trust_remote_code=True)")
    return tuple(notes)


def _refused(model: Model) -> tuple[str, ...]:
    """What it does not load, though its meaning is plain."""
    sizes = ("embedding_dimension", "word_embedding_dimension")
    if model.wanted.sparse is not None:
        pooling: Document | None = model.folder.document(model.wanted.sparse.source)
        keys = {*sizes, "pooling_strategy", "activation_function", "chunk_size"}
    else:
        pooling = model.module("Pooling", OLD, NEW["Pooling"])
        keys = {*sizes, *POOLING_FLAGS, "pooling_mode", "include_prompt"}
    if pooling is None:
        return ()
    notes = []
    if model.wanted.sparse is None and not any(key in pooling.values for key in sizes):
        notes.append(f"{pooling.name} has no embedding_dimension: it does not load such a folder")
    more = pooling.values.keys() - keys
    if more:
        notes.append(f"{pooling.name} has {shown(sorted(more))}: it does not load a folder with other keys")
    return tuple(notes)


def _step(layer: Layer, *more: str) -> str:
    sizes = {"Dense": ("inputs", "outputs"), "LayerNorm": ("inputs",), "Normalize": ()}
    name = type(layer).__name__
    arguments = [str(getattr(layer, size)) for size in sizes[name]]
    return f"{name}({', '.join([*arguments, *(['...'] if name == 'Dense' else []), *more])})"


def _setting(model: Model, own: PoolingConfig) -> str | None:
    wanted, splade = model.wanted, model.wanted.sparse
    if splade is not None:
        most = splade.max_active_dims
        cut = "" if most is None else f"; encode(..., max_active_dims={most})"
        return f"SpladePooling({splade.pooling!r}, {splade.activation!r}){cut}"
    names = {ours: theirs for theirs, ours in POOLING_MODES.items()}
    if not set(wanted.modes) <= set(names):
        return None
    modes = tuple(names[mode] for mode in wanted.modes)
    prompt = "" if wanted.include_prompt else ", include_prompt=False"
    layers = [
        layer for layer in wanted.token_layers if not isinstance(layer, LatentAttention)
    ]  # its Transformer's affair
    steps = [_step(layer, _ON_TOKENS) for layer in layers]
    if wanted.multi_vector is not None:
        return ", ".join([*steps, "MultiVectorMask(...)", *([f"Normalize({_ON_TOKENS})"] if wanted.normalize else [])])
    width = columns(wanted.token_layers, wanted.width) or "H"
    if wanted.layer_weights is not None:
        steps.append(f"WeightedLayerPooling({width}, {wanted.layer_weights.num_hidden_layers}, ...)")
    if wanted.word_weights is not None:
        steps.append("WordWeights(...)")
    steps.append(f"Pooling({width}, {modes if len(modes) > 1 else modes[0]!r}{prompt})")
    steps += map(_step, wanted.layers)
    steps += ["Normalize()"] if wanted.normalize else []
    setting = ", ".join([*steps, *(["FlexibleQuantizer()"] if wanted.quantizer else [])])
    if wanted.truncate_dim is None:
        return setting
    again = ", normalize_embeddings=True" if wanted.normalize else ""
    return f"{setting}; encode(..., truncate_dim={wanted.truncate_dim}{again})"


ENGINE = Engine("sentence-transformers", "6.2.0", _default, _setting)
