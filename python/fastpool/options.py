"""Options of functions, modules and PoolingConfig: values of the types that they say, numpy's scalars among them."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch

from .checks import check_float
from .modes import MODES

T = TypeVar("T", bool, int, float)
_WORDS: dict[type, str] = {bool: "a bool", int: "an int", float: "a float"}
# In a graph that is being traced.
_SYMBOLIC: dict[type, type] = {bool: torch.SymBool, int: torch.SymInt, float: torch.SymFloat}
_is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]  # torch's types do not export it

WRONG = (RuntimeError, TypeError, ValueError)  # what calls of ops raise for their arguments


def option(owner: str, name: str, value: Any, kind: type[T]) -> T:
    """The option as ops take it. Raises TypeError, naming it, where it is something else than `kind` or a number that
    is exactly one; ValueError for an int of more than 64 bits, or larger than any float."""
    if kind is int and isinstance(value, torch.Tensor) and _is_tracing():
        return cast(T, value)  # what sizes are while torch.jit.trace records
    plain: Any = value if type(value) is kind else _plain(value)
    # A bool is an int, and nowhere here is one meant for the other.
    if isinstance(plain, bool) is (kind is bool):
        if kind is float and isinstance(plain, int):
            plain = _as_float(owner, name, plain)
        if isinstance(plain, int) and kind is int and not -(2**63) <= plain < 2**63:
            raise ValueError(f"{owner}: {name} must be an int of 64 bits, got one of {plain.bit_length()}")
        if isinstance(plain, kind | _SYMBOLIC[kind]):
            return cast(T, plain)
    raise TypeError(f"{owner}: {name} must be {_WORDS[kind]}, got {type(value).__name__}")


def _plain(value: Any) -> Any:
    """A scalar of numpy's as Python's; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        for theirs, ours in ((numpy.bool_, bool), (numpy.integer, int), (numpy.floating, float)):
            if isinstance(value, theirs):
                return ours(value)
    return value


def _as_float(owner: str, name: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{owner}: {name} must be at most {sys.float_info.max:.4g} in size, got an int of {value.bit_length()} bits"
        ) from None


def refuse(name: str, unknown: dict[str, Any]) -> NoReturn:
    """Raises the TypeError for keyword arguments that a function or module does not have."""
    if "dim" in unknown or "dims" in unknown:
        raise TypeError(
            f"{name} has no dim: nothing here works along an axis of the caller's choice. To keep the first columns, "
            "write truncate_dim (truncate_dims, where each row of l2_normalize keeps its own number); vectors are "
            "always normalised over the last dimension"
        )
    raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(unknown))!r}")


def options_given(
    name: str, starts: Any, ends: Any, truncate_dim: Any, normalize: Any, out_dtype: Any
) -> dict[str, Any]:
    """The keyword arguments that are not their defaults: each one costs torch's parser 0.3 us."""
    more = {}
    if starts is not None:
        more["starts"] = starts
    if ends is not None:
        more["ends"] = ends
    if truncate_dim is not None:
        more["truncate_dim"] = option(name, "truncate_dim", truncate_dim, int)
    if normalize is not False:
        more["normalize"] = option(name, "normalize", normalize, bool)
    if out_dtype is not None:
        if type(out_dtype) is not torch.dtype:  # for which torch's parser takes any number
            check_float(name, "out_dtype", out_dtype)
        more["out_dtype"] = out_dtype
    return more


def mode_names(owner: str, name: str, value: Any, *, without: tuple[str, ...]) -> tuple[str, ...]:
    """Of one mode of token states, or of a sequence of them, that take none of the arguments `without`: the owner's
    calls have no place for those. Raises TypeError, ValueError."""
    names = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
    known = [
        mode for mode, row in MODES.items() if not (row.of_logits or any(row.takes(argument) for argument in without))
    ]
    for one in names:
        if not isinstance(one, str):
            raise TypeError(f"{owner}: {name} must be a mode's name or a sequence of them, got {type(one).__name__}")
        if one not in known:
            raise ValueError(f"{owner}: {name} must be one of {', '.join(known)}, got {one!r}{_elsewhere(one)}")
    if not names:
        raise ValueError(f"{owner}: {name} must name at least one of {', '.join(known)}, got none")
    return names


def _elsewhere(name: str) -> str:
    """Where a mode is to be had that some owner does not take."""
    if name == "splade" or (name in MODES and MODES[name].of_logits):
        return ", which is for logits: fastpool.splade, or fastpool.nn.Splade"
    if name not in MODES:
        return ""
    return f", whose scores go to fastpool.{name}, or fastpool.nn.AttentionPooling learns them"


def check_eps(owner: str, eps: float) -> None:
    """Raises ValueError for what is below 0, and for NaN."""
    if not eps >= 0:
        raise ValueError(f"{owner}: eps must be at least 0, got {eps:g}")


def count(owner: str, name: str, value: Any, least: int = 1) -> int:
    """A number of columns, tokens, queries. Raises TypeError; ValueError below `least`."""
    number = option(owner, name, value, int)
    if number < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {number}")
    return number


def optional_count(owner: str, name: str, value: Any) -> int | None:
    """The same, as truncate_dim; None stays."""
    return None if value is None else count(owner, name, value)
