"""Where in a model values stop being finite, and how large they get on the way: hooks on all modules, while it runs."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import name_of

FLOAT16_MAXIMUM = torch.finfo(torch.float16).max
FLOAT16_OVERFLOWS = 65520.0  # from here on rounding to float16 gives inf; below it, its maximum
_WIDER = (
    'load the model in bfloat16 or float32: the doctor and sentence-transformers by "dtype" in its config.json '
    '("torch_dtype" in older ones), engines by --dtype'
)


@dataclass(frozen=True)
class Extent:
    """Of the states among a module's inputs, or its outputs."""

    finite: bool  # at real tokens
    largest: float | None  # magnitude of those that are finite; None where none is
    dtype: torch.dtype  # of what is not finite, or is the largest
    padding: torch.dtype | None  # of what is not finite at padding; None where all is


@dataclass(frozen=True)
class Step:
    """A module's run; `taken` and `given` are None where no states are seen among them, but token ids, say."""

    name: str
    module: nn.Module
    run: int  # from 1, for this batch
    taken: Extent | None
    given: Extent | None

    @property
    def began(self) -> bool:
        return self.given is not None and not self.given.finite and (self.taken is None or self.taken.finite)

    @property
    def began_padding(self) -> bool:
        given = self.given is not None and self.given.padding is not None
        return given and (self.taken is None or self.taken.padding is None)

    @property
    def called(self) -> str:
        return _called(self.name, self.module)

    def broken(self) -> str | None:
        """The first of the module's parameters that is not finite, and what mends that; None if all are finite."""
        for name, weight in self.module.named_parameters(prefix=self.name):
            try:
                values = _wide(weight)
                wrong = (~values.isfinite()).nonzero()[:1].tolist()
                value = values[tuple(wrong[0])].item() if wrong else 0.0
            except Exception:  # values that are elsewhere, as on the meta device, or packed: not for torch to tell
                continue
            if wrong:
                overflowed = _narrow(weight.dtype) and math.isinf(value)
                mend = f"if the file's is finite, {_WIDER}" if overflowed else "no other dtype mends that"
                return f"its parameter {name}{wrong[0]} is {value}: {mend}"
        return None


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of a module's inputs and outputs."""

    name: str
    largest: float
    dtype: str

    @property
    def of_float16(self) -> float:
        return self.largest / FLOAT16_MAXIMUM


@dataclass(frozen=True)
class Block:
    """A layer, with all that is within it."""

    name: str
    peak: Peak | None  # None where no states that its modules gave were seen
    not_counted: int  # of its modules


def _called(name: str, module: nn.Module) -> str:
    """A module's name in the model, and its class."""
    return f"{name or 'the model itself'} ({type(module).__name__})"


def _narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).max <= FLOAT16_MAXIMUM


def _advice(dtype: torch.dtype) -> str:
    if _narrow(dtype):
        return _WIDER
    return "another dtype is unlikely to help, for bfloat16 and float32 have the same range"


def _wide(x: Tensor) -> Tensor:
    """One-byte floats as float32, since torch compares and tests few of them."""
    return x.float() if x.is_floating_point() and x.element_size() == 1 else x


def _tensors(value: Any) -> Iterator[Tensor]:
    """In whatever modules take and give: tuples, lists, dicts, transformers' ModelOutput, which is one."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


class _Batch:
    """Where in tensors a batch's tokens are, by its mask [B, S] of real ones, N in all."""

    def __init__(self, real: Tensor) -> None:
        texts, tokens = real.shape
        positions, packed = real.any(0), real.new_ones(int(real.sum()))
        self._real = real
        # Masks of a tensor's first dimensions; the first that fits is taken.
        self._deep = [real, real.T, positions[None], packed[None], packed]
        self._flat = [real.flatten(), packed, *([] if texts == tokens else [positions])]

    def _mask(self, x: Tensor) -> Tensor | None:
        """Of what is at real tokens, where the shape says which that is: [B, S, ...], [S, B, ...], without padding
        [N, ...] or [1, N, ...], for all texts [1, S, ...] or [S, H], or [B * S, H], as experts take them."""
        if x.is_nested or not x.is_floating_point() or x.dim() < 2 or self._scores(x):
            return None
        masks = self._flat if x.dim() == 2 else self._deep
        return next((mask.to(x.device) for mask in masks if x.shape[: mask.dim()] == mask.shape), None)

    def _scores(self, x: Tensor) -> bool:
        """Attention's scores and masks, [..., S, S], which may hold -inf by right; states [B, S, S] may be so wide."""
        texts, tokens = self._real.shape
        return x.shape[-2:] == (tokens, tokens) and not (x.dim() == 3 and len(x) == texts)

    def extent(self, value: Any) -> Extent | None:
        found = [self._extent(x, mask) for x in _tensors(value) if (mask := self._mask(x)) is not None and x.numel()]
        if not found:
            return None
        telling = max(found, key=lambda one: (not one.finite, one.largest or 0.0))
        largest = max((one.largest for one in found if one.largest is not None), default=None)
        padding = next((one.padding for one in found if one.padding is not None), None)
        return Extent(telling.finite, largest, telling.dtype, padding)

    def _extent(self, x: Tensor, mask: Tensor) -> Extent:
        values = _wide(x)
        finite = values.isfinite()
        # With as many texts as tokens, [B, S] and [S, B] look alike: nothing that may be real is to seem smaller.
        maybe = mask | mask.T if mask.dim() == 2 and len(mask) == mask.shape[1] else mask
        counted = values[maybe][finite[maybe]]
        largest = counted.abs().max().item() if counted.numel() else None
        padding = None if finite[~mask].all() else x.dtype
        return Extent(bool(finite[mask].all()), largest, x.dtype, padding)

    def hides_states(self, value: Any) -> bool:
        """Whether states may be in what has no known layout, rather than a vector for each text, scores, statistics."""
        texts, tokens = self._real.shape

        def hides(x: Tensor) -> bool:
            if not x.is_floating_point() or x.is_nested:
                return x.is_nested
            of_texts = len(x.shape) >= 2 and len(x) == texts and (x.dim() == 2 or x.shape[1] == 1)
            scores = self._scores(x) or x.shape[:2] == (tokens, tokens)
            return x.dim() >= 2 and not of_texts and not scores and self._mask(x) is None

        return any(hides(x) for x in _tensors(value))


class Trace:
    """What the modules of a SentenceTransformer's first one took and gave, watched for a batch at a time."""

    def __init__(self, transformer: nn.Module) -> None:
        # Names as in the checkpoint. The wrapper calls its model's forward by itself, past hooks, so it stands for it.
        self._model: nn.Module = getattr(transformer, "auto_model", transformer)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._names[transformer] = ""
        self._peaks: dict[str, Peak] = {}
        self._seen: set[str] = set()  # modules that gave states
        self._unknown: dict[str, nn.Module] = {}  # modules that may have, in no known layout
        self._began: Step | None = None  # in the last batch
        self._began_padding: Step | None = None  # likewise
        self.within: Step | None = None  # in the first batch that had one

    @contextmanager
    def watch(self, features: Mapping[str, Any]) -> Iterator[None]:
        """While the model runs on this batch, whose mask [B, S] says which tokens are real."""
        self._began = self._began_padding = None
        mask = features.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:  # nor will there be states, which is for the caller to say
            yield
            return
        batch = _Batch(mask != 0)
        runs = Counter[nn.Module]()
        taken = defaultdict[nn.Module, list[Extent | None]](list)

        # Before, since a module may write into what it was given. Kinds of tensors that cannot be looked at, and memory
        # that is short for it, are no failure of the model's.
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            try:
                extent = batch.extent((args, kwargs))
            except Exception:
                extent = None
            taken[module].append(extent)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            runs[module] += 1
            try:
                given = batch.extent(output)
                hidden = given is None and batch.hides_states(output)
            except Exception:
                given, hidden = None, True
            name = self._names[module]
            if hidden:
                self._unknown[name] = module
            self._keep(Step(name, module if name else self._model, runs[module], taken[module].pop(), given))

        with ExitStack() as hooks:
            for module in self._names:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _keep(self, step: Step) -> None:
        # A module ends after those within it, so the first is the innermost.
        if step.began and self._began is None:
            self._began = step
            self.within = self.within or step
        if step.began_padding and self._began_padding is None:
            self._began_padding = step
        if step.given is not None:
            self._seen.add(step.name)
        for extent in (step.taken, step.given):
            peak = self._peaks.get(step.name)
            if extent is None or extent.largest is None:
                continue
            if peak is None or extent.largest > peak.largest:
                self._peaks[step.name] = Peak(step.name, extent.largest, name_of(extent.dtype))

    def why(self) -> str:
        """Which module made states of the last batch infinite or NaN, and what to do."""
        return "; ".join(filter(None, [*self._causes(), self.not_counted_told()]))

    def _causes(self) -> Iterator[str | None]:
        step = self._began
        if step is None:
            yield "no module was seen that was given finite states and gave others"
            return
        assert step.given is not None
        again = f", in its run {step.run} for this batch," if step.run > 1 else ""
        took = "" if step.taken is None else f"took states up to {step.taken.largest:.5g} and "
        largest = "nothing finite" if step.given.largest is None else f"up to {step.given.largest:.5g} where finite"
        dtype, maximum = step.given.dtype, torch.finfo(step.given.dtype).max
        yield (
            f"{step.called} was the first{again} whose output is not finite: it {took}gave {largest}, in "
            f"{name_of(dtype)}, whose maximum is {maximum:.5g}"
        )
        broken = step.broken()
        yield broken
        # Attention weighs padding by 0, and 0 times inf or NaN is NaN.
        if step.taken is not None and step.taken.padding is not None:
            source, dtype = self._began_padding, step.taken.padding
            known = "no module was seen to begin" if source is None else f"{source.called} was the first to give"
            yield f"but what it took at padding was not finite already, which {known}"
            padding = None if source is None else source.broken()
            yield padding
            broken = broken or padding
        yield None if broken else _advice(dtype)

    @property
    def not_counted(self) -> list[str]:
        """Names of the modules that gave values in no known layout, in the order in which they first did."""
        return list(self._unknown)

    def not_counted_told(self) -> str | None:
        """How many these are, and one of them; None where there is none."""
        if not self._unknown:
            return None
        count, first = len(self._unknown), _called(*next(iter(self._unknown.items())))
        gives = "module gives" if count == 1 else "modules give"
        return f"{count} {gives} values in a layout that is not known here, as {first}; they are not counted"

    @property
    def largest(self) -> Peak | None:
        """Of all modules in all batches; of equals the one that ran first; None where no states were seen."""
        return max(self._peaks.values(), key=lambda peak: peak.largest, default=None)

    def blocks(self) -> list[Block]:
        """The layers that ran: the members of the outermost lists of modules."""
        lists: list[str] = []
        found = []
        for name, module in self._model.named_modules():
            if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{outer}." for outer in lists)):
                continue
            lists.append(name)
            found += [self._block(f"{name}.{index}") for index in range(len(module))]
        return [block for block in found if block.peak is not None or block.not_counted]

    def _block(self, block: str) -> Block:
        def within(name: str) -> bool:
            return f"{name}.".startswith(f"{block}.")

        # What its modules took says nothing of what they made of it.
        peaks = [peak for name, peak in self._peaks.items() if within(name)] if any(map(within, self._seen)) else []
        top = max(peaks, key=lambda peak: peak.largest, default=None)
        return Block(block, top, sum(map(within, self._unknown)))
