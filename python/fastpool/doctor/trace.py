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
_WIDER = (
    'load the model in bfloat16 or float32: the doctor and sentence-transformers by "dtype" in its config.json '
    '("torch_dtype" in older ones), engines by --dtype'
)


@dataclass(frozen=True)
class Extent:
    """Of the states among a module's inputs, or its outputs, at real tokens."""

    finite: bool
    largest: float | None  # magnitude of those that are finite; None where none is
    dtype: torch.dtype  # of what is not finite, or is the largest


@dataclass(frozen=True)
class Step:
    """A module's run; `taken` and `given` are None where no states are among them, but token ids, say."""

    name: str
    module: nn.Module
    run: int  # from 1, for this batch
    taken: Extent | None
    given: Extent | None

    @property
    def began(self) -> bool:
        return self.given is not None and not self.given.finite and (self.taken is None or self.taken.finite)


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of a module's inputs and outputs."""

    name: str
    largest: float
    dtype: str

    @property
    def of_float16(self) -> float:
        return self.largest / FLOAT16_MAXIMUM


def _tensors(value: Any) -> Iterator[Tensor]:
    """In whatever modules take and give: tuples, lists, dicts, transformers' ModelOutput, which is one."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


def _at_tokens(x: Tensor, real: Tensor) -> Tensor | None:
    """The values at real tokens, where the shape says which these are: [B, S, ...], [1, S, ...] for all texts, or
    [B * S, H], as experts take them. Attention's scores and masks, [..., S, S], may hold -inf by right."""
    texts, tokens = real.shape
    if not x.is_floating_point() or (x.dim() > 3 and x.shape[-2:] == (tokens, tokens)):
        return None
    if x.dim() == 2 and len(x) == texts * tokens:
        return x[real.flatten()]
    if x.dim() >= 3 and x.shape[:2] == (texts, tokens):
        return x[real]
    if x.dim() >= 3 and x.shape[:2] == (1, tokens):
        return x[0, real.any(0)]
    return None


def _extent(value: Any, real: Tensor) -> Extent | None:
    found = []
    for x in _tensors(value):
        states = _at_tokens(x, real)
        if states is not None and states.numel():
            finite = states.isfinite()
            largest = states.abs().where(finite, 0.0).max().item() if finite.any() else None
            found.append(Extent(bool(finite.all()), largest, x.dtype))
    if not found:
        return None
    telling = max(found, key=lambda one: (not one.finite, one.largest or 0.0))
    largest = max((one.largest for one in found if one.largest is not None), default=None)
    return Extent(telling.finite, largest, telling.dtype)


class Trace:
    """What the modules of a SentenceTransformer's first one took and gave, watched for a batch at a time."""

    def __init__(self, transformer: nn.Module) -> None:
        # Names as in the checkpoint. The wrapper calls its model's forward by itself, past hooks, so it stands for it.
        self._model: nn.Module = getattr(transformer, "auto_model", transformer)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._names[transformer] = ""
        self._peaks: dict[str, Peak] = {}
        self._began: Step | None = None  # in the last batch
        self.within: Step | None = None  # in the first batch that had one

    @contextmanager
    def watch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """While the model runs on this batch, whose mask [B, S] says which tokens are real."""
        self._began = None
        if "attention_mask" not in batch:  # nor will there be states, which is for the caller to say
            yield
            return
        real = batch["attention_mask"] != 0
        runs = Counter[nn.Module]()
        taken = defaultdict[nn.Module, list[Extent | None]](list)

        # Before, since a module may write into what it was given.
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            taken[module].append(_extent((args, kwargs), real))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            runs[module] += 1
            step = Step(self._names[module], module, runs[module], taken[module].pop(), _extent(output, real))
            self._keep(step)

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
        for extent in (step.taken, step.given):
            peak = self._peaks.get(step.name)
            if extent is None or extent.largest is None:
                continue
            if peak is None or extent.largest > peak.largest:
                self._peaks[step.name] = Peak(step.name, extent.largest, name_of(extent.dtype))

    def why(self) -> str:
        """Which module made states of the last batch infinite or NaN, and what to do."""
        step = self._began
        if step is None:
            return "no module was seen that was given finite states and gave others"
        assert step.given is not None
        again = f", in its run {step.run} for this batch," if step.run > 1 else ""
        took = "" if step.taken is None else f"took states up to {step.taken.largest:.5g} and "
        largest = "nothing finite" if step.given.largest is None else f"up to {step.given.largest:.5g} where finite"
        dtype, maximum = step.given.dtype, torch.finfo(step.given.dtype).max
        first = (
            f"{called(step)} was the first{again} whose output is not finite: it {took}gave {largest}, in "
            f"{name_of(dtype)}, whose maximum is {maximum:.5g}"
        )
        for name, weight in step.module.named_parameters(prefix=step.name):
            wrong = (~weight.isfinite()).nonzero()[:1].tolist()
            if wrong:
                value = weight[tuple(wrong[0])].item()
                overflowed = weight.dtype == torch.float16 and math.isinf(value)
                mend = f"if the file's is finite, {_WIDER}" if overflowed else "no other dtype mends that"
                return f"{first}; its parameter {name}{wrong[0]} is {value}: {mend}"
        if dtype == torch.float16:
            return f"{first}; {_WIDER}"
        return f"{first}; another dtype is unlikely to help, for bfloat16 and float32 have the same range"

    @property
    def largest(self) -> Peak:
        """Of all modules in all batches; of equals the one that ran first."""
        return max(self._peaks.values(), key=lambda peak: peak.largest)

    def blocks(self) -> list[Peak]:
        """Of each layer: the members of the outermost lists of modules, with all that is within them."""
        lists: list[str] = []
        found = []
        for name, module in self._model.named_modules():
            if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{outer}." for outer in lists)):
                continue
            lists.append(name)
            for index in range(len(module)):
                block = f"{name}.{index}"
                peaks = [peak for at, peak in self._peaks.items() if f"{at}.".startswith(f"{block}.")]
                if peaks:
                    top = max(peaks, key=lambda peak: peak.largest)
                    found.append(Peak(block, top.largest, top.dtype))
        return found


def called(step: Step) -> str:
    """A module's name in the model, and its class."""
    return f"{step.name or 'the model itself'} ({type(step.module).__name__})"
