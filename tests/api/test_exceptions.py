"""Exceptions come out of every op as what was raised, whichever languages they have crossed."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import reference
from fastpool.backends import native

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
RAISED = [KeyboardInterrupt(), SystemExit(3), OwnError("a\ud800b\0c"), SilentError(), MemoryError(), StopIteration(4)]


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
    """TorchScript calls the op without its object: its error stays a RuntimeError, and what was kept is left there."""
    scripted: Any = torch.jit.script(_scripted)
    with pytest.raises(RuntimeError, match="truncate_dim must lie between"):
        scripted(HIDDEN)
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
        OPS.mean("x")
    with pytest.raises(RuntimeError, match="truncate_dim must lie between"):
        scripted(HIDDEN)
    with pytest.raises(ValueError, match="got 11"):
        OPS.mean(HIDDEN, truncate_dim=11)
    assert native.take_kept("") is None


def _scripted(hidden: Tensor) -> Tensor:
    result: Tensor = torch.ops.fastpool.mean(hidden, truncate_dim=9)
    return result


def test_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda x, ends: fastpool.mean(x, ends=ends), fullgraph=True)
    with pytest.raises(ValueError, match=r"ends must lie between 0 and 5, got ends\[1\] = 9"):
        compiled(HIDDEN, torch.tensor([5, 9]))
