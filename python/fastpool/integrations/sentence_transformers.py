"""sentence-transformers through fastpool: `patch` for one model, `install` for every model of the process.

Both put fastpool's `forward` in the place of theirs, in Pooling, Normalize, SpladePooling and MultiVectorMask, and
touch nothing else: types, attributes, configurations and saved files stay what they are. docs/sentence-transformers.md
says where results differ.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import functional, sparse, token_outputs
from ..calls import accumulator
from ..models.pooling import POOLING_FLAGS, POOLING_MODES

Features = dict[str, Any]
Forward = Callable[..., Features]  # of a module and features; what else theirs takes comes by name
Model = TypeVar("Model", bound=nn.Module)

_NAME = "fastpool.integrations.sentence_transformers"
_logger = logging.getLogger(_NAME)

# Where Pooling and Normalize are: from 5.4 on, and before.
_PACKAGES = ("sentence_transformers.sentence_transformer.modules", "sentence_transformers.models")
# SpladePooling, likewise; before 5.0 there is none.
_SPARSE_PACKAGES = ("sentence_transformers.sparse_encoder.modules", "sentence_transformers.sparse_encoder.models")
_MAJORS = range(3, 7)  # major versions that have been read and run
_SPARSE_WIDTHS = ("embedding_dimension", "word_embedding_dimension")  # what a SpladePooling calls it, and called it
_installed: dict[Any, Any] = {}  # their classes, each with the forward that `install` gave it
_PARTS = ("_forward_padded", "_forward_flattened")  # what their Pooling.forward is made of, from 5.4 on


def _prompt_length(given: Any) -> int | Tensor | None:
    """The tokens to leave out at each text's beginning: of every text, or [B] or [1]. Below 0 is 0: none."""
    if isinstance(given, Tensor):
        return given.flatten().long().clamp(min=0)  # training gives [B, 1] too
    return None if given is None else max(int(given), 0)


class _Batch:
    """The token states of a batch, and which of them count: padded rows with a mask, or packed rows (`cu_seq_lens_q`).

    A prompt that is not to be pooled is left out row by row, from each text's first token on, padding not counted.
    """

    def __init__(self, module: nn.Module, features: Features) -> None:
        hidden: Tensor = features["token_embeddings"]
        hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()  # once, where each of several modes would
        self.cu_seqlens: Tensor | None = features.get("cu_seq_lens_q")
        self.hidden = hidden if self.cu_seqlens is None else hidden.squeeze(0)
        mask = features.get("attention_mask")
        # A mask of other tokens than these (a model that adds or merges some) says nothing about them.
        self.mask: Tensor | None = mask if mask is not None and mask.shape[-1] == hidden.shape[1] else None
        self.prompt = None if module.include_prompt else _prompt_length(features.get("prompt_length"))

    def begins(self) -> Tensor:
        """[B], the row of each text's first token, its prompt included."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1]
        if self.mask is None:
            return torch.zeros(self.hidden.shape[:1], dtype=torch.int64, device=self.hidden.device)
        return self.mask.ne(0).int().argmax(dim=1)

    def segments(self) -> dict[str, Any]:
        """The tokens that count, as fastpool's functions take them."""
        if self.cu_seqlens is None:
            if self.prompt is None:
                return {"mask": self.mask}
            return {"mask": self.mask, "starts": (self.begins() + self.prompt).clamp(max=self.hidden.shape[1])}
        if self.prompt is None:
            return {"cu_seqlens": self.cu_seqlens}
        ends = self.cu_seqlens[1:]
        return {"starts": torch.minimum(self.begins() + self.prompt, ends).to(ends.dtype), "ends": ends}

    def positions(self) -> Tensor:
        """[B, S] or [T], the place of each token in its text: 1, 2, 3, ... The prompt counts, pooled or not."""
        rows = torch.arange(self.hidden.shape[-2], device=self.hidden.device)
        if self.cu_seqlens is None:
            begins = self.begins()[:, None]
        else:
            begins = self.cu_seqlens[torch.bucketize(rows, self.cu_seqlens[1:], right=True)]
        return (rows + 1 - begins).to(accumulator(self.hidden.dtype))


def _modes(module: nn.Module) -> tuple[str, ...]:
    """fastpool's names of a Pooling's modes, in their order of concatenation."""
    if hasattr(module, "pooling_mode"):  # from 5.4 on
        named: Any = module.pooling_mode
        return tuple(POOLING_MODES[name] for name in ((named,) if isinstance(named, str) else named))
    return tuple(mode for flag, mode in POOLING_FLAGS.items() if getattr(module, flag))


def _weighted(mode: str, batch: _Batch, token_weights_sum: Tensor) -> Tensor:
    """A mean of tokens that WordWeights has multiplied by their weights: their sum, over the sum of the weights."""
    hidden = batch.hidden * batch.positions()[..., None] if mode == "weighted_mean" else batch.hidden
    total = functional.sum(hidden, **batch.segments(), out_dtype=accumulator(hidden.dtype))
    divisor = token_weights_sum.to(torch.promote_types(total.dtype, token_weights_sum.dtype)).clamp(min=1e-9)[:, None]
    result = total / (divisor.sqrt() if mode == "mean_sqrt_len" else divisor)
    return result.to(torch.promote_types(batch.hidden.dtype, token_weights_sum.dtype))


def _is_special(mode: str, features: Features) -> bool:
    """Whether the vector of a mode depends on more than token embeddings and a mask."""
    if mode == "cls":
        return "cls_token_embeddings" in features
    return mode in ("mean", "mean_sqrt_len", "weighted_mean") and "token_weights_sum" in features


def _special(mode: str, batch: _Batch, features: Features) -> Tensor:
    if mode == "cls":
        cls_token: Tensor = features["cls_token_embeddings"]
        return cls_token
    return _weighted(mode, batch, features["token_weights_sum"])


def _plain(modes: Sequence[str], batch: _Batch) -> Tensor:
    # Without weights, fastpool would count positions from behind the prompt.
    counted = "weighted_mean" in modes and batch.prompt is not None
    weights = batch.positions() if counted else None
    return functional.pool(batch.hidden, weights=weights, modes=modes, **batch.segments())


def _pool(module: nn.Module, features: Features, **_: Any) -> Features:
    """Pooling.forward: features["sentence_embedding"] [B, modes * H] from features["token_embeddings"]."""
    batch = _Batch(module, features)
    modes = _modes(module)
    if any(_is_special(mode, features) for mode in modes):
        vectors = [
            _special(mode, batch, features) if _is_special(mode, features) else _plain((mode,), batch) for mode in modes
        ]
        features["sentence_embedding"] = torch.cat(vectors, dim=-1)
    else:
        features["sentence_embedding"] = _plain(modes, batch)
    return features


def _normalize(module: nn.Module, features: Features, **_: Any) -> Features:
    """Normalize.forward: features[module_output_name] from features[module_input_name]."""
    name: Any = getattr(module, "module_input_name", "sentence_embedding")  # before 6.0 it has no names
    x = features.get(name)
    if x is not None:
        # Under autocast the dtype of their result is autocast's choice, and differs between devices.
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        out_dtype = nn.functional.normalize(x.new_empty(0, 1), dim=-1).dtype if autocast else None
        features[getattr(module, "module_output_name", name)] = functional.l2_normalize(x, out_dtype=out_dtype)
    return features


def _splade(module: nn.Module, features: Features, **_: Any) -> Features:
    """SpladePooling.forward: features["sentence_embedding"] [B, V] from the logits in features["token_embeddings"]."""
    logits, cu_seqlens = features["token_embeddings"], features.get("cu_seq_lens_q")
    mask = features["attention_mask"] if cu_seqlens is None else None
    features["sentence_embedding"] = sparse.splade(
        logits if cu_seqlens is None else logits.squeeze(0), mask, cu_seqlens,
        pooling=str(module.pooling_strategy), activation=str(module.activation_function),
    )  # fmt: skip
    # What theirs finds out by its first batch.
    name = next(one for one in _SPARSE_WIDTHS if hasattr(module, one))
    if getattr(module, name) is None:
        setattr(module, name, logits.shape[-1])
    return features


def _multi_vector_mask(module: Any, features: Features, task: str | None = None, **_: Any) -> Features:
    """MultiVectorMask.forward: features["attention_mask"] of the tokens that are compared."""
    if "cu_seq_lens_q" in features:  # encode() cuts rows by their mask, so they are padded again
        features = importlib.import_module("sentence_transformers.util.tensor").repad_flattened_features(features)
    if "input_ids" not in features:
        return features
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    expansion = features.get("query_expansion_positions") if task == "query" else None
    if expansion is not None:
        mask = mask | expansion.bool()
    skip = module._skiplist_ids if (task or "document") in module.skiplist_tasks else None
    keep = module.keep_only_token_ids if task != "query" else None
    features["attention_mask"] = token_outputs.keep_mask(
        ids, mask, skip=None if skip is None else skip.to(ids.device), keep=keep or None
    )
    return features


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning("%s: %s", _NAME, message)


def _traced() -> bool:
    """TorchScript and ONNX know torch's own operators only: there, their forward has to run."""
    if not (torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()):  # type: ignore[attr-defined]  # not exported
        return False
    _log_once("torch.jit.trace and ONNX export record sentence-transformers' own pooling, not fastpool's")
    return True


def _overridden(kind: type, base: type, names: tuple[str, ...]) -> str:
    """Which of the methods `names` a subclass does in its own way, of which fastpool knows nothing; "" if none."""
    return ", ".join(name for name in names if getattr(kind, name, None) is not getattr(base, name, None))


def _instance_forward(ours: Forward, module: nn.Module, features: Features, **kwargs: Any) -> Features:
    if _traced():
        theirs: Features = type(module).forward(module, features, **kwargs)
        return theirs
    return ours(module, features, **kwargs)


def _class_forward(ours: Forward, base: Any) -> Any:
    theirs = base.forward

    @functools.wraps(theirs)
    def forward(self: nn.Module, features: Features, **kwargs: Any) -> Features:
        if type(self) is not base and (own := _overridden(type(self), base, _PARTS)):
            _log_once(f"{type(self).__name__} keeps its own pooling: it overrides {own}")
        elif not _traced():
            return ours(self, features, **kwargs)
        result: Features = theirs(self, features, **kwargs)
        return result

    forward.fastpool_replaces = theirs  # type: ignore[attr-defined]  # a function's type has no attributes
    return forward


def _import(package: str) -> Any:
    """The package, or None where this version of sentence-transformers has none of this name."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == "sentence_transformers" or not package.startswith(f"{error.name}"):
            raise  # it is not installed, or lacks something
        return None


@functools.cache
def _replacements() -> dict[Any, Forward]:
    """Their classes, each with what does its work. Raises RuntimeError where they are not as fastpool knows them."""
    version: str = importlib.import_module("sentence_transformers").__version__

    def expect(found: bool, but: str) -> None:
        if not found:
            raise RuntimeError(f"{_NAME}: sentence-transformers {version} is not as expected: {but}")

    majors = tuple(map(str, _MAJORS))
    expect(version.split(".")[0] in majors, f"fastpool knows the versions {', '.join(majors)}")
    package: Any = next(filter(None, map(_import, _PACKAGES)), None)
    expect(package is not None, f"there is no {' and no '.join(_PACKAGES)}")
    for name in ("Pooling", "Normalize"):
        kind = getattr(package, name, None)
        expect(isinstance(kind, type) and hasattr(kind, "forward"), f"{package.__name__} has no class {name}")
    modes = getattr(package.Pooling, "POOLING_MODES", ())
    expect(set(modes) == set(POOLING_MODES), f"Pooling.POOLING_MODES is {', '.join(modes) or 'missing'}")
    example = package.Pooling(1)
    says = ("pooling_mode",) if hasattr(example, "pooling_mode") else tuple(POOLING_FLAGS)
    for attribute in (*says, "include_prompt"):
        expect(hasattr(example, attribute), f"a Pooling has no attribute {attribute}")
    found: dict[Any, Forward] = {package.Pooling: _pool, package.Normalize: _normalize}
    package = next(filter(None, map(_import, _SPARSE_PACKAGES)), None)
    if package is not None:
        kind = getattr(package, "SpladePooling", None)
        expect(isinstance(kind, type) and hasattr(kind, "forward"), f"{package.__name__} has no class SpladePooling")
        example = package.SpladePooling()
        for attribute in ("pooling_strategy", "activation_function"):
            expect(hasattr(example, attribute), f"a SpladePooling has no attribute {attribute}")
        expect(any(hasattr(example, one) for one in _SPARSE_WIDTHS), f"a SpladePooling has no {_SPARSE_WIDTHS[0]}")
        found[package.SpladePooling] = _splade
    package = _import("sentence_transformers.multi_vector_encoder.modules")
    if package is not None:  # from 6.0 on
        kind = getattr(package, "MultiVectorMask", None)
        expect(isinstance(kind, type) and hasattr(kind, "forward"), f"{package.__name__} has no class MultiVectorMask")
        example = package.MultiVectorMask()
        for attribute in ("skiplist_tasks", "keep_only_token_ids", "_skiplist_ids"):
            expect(hasattr(example, attribute), f"a MultiVectorMask has no attribute {attribute}")
        found[package.MultiVectorMask] = _multi_vector_mask
    return found


def _is_patched(path: str, module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    ours = isinstance(forward, functools.partial) and forward.func is _instance_forward
    if forward is not None and not ours:
        raise RuntimeError(f"{_NAME}: somebody else has replaced the forward of module {path!r}: {forward!r}")
    return ours


def _modules(model: Any) -> Iterator[tuple[str, nn.Module, Forward]]:
    """Each Pooling, Normalize, SpladePooling and MultiVectorMask in a model, however deep, with what does its work."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a SentenceTransformer, got {type(model).__name__}")
    for path, module in model.named_modules():
        for base, ours in _replacements().items():
            if isinstance(module, base):
                if own := _overridden(type(module), base, ("forward", *_PARTS)):
                    raise RuntimeError(
                        f"{_NAME}: module {path!r} is a {type(module).__name__}, which overrides {own} of "
                        f"{base.__name__}: fastpool does not know what it does"
                    )
                yield path, module, ours


def patch(model: Model) -> Model:
    """Makes a model's Pooling, Normalize, SpladePooling and MultiVectorMask modules, however deep in it, run through
    fastpool. Returns the model.

    Types and configurations stay, so the model saves, loads and prints as before; copies and pickles of it are patched
    too, and loading such a pickle needs fastpool. torch.jit.trace and ONNX export record sentence-transformers' own
    operators, and a warning in the log says so. Patching twice is patching once.

    Args:
        model: a sentence_transformers.SentenceTransformer, SparseEncoder or MultiVectorEncoder, or any torch module
            that holds their modules.

    Raises:
        TypeError: it is no torch module.
        ValueError: it holds no Pooling, Normalize, SpladePooling or MultiVectorMask.
        RuntimeError: sentence-transformers is not as fastpool knows it (versions 3 to 6 are); a module is a subclass
            with a forward of its own, or something else has replaced its forward. Nothing is patched then.

    >>> model = patch(SentenceTransformer("all-MiniLM-L6-v2"))
    """
    found = list(_modules(model))
    if not found:
        raise ValueError(
            f"{_NAME}: the model holds no {', '.join(one.__name__ for one in _replacements())} of sentence-transformers"
        )
    todo = [(module, ours) for path, module, ours in found if not _is_patched(path, module)]
    for module, ours in todo:
        # Not a bound method: those are pickled by name, and that name is the class's own forward.
        vars(module)["forward"] = functools.partial(_instance_forward, ours, module)
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`; a model that is not patched stays as it is. Returns the model. Raises what `patch` raises."""
    for module in [module for path, module, _ in _modules(model) if _is_patched(path, module)]:
        del vars(module)["forward"]
    return model


def install() -> None:
    """Makes every Pooling, Normalize, SpladePooling and MultiVectorMask of this process run through fastpool, built
    before or after this call.

    For programs that build their models themselves. It holds in this process only: start-up code of worker processes
    has to call it too (models that were patched take it along). A subclass with a forward of its own keeps it, and one
    that overrides parts of Pooling.forward does too, with a warning in the log. Installing twice is installing once.

    Raises:
        RuntimeError: sentence-transformers is not as fastpool knows it (versions 3 to 6 are); nothing is replaced then.
    """
    for base, ours in _replacements().items():
        if not hasattr(base.forward, "fastpool_replaces"):
            base.forward = _installed[base] = _class_forward(ours, base)


def uninstall() -> None:
    """Undoes `install`; models that were patched stay patched.

    Raises:
        RuntimeError: somebody else has replaced a forward since `install`, maybe by one that calls fastpool's. Taking
            theirs away would undo what is not ours, so nothing is undone.
    """
    for base, ours in _installed.items():
        if base.forward not in (ours, ours.fastpool_replaces):
            raise RuntimeError(
                f"{_NAME}: somebody else has replaced {base.__name__}.forward since install: {base.forward!r}"
            )
    for base, ours in _installed.items():
        base.forward = ours.fastpool_replaces
    _installed.clear()
