"""Exceptions come out of every op as what was raised, whichever languages they have crossed."""

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import checks, errors, known, reference
from fastpool.backends import native
from fastpool.testing import cpu_backends

OPS = torch.ops.fastpool
HIDDEN = torch.randn(2, 5, 8)


class OwnError(Exception):
    """What a signal's handler may raise."""


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": fastpool.mean,
    "packet": lambda x: OPS.mean(x),
    "overload": lambda x: OPS.mean.default(x),
    "normalize": fastpool.l2_normalize,
    "normalize packet": lambda x: OPS.l2_normalize(x),
    "backward": lambda x: torch.autograd.grad(fastpool.mean(x.detach().requires_grad_()).sum(), x)[0],
}


class SilentRuntimeError(SilentError, RuntimeError):
    pass


class SilentValueError(SilentError, ValueError):
    pass


RAISED = [
    KeyboardInterrupt(),
    SystemExit(3),
    OwnError("a\ud800b\0c"),
    SilentError(),
    SilentRuntimeError(),
    SilentValueError(),
    MemoryError(),
    StopIteration(4),
    RuntimeError("fastpool: not enough memory"),
    torch.OutOfMemoryError("a handler's own"),
]


@pytest.fixture(params=RAISED, ids=lambda error: type(error).__name__)
def raised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseException]:
    """Raised by a signal's handler in the middle of every forward call of the reference."""
    error: BaseException = request.param

    def handler(*_: Any) -> None:
        raise error

    def interrupted(call: object) -> Tensor:
        signal.raise_signal(signal.SIGUSR1)
        raise AssertionError("the handler has not run")

    for kernel in ("pool", "l2_normalize"):
        monkeypatch.setattr(reference, kernel, interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    yield error
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("route", ["function", "packet", "overload", "normalize", "normalize packet"])
@pytest.mark.parametrize("state", ["plain", "recorded", "inference", "validated"])
def test_forward(raised: BaseException, route: str, state: str) -> None:
    x = HIDDEN.clone().requires_grad_(state == "recorded")
    fastpool.validate(state == "validated")
    try:
        with fastpool.backend("reference"), torch.inference_mode(state == "inference"):
            with pytest.raises(type(raised)) as caught:
                ROUTES[route](x)
            assert caught.value is raised
            assert raised.__cause__ is None
            assert raised.__context__ is None
    finally:
        fastpool.validate(False)
    assert fastpool.mean(HIDDEN).shape == (2, 8)  # nothing stays


def test_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes errors of its own from what is raised in a kernel."""
    from triton.runtime import interpreter

    error = OwnError("in a kernel")

    def interrupted(*_: int) -> None:
        raise error

    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", interrupted)
    for call in (fastpool.mean, fastpool.l2_normalize, OPS.mean):
        with fastpool.backend("triton"), pytest.raises(OwnError) as caught:
            call(HIDDEN)
        assert caught.value is error


def test_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(call: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "pool_backward", interrupted)
    for op in (fastpool.mean, OPS.mean, OPS.max.default):
        hidden = HIDDEN.clone().requires_grad_()
        with fastpool.backend("reference"):
            result = op(hidden)
        with pytest.raises(KeyboardInterrupt):
            result.sum().backward()


def test_a_cause_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(call: object) -> Tensor:
        raise OwnError("a") from KeyError("b")

    monkeypatch.setattr(reference, "pool", failing)
    with fastpool.backend("reference"), pytest.raises(OwnError) as caught:
        OPS.mean(HIDDEN)
    assert repr(caught.value.__cause__) == "KeyError('b')"
    assert [one.name for one in caught.traceback][-1] == "failing"


def test_what_was_swallowed_is_not_raised_later() -> None:
    """Without autograd TorchScript calls the op without its object: its error stays a RuntimeError, and what was kept
    for the object is left."""
    scripted: Any = torch.inference_mode()(torch.jit.script(_scripted))
    with pytest.raises(RuntimeError, match="truncate_dim must lie between"):
        scripted(HIDDEN)
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
        OPS.mean("x")
    with pytest.raises(RuntimeError, match="truncate_dim must lie between"):
        scripted(HIDDEN)
    with pytest.raises(ValueError, match="got 11"):
        OPS.mean(HIDDEN, truncate_dim=11)


def test_an_interrupt_on_the_way_out_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept is forgotten, though nobody came to ask for it."""

    def interrupted(error: RuntimeError) -> BaseException:
        raise KeyboardInterrupt

    monkeypatch.setattr(errors, "_original", interrupted)
    with pytest.raises(KeyboardInterrupt):
        OPS.mean(HIDDEN, truncate_dim=9)
    assert native.take_kept("fastpool.mean: truncate_dim must lie between 1 and the last dimension, 8, got 9") is None


def test_the_end_of_an_older_exception_may_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class CallingError(Exception):
        def __del__(self) -> None:
            with suppress(ValueError):
                OPS.mean(HIDDEN, truncate_dim=10)

    def failing(call: object) -> Tensor:
        raise CallingError

    monkeypatch.setattr(reference, "pool", failing)
    scripted: Any = torch.inference_mode()(torch.jit.script(_plain))
    with fastpool.backend("reference"):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="CallingError"):
                scripted(HIDDEN)  # which leaves it
            with pytest.raises(CallingError):
                OPS.mean(HIDDEN)


def _plain(hidden: Tensor) -> Tensor:
    result: Tensor = torch.ops.fastpool.mean(hidden)
    return result


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "function": lambda x: fastpool.mean(x, torch.ones(2, 5)),
    "lengths": lambda x: fastpool.mean(x, lengths=torch.tensor([5, 9])),
    "packet": lambda x: OPS.mean(x, torch.ones(2, 5)),
    "parser": lambda x: fastpool.mean(x, "mask"),  # type: ignore[arg-type]  # on purpose
    "recorded": lambda x: fastpool.mean(x.requires_grad_(), torch.ones(2, 5)),
    "normalize": lambda x: fastpool.l2_normalize(x, truncate_dim=9),
    "memory": lambda x: fastpool.mean(x[:1, :1, :1].expand(2**40, 1, 2**10)),
}


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_nothing_is_held_once_an_exception_is_gone(call: Callable[[Tensor], object], backend: str) -> None:
    """Without a collection of cycles: who catches OutOfMemoryError needs the memory now."""
    hidden = HIDDEN.clone()
    held = weakref.ref(hidden)
    gc.disable()
    try:
        with fastpool.backend(backend), suppress(TypeError, ValueError, RuntimeError):
            call(hidden)
            raise AssertionError("it was not refused")
        del hidden
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError("deadline"), TypeError("deadline"), NotImplementedError("deadline")])
def test_nothing_of_a_handlers_is_taken_for_torchs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own errors say that a tensor does not tell something."""

    class Interrupted(Tensor):
        pass

    def handler(*_: Any) -> None:
        raise error

    def stride(tensor: Tensor) -> tuple[int, ...]:
        signal.raise_signal(signal.SIGUSR1)
        return ()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(checks, "PLAIN", (Interrupted,))
        monkeypatch.setattr(known, "PLAIN", (Interrupted,))
        for name in ("stride", "untyped_storage"):
            monkeypatch.setattr(Interrupted, name, stride, raising=False)
            with pytest.raises(type(error)) as caught:
                known.known((), (HIDDEN.as_subclass(Interrupted),)) and checks.lacks_memory(
                    HIDDEN.as_subclass(Interrupted)
                )
            assert caught.value is error
    finally:
        signal.signal(signal.SIGUSR1, before)


def _scripted(hidden: Tensor) -> Tensor:
    result: Tensor = torch.ops.fastpool.mean(hidden, truncate_dim=9)
    return result


def test_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda x, ends: fastpool.mean(x, ends=ends), fullgraph=True)
    with pytest.raises(ValueError, match=r"ends must lie between 0 and 5, got ends\[1\] = 9"):
        compiled(HIDDEN, torch.tensor([5, 9]))
