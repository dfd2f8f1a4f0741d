"""Exceptions leave an op as themselves.

The native library turns to Python where another backend was asked for, and where an argument is not what the op takes.
What is raised there, an interrupt too, has C++ to cross on its way out: it arrives as a RuntimeError of the same text.
The library keeps the exception itself, and the op's object in torch.ops, which all calls from Python go through, raises
it. Callers without that object, such as compiled graphs that call C++, get the RuntimeError.
"""

import re
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from .backends import native

_NO_MEMORY = re.compile(r"fastpool\.\w+: not enough memory: ")  # as csrc/ops.h says it


def _original(error: RuntimeError) -> BaseException:
    """The exception that became this one; this one where it is itself."""
    if type(error) is not RuntimeError:
        return error
    text = str(error)
    kept = native.take_kept(text)
    if kept is not None:
        return kept
    return torch.OutOfMemoryError(text) if _NO_MEMORY.match(text) else error


def _call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    try:
        return self._op(*args, **kwargs)
    except RuntimeError as error:
        try:
            original = _original(error)
        finally:
            native.take_kept("")  # none stays, though a signal may have come in between
    try:
        raise original  # outside of the handler, so that the exception's context stays its own
    finally:
        del original  # or this frame, which it knows, would keep it and all its tensors


class _Overload(OpOverload):
    __call__ = _call


class _Packet(OpOverloadPacket):
    __call__ = _call


def leave_as_themselves(op: str) -> None:
    """For the op of that name in torch.ops.fastpool."""
    packet = getattr(torch.ops.fastpool, op)
    packet.default.__class__, packet.__class__ = _Overload, _Packet
