"""Triton kernels for CUDA and ROCm tensors; with TRITON_INTERPRET=1 for CPU tensors, by Triton's interpreter."""

import importlib.util
import os
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from ..calls import (
    Call,
    NormalizeBackwardCall,
    NormalizeCall,
    PoolBackwardCall,
    PoolCall,
    QuantizeCall,
    TokensBackwardCall,
    TokensCall,
)

_FOUND = importlib.util.find_spec("triton") is not None
# Triton reads it as kernels are defined, so it must be set before they are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

MOST_ROWS = 2**31 - 1  # of a sequence, or of packed input: kernels count them in 32 bits


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return None if _FOUND else "triton is not installed"


def supports(call: Call) -> str | None:
    """None where this backend can serve the call, else why not."""
    if not _FOUND:
        return unavailable()
    if isinstance(call, TokensCall | TokensBackwardCall):
        return "there is no Triton kernel of tokens"
    kind = call.tensor.device.type
    if INTERPRETED and kind != "cpu":
        return f"TRITON_INTERPRET=1 runs Triton kernels on CPU tensors, not {kind}"
    if not INTERPRETED and kind != "cuda":
        return f"Triton kernels are for CUDA and ROCm tensors, not {kind}"
    pool = call.pool if isinstance(call, PoolBackwardCall) else call
    if isinstance(pool, PoolCall) and pool.rows > MOST_ROWS:
        return f"Triton kernels take at most {MOST_ROWS} rows of a sequence, got {pool.rows}"
    return _why_not()


@cache
def _why_not() -> str | None:
    """What stops the kernels from being imported, which takes a while: asked only where a call could take them."""
    try:
        _kernels()
    except Exception as error:  # a Triton that is half installed may raise anything
        return f"the Triton kernels do not load: {type(error).__name__}: {error}"
    return None


@cache
def _kernels() -> ModuleType:
    from ..triton_kernels import run

    module: ModuleType = run
    return module


_READ = {  # what kernels read by rows, or what holds it
    PoolCall: ("hidden", "query"),
    PoolBackwardCall: ("pool",),
    NormalizeCall: ("x",),
    NormalizeBackwardCall: ("normalize",),
    QuantizeCall: ("x", "ranges"),
}


def _copied(value: Any) -> Any:
    """A call on copies of tensors that kernels cannot read: whose columns are not contiguous."""
    if isinstance(value, Tensor):
        return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()
    read = {name: getattr(value, name) for name in _READ.get(type(value), ())}
    copies = {name: _copied(one) for name, one in read.items()}
    return replace(value, **copies) if any(copies[name] is not read[name] for name in read) else value


def _run(call: Call) -> Tensor:
    """Runs a checked call."""
    try:
        result: Tensor = getattr(_kernels(), call.kernel)(_copied(call))
        return result
    except Exception as error:
        original = _raised_inside(error)
    try:
        raise original
    finally:
        del original  # or this frame, which it knows, would keep it and all its tensors


def _raised_inside(error: BaseException) -> BaseException:
    """What was raised where Triton's interpreter, function by function, has made an error of its own from it."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


pool = pool_backward = l2_normalize = l2_normalize_backward = quantize = _run
