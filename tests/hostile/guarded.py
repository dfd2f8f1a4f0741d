"""Random calls of every op on memory whose ends nobody may touch: reading beyond an argument ends the process, and so
does writing beyond a result. A valid call has the bits of the same call said plainly, forward and backward, by the
reference and by every instruction set; an invalid one is a TypeError or ValueError that names the argument, in the same
words everywhere."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

import fastpool
from fastpool.backends import native
from fastpool.modes import MODES
from fastpool.testing import function_of, gradients, same_bits

from . import wrong
from .calls import Call, draw, numbers
from .place import forbid_rows, place

Outcome = tuple[Tensor, ...] | Exception


def attempt(random: Random, say: Callable[[str], None]) -> bool:
    call = draw(random)
    words = wrong.spoil(call, random) if random.random() < 0.3 else None
    plain, given = call.plain() if words is None else None, _placed(call, random)
    if words is None and random.random() < 0.1:
        words = wrong.free(call, given, random)
    run = _Run(call, random)
    torch.set_num_threads(random.choice((1, 1, 2, 3)))
    try:
        expected = None if plain is None else run.by("reference", plain, as_op=False)
        if words is None and run.validated and not _finite(expected):
            words = "is not finite"
        outcomes = {}
        for backend in _backends():
            said = f"{run}, by {backend}: {_described(given)}"
            say(said)
            if backend == "native" and words is None:
                _forbid_padding(call, given)
            found = outcomes[backend] = run.by(backend, given, run.as_op, run.validated)
            problem = run.refusal(found, words, outcomes["reference"]) if words else _difference(found, expected)
            assert not problem, f"{said}\n{problem}"
    finally:
        torch.set_num_threads(1)
    return words is None


def _backends() -> Iterator[str]:
    """One after the other: the reference, and each instruction set of native."""
    yield "reference"
    assert native.info is not None
    for isa in native.info.isas():
        native.info.use_isa(isa)
        yield "native" if isa == native.info.isas()[0] else f"native, {isa}"


class _Run:
    """How a call is made: by function or op, recording gradients or not, validating or not."""

    def __init__(self, call: Call, random: Random) -> None:
        self.name = call.op
        of_gradient = call.op.startswith("_")  # which may be anything
        self.as_op = not call.by_name_alone and (of_gradient or random.random() < 0.3)
        self.inference = random.random() < 0.2
        self.validated = not of_gradient and random.random() < 0.1
        self.backward = not of_gradient and not self.inference and random.random() < 0.5
        self.seed = random.getrandbits(32)

    def __str__(self) -> str:
        how = (("inference", self.inference), ("validated", self.validated), ("with gradients", self.backward))
        return ", ".join([("op " if self.as_op else "") + self.name, *(name for name, is_so in how if is_so)])

    def by(self, backend: str, given: dict[str, Any], as_op: bool, validated: bool = False) -> Outcome:
        """The result, and the gradients if there are any; or the error."""
        by_op = as_op or self.name.startswith("_")
        function = getattr(torch.ops.fastpool, self.name) if by_op else function_of(self.name)
        fastpool.validate(validated)
        try:
            given = _nested(given)  # which torch cannot make in inference mode
            with fastpool.backend(backend.partition(",")[0]), torch.inference_mode(self.inference):
                result = function(**given)
                if not self.backward:
                    return (result,)
                of_result = numbers(tuple(result.shape), result.dtype, Random(self.seed))
                return result, *gradients(function, given, place(of_result, Random(self.seed)))
        except (TypeError, ValueError, RuntimeError) as error:
            return error
        finally:
            fastpool.validate(False)

    def refusal(self, found: Outcome, words: str, by_reference: Outcome) -> str:
        """What is not as it should be with the outcome of a call that is wrong."""
        if not isinstance(found, Exception):
            return f"answered, and should have said: {words}"
        text, same = (str(one).splitlines()[0] for one in (found, by_reference))
        if self.name in MODES and MODES[self.name].of_logits and not self.as_op:
            text, same = (one.replace("logits", "hidden") for one in (text, same))  # what the function calls them
        if words not in text or not isinstance(found, TypeError | ValueError):
            return f"{found!r} is no TypeError or ValueError that says: {words}"
        if type(found) is not type(by_reference) or text != same:
            return f"{found!r} is not {by_reference!r}"
        return ""


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    given = dict(given)
    if "offsets" in given:
        given["hidden"] = torch.nested.nested_tensor_from_jagged(given["hidden"], given.pop("offsets"))
    return given


def _placed(call: Call, random: Random) -> dict[str, Any]:
    def placed(name: str, value: Any) -> Any:
        dense = name in ("gradient", "result")  # as autograd hands them on; what is not contiguous is a mistake
        if not isinstance(value, Tensor) or value.is_meta or value.dim() > 64 or (dense and not value.is_contiguous()):
            return value
        return place(value, random, contiguous=dense or name == "offsets")

    return {name: placed(name, value) for name, value in call.given.items()}


def _forbid_padding(call: Call, given: dict[str, Any]) -> None:
    """From here on. The reference has read it."""
    if "hidden" in call.real:
        forbid_rows(given["hidden"], call.real["hidden"])


def _finite(outcome: Outcome) -> bool:
    return isinstance(outcome, Exception) or bool(outcome[0].isfinite().all())


def _difference(found: Outcome, expected: Outcome) -> str:
    """What is not as it should be with the outcome of a valid call."""
    if isinstance(found, Exception) or isinstance(expected, Exception):
        return f"refused: {found!r}, said plainly: {expected!r}"
    names = ("the result", "a gradient", "a gradient")
    for name, one, other in zip(names, found, expected, strict=False):
        if not same_bits(one, other):
            return f"{name} has other bits:\n{one}\nsaid plainly:\n{other}"
    return "" if len(found) == len(expected) else "another number of gradients"


def _described(given: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {_looks(value)}" for name, value in given.items() if value is not None)


def _looks(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    looks = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} strides {list(value.stride())}"
    if value.is_meta:
        return looks + " elsewhere"
    if value.untyped_storage().nbytes() < wrong.reach(value) * value.element_size():
        return looks + f" offset {value.storage_offset()} of {value.untyped_storage().nbytes()} bytes"
    return looks + (f" {value.tolist()}" if not value.is_floating_point() and value.numel() <= 20 else "")
