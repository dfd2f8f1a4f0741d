"""How a call is recorded for its gradient: what autograd.py is made of, and all of torch's private names for it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .checks import check_memory

R = TypeVar("R")

below_autograd = torch._C._AutoDispatchBelowAutograd  # while it lives, calls in this thread skip autograd.py
# Every call comes past these: looking them up costs as much as they do.
_is_grad_enabled, _is_inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled
_is_compiling, _is_transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active


def records(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors has to be recorded. Raises NotImplementedError for forward-mode gradients."""
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    "fastpool: forward-mode gradients (torch.func.jvp, forward_ad) are not implemented; reverse mode is"
                )
    if _is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def skips_autograd(hidden: Any, *others: Any) -> bool:
    """Whether a call had better go `below_autograd`: nothing is to be recorded there, and its kernels cost
    2.5 us to say so (the guard costs 0.5). Not in inference mode, whose tensors skip them by themselves."""
    for other in others:
        if other is not None and getattr(other, "requires_grad", True):
            return False
    return not (
        _is_compiling()  # first: a compiler cannot read the rest
        or _is_inference_mode()
        or getattr(hidden, "requires_grad", True)
        or _is_transforming()  # a wrapper of torch.func's does not tell what it wraps
        or forward_ad._current_level >= 0
    )


def shape_of(tensor: Tensor) -> Tensor:
    """Shape and dtype of a tensor in the memory of one row."""
    return tensor.new_empty(tensor.shape[-1:]).expand(tensor.shape)


def widened(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient, or a result, as backward ops take it."""
    check_memory(op, name, tensor)
    return tensor.to(dtype).contiguous()


def at_next_level(op: Callable[..., R], *args: Any, **more: Any) -> R:
    """Calls it below this level's autograd. A torch.func transform may have another level there, whose gradients are to
    be recorded although this one's must not be. (No generator of contextlib's: one that a signal interrupts as it is
    entered keeps its guards for as long as somebody keeps the exception.)"""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below_autograd():
        return op(*args, **more)


class Function(_SingleLevelFunction):
    """Compiled autograd asks for a key that torch gives to torch.autograd.Function alone."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[int]:
        return (ctx._autograd_function_id,)


class NoDoubleBackward(Function):
    """A backward op whose own gradient is an error, when it is asked for."""

    @staticmethod
    def forward(op: Callable[..., Tensor], name: str, *args: Any) -> Tensor:
        return at_next_level(op, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name}: gradients of gradients are not implemented")


def record(function: type[Function], *args: Any) -> Any:
    """Applies a function for the level of torch.func's transforms that autograd is at, if there are any: this is a
    kernel of the Autograd key, where each level comes by itself."""
    allowed = _functorch.get_single_level_autograd_function_allowed()
    try:  # as torch's own context manager, which is an error by itself where a signal interrupts its first line
        _functorch.set_single_level_autograd_function_allowed(True)
        result = function.apply(*args)  # type: ignore[attr-defined]  # torch's types lack it
    finally:
        _functorch.set_single_level_autograd_function_allowed(allowed)
    return result
