"""What was found out of calls that look alike: checks, the choice of a backend and plans read shapes, strides, dtypes,
devices and alignment of their arguments, never values, so that they are made once for all of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .checks import PLAIN, raised_in_python

Known = dict[str, Any]

_LIMIT = 4096  # kinds of calls; then a new generation begins, and what was not asked for since the last is forgotten
_young: dict[tuple[object, ...], Known] = {}
_old: dict[tuple[object, ...], Known] = {}


def known(values: tuple[object, ...], tensors: tuple[Tensor | None, ...]) -> Known:
    """What is kept for calls of these values and such tensors; empty at first, and for the caller to fill. Nothing is
    kept where something does not say what it looks like: no plain tensor, or one that is not strided."""
    looks: list[object] = [*values]
    try:
        for tensor in tensors:
            if tensor is None:
                looks.append(None)
            elif type(tensor) in PLAIN:
                # One that is not strided has no memory to point at, or no shape.
                looks += (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
            else:
                return {}
        key = tuple(looks)
        found = _young.get(key)
    except (RuntimeError, TypeError) as error:  # no memory, no strides, no hash
        if raised_in_python(error):
            raise
        return {}
    return _remembered(key) if found is None else found


class looked_up:
    """A method as an attribute, looked up once: functools.cached_property without the lock that it takes before Python
    3.12, which costs as much as the look-up of a tensor."""

    def __init__(self, look_up: Callable[[Any], Known]) -> None:
        self._look_up = look_up
        self.__doc__ = look_up.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, call: Any, owner: type | None = None) -> Known:
        found = call.__dict__[self._name] = self._look_up(call)
        return found


def _remembered(key: tuple[object, ...]) -> Known:
    global _young, _old
    found = _old.get(key)
    if len(_young) >= _LIMIT:
        _old, _young = _young, {}
    return _young.setdefault(key, {} if found is None else found)


def forget() -> None:
    """Forgets all kinds of calls, for a tuner or a test that has changed what plans depend on."""
    _young.clear()
    _old.clear()
