"""The forms of input that are Python's alone: `lengths=` is another name for `ends=`, and a jagged nested tensor is
packed rows with offsets. And errors, which call arguments as the caller did."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch
from .calls import Call, OfSegments
from .checks import check_memory
from .ops import call_of

# What the op's arguments are in a call with a nested hidden, whose own parts they are.
_OF_NESTED = {
    "hidden": "hidden.values()",
    "cu_seqlens": "hidden.offsets()",
    "starts": "hidden.offsets()[:-1]",
    "ends": "hidden.offsets()[:-1] + hidden.lengths()",
}
Names = Mapping[str, str]  # what the caller calls an argument of the op's; those of the same name are missing
OWN: Names = {}


def to_op(
    op: str, hidden: Any, cu_seqlens: Any, starts: Any, ends: Any, lengths: Any, said: str = "hidden"
) -> tuple[Any, Any, Any, Any, Names]:
    """hidden, cu_seqlens, starts, ends as the op takes them, and their names; the caller says `said` for the first.
    Raises TypeError or ValueError."""
    names = OWN
    if lengths is not None:
        if ends is not None:
            raise ValueError(f"{op}: lengths is another name for ends, got both")
        if isinstance(hidden, Tensor) and (hidden.is_nested or hidden.dim() != 3):
            raise ValueError(f"{op}: lengths goes with padded [B, S, H] {said}")
        ends, names = lengths, {"ends": "lengths"}
    if isinstance(hidden, Tensor) and hidden.is_nested:
        if hidden.layout != torch.jagged or hidden.dim() != 3:
            raise TypeError(
                f"{op}: a nested {said} must be jagged (layout=torch.jagged) with shape [B, *, H], "
                f"got layout {hidden.layout} and {hidden.dim()} dimensions"
            )
        if cu_seqlens is not None or starts is not None or ends is not None:
            raise ValueError(f"{op}: a nested {said} says itself where segments start and end, got bounds too")
        if getattr(hidden, "_ragged_idx", 1) != 1:
            raise ValueError(f"{op}: a nested {said} must be ragged in dimension 1, [B, *, H]")
        jagged: Any = hidden  # torch's types do not know its methods
        offsets, held = jagged.offsets(), jagged.lengths()
        hidden, names = hidden.values(), {name: part.replace("hidden", said) for name, part in _OF_NESTED.items()}
        if held is None:
            cu_seqlens = offsets
        else:  # a view with gaps between its sequences
            check_memory(op, f"{said}.offsets()", offsets)
            check_memory(op, f"{said}.lengths()", held)
            starts, ends = offsets[:-1], offsets[:-1] + held
    return hidden, cu_seqlens, starts, ends, names


def raise_in_callers_words(
    error: Exception, names: Names, *calls: tuple[str, tuple[Any, ...], dict[str, Any]]
) -> NoReturn:
    """The error of these ops' calls: it calls arguments by the names that the caller gave them, and where torch's
    parser came first, it says what the op itself would have said. What a signal's handler has raised stays as it is."""
    try:
        refused = bool(names) and type(error) in (TypeError, ValueError)
        parsed = type(error) is RuntimeError and "() Expected a value of type " in str(error)
        if refused or parsed or type(error) is NotImplementedError:  # a nested mask's
            for op, args, more in calls:
                refuse_in_callers_words(call_of(op, *args, **more), names)
        raise error
    finally:
        del error  # or this frame, which it knows, would keep it and all tensors


def refuse_in_callers_words(call: Call, names: Names) -> None:
    """Raises what is wrong with a call, or with its result where that is validated."""
    if isinstance(call, OfSegments):
        call.names = names
    try:
        dispatch.check(call)
        if dispatch.validates():
            with torch.no_grad():
                dispatch.run(call)  # what is wrong with a result is seen once there is one
    except (TypeError, ValueError) as proper:
        raise proper from None
