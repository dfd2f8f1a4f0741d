"""Which backend a call takes, and why not another.

Torch's own dispatcher calls the native libraries without coming here, unless a thread has asked for another backend
or, on a GPU, another one is the faster. Every other call comes through `choose`.
"""

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType, TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from . import fork
from .backends import native, reference, triton
from .calls import Call, Result, why_no_memory
from .checks import check_memory
from .finite import check_finite
from .triton_kernels.config import native_below_bytes, slug

T = TypeVar("T")
BACKENDS: dict[str, ModuleType] = {"triton": triton, "native": native, "reference": reference}
_NAMES = ("auto", *BACKENDS)


def _known(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {', '.join(_NAMES)}, got {name!r}")
    return name


# An unknown name is every call's error, not the import's.
_process_requested = os.environ.get("FASTPOOL_BACKEND") or "auto"
_thread = threading.local()

_validate = os.environ.get("FASTPOOL_VALIDATE", "0") not in ("", "0")


_NATIVE_CODES = {"auto": native.AUTOMATIC, "native": native.NATIVE}


def start() -> None:
    """Loads what has to be loaded, once the ops are defined."""
    native.load()
    native.override_process(_NATIVE_CODES.get(_process_requested, native.OTHER))
    native.set_python_first("validation", _validate)
    fork.start()


def _stack() -> tuple[str, ...]:
    """What this thread has asked for, within each other."""
    stack: tuple[str, ...] = getattr(_thread, "requested", ())
    return stack


def _code(stack: tuple[str, ...]) -> int:
    return _NATIVE_CODES.get(stack[-1], native.OTHER) if stack else native.INHERIT


def thread_requested() -> str | None:
    """The backend this thread asks for by itself."""
    stack = _stack()
    return stack[-1] if stack else None


def requested() -> str:
    """The backend this thread asks for, or "auto". Raises ValueError where FASTPOOL_BACKEND names none."""
    return thread_requested() or _known(_process_requested, "FASTPOOL_BACKEND")


class backend:
    """Context manager: in this thread, calls take the named backend (or "auto") and no other.

    >>> with fastpool.backend("reference"):
    ...     fastpool.mean(hidden, mask)

    A call that the backend cannot serve raises RuntimeError and says why. FASTPOOL_BACKEND does the same for a process.
    It holds for the thread, as torch.no_grad does: coroutines that take turns in one thread share it, so do not await
    inside. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str) -> None:
        self.name = _known(name, "fastpool.backend: name")

    def __enter__(self) -> "backend":
        outer = _stack()
        try:
            _thread.requested = (*outer, self.name)
            native.override_thread(_code(_thread.requested))
        except BaseException:  # a signal's handler may raise anywhere, and nobody leaves what was not entered
            _thread.requested = outer
            native.override_thread(_code(outer))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.requested = _stack()[:-1]
        native.override_thread(_code(_thread.requested))


def requesting(requested: str | None, body: Callable[[], T]) -> T:
    """What `body` gives where calls take what `thread_requested` said in another thread. It leaves nothing behind,
    though a signal's handler may raise anywhere, which a `with` of Python's cannot promise for its last step."""
    outer = _stack()
    if requested is None or requested == thread_requested():
        return body()
    inner, back, there = (*outer, requested), _code(outer), _code((requested,))
    try:
        _thread.requested = inner
        native.override_thread(there)
        return body()
    finally:
        _thread.requested = outer
        native.override_thread(back)


def validate(on: bool = True) -> None:
    """Check values on every device, in this process, at the price of reading them and, on GPUs, of waiting for them.

    - Those of starts, ends, cu_seqlens, truncate_dims, integer masks, and float64 weights and scores beside narrower
      states, on GPUs too; CPU calls always check them.
    - A `total` of tokens that is less than there are, on GPUs too.
    - Results: a vector of a pooling mode, of l2_normalize or of tokens that is not finite is a ValueError. It names the
      segment (of l2_normalize: the row), and the first token and column of the input that is not finite, or the weight,
      the score or the query's element; where all of them are, what has overflowed. What is given to
      quantize and is not finite, on any device; and the values of its ranges on GPUs.

    FASTPOOL_VALIDATE=1 does the same from the start.
    """
    global _validate
    _validate = bool(on)
    native.set_python_first("validation", _validate)


def validates() -> bool:
    """Whether values are checked on every device."""
    return _validate


def of_gradient(body: Callable[[], T]) -> T:
    """What `body` gives, whose results may be anything: they are part of a gradient."""
    if not _validate:
        return body()
    outer = getattr(_thread, "of_gradient", False)
    try:
        _thread.of_gradient = True
        return body()
    finally:
        _thread.of_gradient = outer


def check(call: Call) -> None:
    """All that is wrong with a call's arguments, as TypeError or ValueError."""
    if "checked" not in call.known:
        fork.warn()  # before anything uses torch, and here, so that calls of a known kind need not ask
        call.check()
        call.known["checked"] = True
    _check_data(call)


def _check_data(call: Call) -> None:
    for name, tensor in call.tensors():
        check_memory(call.op, name, tensor)
    if _validate or call.tensor.device.type == "cpu":
        call.check_values()


@cache
def _native_below_bytes(device: torch.device) -> int:
    """Token states of fewer bytes are left to `native` rather than to `triton` on such a GPU. The library is told, so
    that such calls do not come here any more."""
    below = native.NEVER if triton.unavailable() else native_below_bytes(slug(torch.cuda.get_device_name(device)))
    native.set_python_from(device.index, below)
    return below


def _fastest_first(tensor: Tensor, favours_cpp: bool = False) -> tuple[str, ...]:
    """`auto` takes the first of these that supports the call. All give the same bits."""
    if tensor.device.type != "cuda":
        return "native", "reference", "triton"
    if native.cuda_unavailable() is None:
        small = tensor.numel() * tensor.element_size() < _native_below_bytes(tensor.device)
        # In float64 Triton's programs take so many registers that few fit a processor.
        if small or favours_cpp or tensor.dtype == torch.float64:
            return "native", "triton", "reference"
    return "triton", "native", "reference"


def choose(call: Call) -> ModuleType:
    """The backend for a checked call, chosen once for calls that look alike. Raises RuntimeError where the one asked
    for cannot serve it."""
    asked = requested()
    chosen: ModuleType | None = call.known.get(asked)
    if chosen is None:
        chosen = call.known[asked] = _choose(call, asked)
    return chosen


def _choose(call: Call, asked: str) -> ModuleType:
    if asked != "auto":
        reason = BACKENDS[asked].supports(call)
        if reason is not None:
            raise RuntimeError(f"{call.op}: backend {asked!r} was asked for and cannot serve this call: {reason}")
        return BACKENDS[asked]
    order = [BACKENDS[name] for name in _fastest_first(call.tensor, call.favours_cpp)]
    chosen = next(module for module in order if module.supports(call) is None)
    if chosen is reference:
        _warn_slow(call)
    return chosen


_warned: set[str] = set()


def _warn_slow(call: Call) -> None:
    device = call.tensor.device.type
    if device in _warned:
        return
    _warned.add(device)
    reasons = "; ".join(f"{name}: {module.supports(call)}" for name, module in BACKENDS.items() if name != "reference")
    warnings.warn(f"fastpool runs its slow reference on {device} tensors ({reasons})", RuntimeWarning, stacklevel=5)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the op, the backend it takes (None: the call fails), and why not each other one."""

    op: str
    asked: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        takes = self.backend or f"nothing: {self.asked} was asked for and cannot serve it"
        lines = [f"{self.op} takes {takes}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain_call(call: Call) -> Explanation:
    """Which backend a call takes, without running it. Raises what the call itself would raise for its arguments."""
    call.check()
    _check_data(call)
    asked = requested()
    reasons: dict[str, str] = {}
    taken: str | None = None
    order = _fastest_first(call.tensor, call.favours_cpp)
    for name in order:
        reason = BACKENDS[name].supports(call)
        if asked not in ("auto", name):
            reason = reason or f"{asked} was asked for"
        elif reason is None and taken is not None:
            reason = f"{taken} comes first"
        if reason is None:
            taken = name
        else:
            reasons[name] = reason
    return Explanation(call.op, asked, taken, reasons)


def run(call: Call) -> Result:
    """Checks a call, runs it on the backend it takes, and where asked validates the result."""
    check(call)
    chosen = choose(call)
    try:
        result: Result = getattr(chosen, call.kernel)(call)
    except RuntimeError as error:
        if (why := why_no_memory(error)) is None:
            raise
        raise torch.OutOfMemoryError(f"{call.op}: not enough memory: {why}") from error
    if _validate and not getattr(_thread, "of_gradient", False):
        check_finite(call, result)
    return result
