"""Calls interrupted by a signal whose handler raises: what comes out is that exception, from whatever call, and nothing
is left behind in the thread. An interrupted call counts as refused, one that was over before as answered.

The clock decides where in a call the signal comes: the same input again is the same call, after the same time."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

import fastpool
from fastpool import dispatch
from fastpool.modes import MODES
from fastpool.testing import function_of, gradients, required, same_bits


class DeadlineError(Exception):
    """A program's own."""


class Halt(BaseException):
    """One that is to get past every `except Exception`."""


class LateError(RuntimeError):
    """One of a kind that libraries raise and catch themselves."""


class NoTimeError(ValueError):
    """Another one."""


EXCEPTIONS = (
    KeyboardInterrupt, SystemExit, DeadlineError, Halt, LateError, NoTimeError, RuntimeError, TypeError, ValueError,
    torch.OutOfMemoryError,
)  # fmt: skip
BACKENDS = (None, "auto", "native", "reference")
SIZES = ((2, 5, 8), (2, 5, 8), (3, 70, 33))
ROUTES = ("function", "op", "inference", "gradients", "gradients by op")

Route = tuple[str, str, str | None, bool, tuple[int, int, int]]


def attempt(random: Random, say: Callable[[str], None]) -> bool:
    op, how = random.choice((*MODES, "l2_normalize")), random.choice(ROUTES)
    while op in MODES and MODES[op].of_logits and how.startswith("gradients"):
        # Ops within ops: what interrupts them may come out as the RuntimeError that C++ makes of it. Not mended yet.
        how = random.choice(ROUTES)
    backend, validated = random.choice(BACKENDS), random.random() < 0.3
    route = (op, how, backend, validated, random.choice(SIZES))
    call, expected, duration = _prepared(route)
    kind, share = random.choice(EXCEPTIONS), random.uniform(0.0, 1.3)
    said = f"{kind.__name__} after {share:.2f} of {duration * 1e6:.0f} us of {route}"
    say(said)
    fastpool.validate(validated)
    # Context managers in Python, torch's own among them, are left as they are where a signal interrupts their first or
    # last step: here it does not.
    with _surroundings(how, backend):
        result, came, raised = _interrupted(call, kind, duration * share)
    try:
        assert came is raised, f"{said}: raised {raised!r}, and what came out is {came!r}"
        if came is None:
            assert _same(result, expected), f"{said}: other bits"
        left = _left_behind()  # while the exception, its traceback and what that holds are there
        assert not left, f"{said}: left behind: {left}"
        assert dispatch.validates() == validated
        with _surroundings(how, backend):
            assert _same(call(), expected), f"{said}: other bits in the next call"
    finally:
        fastpool.validate(False)
    return came is None


@contextmanager
def _surroundings(how: str, backend: str | None) -> Iterator[None]:
    with nullcontext() if backend is None else fastpool.backend(backend), torch.inference_mode(how == "inference"):
        yield


@cache
def _prepared(route: Route) -> tuple[Callable[[], Any], Any, float]:
    """The call, what it gives, and how many seconds it takes."""
    op, how, backend, validated, shape = route
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    arguments = {"x" if op == "l2_normalize" else "hidden": hidden}
    if op != "l2_normalize":
        arguments["mask"] = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3
        arguments |= required(op, shape)
    function = getattr(torch.ops.fastpool, op) if how.endswith("op") else function_of(op)
    gradient = torch.ones(shape if op == "l2_normalize" else (shape[0], shape[2]))

    def call() -> Any:
        if how.startswith("gradients"):
            return gradients(function, arguments, gradient)
        return function(**arguments)

    fastpool.validate(validated)
    times = []
    with _surroundings(how, backend):
        expected = call()
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return call, expected, min(times)


def _interrupted(call: Callable[[], Any], kind: type[BaseException], delay: float) -> tuple[Any, Any, Any]:
    """The call's result, what came out instead, and what the handler raised: nothing where the call was over before, or
    where it was raised in a finaliser, whose exceptions Python itself drops."""
    raised: list[BaseException] = []
    lost: list[BaseException | None] = []
    over = False
    result = came = None

    def handle(number: int, frame: Any) -> None:
        raised.append(kind("interrupted"))
        if not over:
            raise raised[0]

    sys.unraisablehook = lambda unraisable: lost.append(unraisable.exc_value)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        result = call()
        over = True
    except BaseException as error:
        over = True
        came = error
    while not raised:
        time.sleep(1e-5)
    signal.signal(signal.SIGALRM, before)
    sys.unraisablehook = sys.__unraisablehook__
    return result, came, None if result is not None or lost else raised[0]


def _left_behind() -> str:
    """What is not in this thread as it was before any call."""
    found = []
    if dispatch.thread_requested() is not None:
        found.append(f"the requested backend {dispatch.thread_requested()}")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        found.append("a mode of gradients")
    hidden = torch.zeros(1, 2, 3, requires_grad=True)
    if not fastpool.mean(hidden).requires_grad:
        found.append("a guard that leaves autograd out")
    seen = _seen_by_python(lambda: fastpool.mean(hidden.detach()))
    if seen != dispatch.validates():
        found.append("a native call takes the way by Python" if seen else "validation does not see a call")
    with fastpool.backend("reference"):
        if not _seen_by_python(lambda: fastpool.mean(hidden.detach())):
            found.append("native serves what another backend was asked for")
    return ", ".join(found)


def _seen_by_python(call: Callable[[], Any]) -> bool:
    """Whether Python's dispatch sees the call."""
    calls: list[Any] = []
    run = dispatch.run
    dispatch.run = lambda described: calls.append(described) or run(described)
    try:
        call()
    finally:
        dispatch.run = run
    return bool(calls)


def _same(result: Any, expected: Any) -> bool:
    results, others = ((one,) if isinstance(one, Tensor) else one for one in (result, expected))
    return all(same_bits(one, other) for one, other in zip(results, others, strict=True))
