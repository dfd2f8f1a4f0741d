"""Which modes a folder wants: what its Pooling module says, else what other files say, else what the model is."""

from ..text import shown
from . import elsewhere, unlike
from .chain import CLASSES, OTHERS
from .decisions import Certainty, Record
from .families import architecture, is_bidirectional, is_causal, is_encoder
from .files import Document, Folder, Module
from .sources import Sources

# sentence-transformers' name -> ours (6.2.0, sentence_transformer/modules/pooling.py).
POOLING_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
# The keys before 5.4, in the order in which their vectors are concatenated.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_WORSE = "the wrong one raises no error, it makes search worse"


def left_over(folder: Folder, record: Record) -> list[Module]:
    """The modules of a folder of sentence-transformers whose modules.json is missing, as far as their folders tell;
    none where no Pooling is among them."""
    modules = [module for module in folder.left_over() if module.name in (*CLASSES, *OTHERS, *unlike.MODULES)]
    poolings = [module for module in modules if module.name == "Pooling" and folder.has(module.config)]
    if not poolings:
        return []
    first, *more = poolings
    found = [module for module in modules if module.name != "Pooling" or module is first]
    if more:
        record.contradiction(
            f"modules.json is missing, and {', '.join(module.path for module in poolings)} are all there: the first is "
            "followed, though nothing says which one is the model's"
        )
    followed = ", ".join([first.config, *(module.path for module in found[1:] if module is not first)])
    record.contradiction(
        f"modules.json is missing: {followed} is followed here, but sentence-transformers and vLLM do not look at it "
        "and choose a pooling of their own"
    )
    return found


def modes(sources: Sources, pooling: Document | None, record: Record) -> tuple[str, ...]:
    """Decides them. `pooling` is the configuration of the Pooling module, or of one that is left over.

    Raises:
        ValueError: a key that says it says something else, and which.
    """
    if pooling is not None:
        found = _of(pooling, record, sources.certainty)
        for said in elsewhere.others(sources, found, record.decisions[-1].source):
            record.contradiction(said)
        code = elsewhere.own_class(sources.transformer)
        if sources.modules is None and code is not None:
            record.warn(f"the model's own code ({code}), which is not run here, may pool in its own way")
        return found
    statements = elsewhere.statements(sources)
    if statements:
        first, *more = statements
        for other in more:
            if other.mode != first.mode:
                record.contradiction(
                    f"{other.source} says {other.mode}, {first.source} says {first.mode}, which is followed"
                )
        return record.decide("modes", (first.mode,), first.source, "stated")
    return _of_the_model(sources, record)


def _of_the_model(sources: Sources, record: Record) -> tuple[str, ...]:
    transformer = sources.transformer
    said = architecture(transformer)
    source, name = f"{transformer.name}: architectures ({said or 'none'})", said or "this model"
    causal = is_causal(transformer)
    mode = "last" if causal else "mean"
    if sources.adapter.values:
        base = sources.adapter.get("base_model_name_or_path", str) or "a model that is not named"
        why = (
            f"{mode}, although the folder is an adapter of {base}, may have been trained for another, and does not say"
        )
        return record.guess("modes", (mode,), source, f"the pooling is a guess: {why}; {_WORSE}")
    code = elsewhere.own_class(transformer)
    if code is not None:
        why = f"{mode}, although the model's own code ({code}), which is not run here, may pool in its own way"
        source = f"{transformer.name}: auto_map ({code})"
        return record.guess("modes", (mode,), source, f"the pooling is a guess: {why}; {_WORSE}")
    if causal:  # no other token has seen the whole text
        return record.decide("modes", ("last",), source, "implied")
    if is_encoder(transformer) or is_bidirectional(transformer):
        why = f"{name} may have been trained for mean or for cls, and nothing in the folder says which"
    else:
        why = (
            f"mean, although {name} is not known here; an encoder may have been trained for mean or for cls, a causal "
            "model wants last, and nothing in the folder says which"
        )
    return record.guess("modes", ("mean",), source, f"the pooling is a guess: {why}; {_WORSE}")


def _of(document: Document, record: Record, certainty: Certainty) -> tuple[str, ...]:
    for key in document.values:
        if key.startswith("pooling_mode_") and key not in POOLING_FLAGS and document.values[key]:
            key = key if key.isprintable() else shown(key)
            raise ValueError(f"{document.name}: {key} is no pooling mode; expected {', '.join(POOLING_FLAGS)}")
    flags = tuple(mode for key, mode in POOLING_FLAGS.items() if document.get(key, bool))
    said = document.values.get("pooling_mode")
    if said is None:
        if not flags:
            record.warn(f"{document.name}: it names no pooling mode: mean, as sentence-transformers takes it")
            return record.decide("modes", ("mean",), f"{document.name}: no pooling_mode", "implied")
        keys = ", ".join(key for key, mode in POOLING_FLAGS.items() if mode in flags)
        return record.decide("modes", flags, f"{document.name}: {keys}", certainty)
    names = said if isinstance(said, list) else [said]
    if not names or not all(isinstance(name, str) and name in POOLING_MODES for name in names):
        raise document.error("pooling_mode", f"one of {', '.join(POOLING_MODES)}, or a list of them")
    found = tuple(POOLING_MODES[name] for name in names)
    if flags and set(flags) != set(found):
        record.contradiction(
            f"{document.name}: pooling_mode says {', '.join(found)}, the older pooling_mode_* keys say "
            f"{', '.join(flags)}; the first holds, but programs that know the older keys only pool differently"
        )
    return record.decide("modes", found, f"{document.name}: pooling_mode", certainty)
