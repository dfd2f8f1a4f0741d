"""Gradients: the Autograd key of every op.

What follows a mode's reduction is taken apart where gradients are recorded: `mean(normalize=True)` becomes
`l2_normalize(mean())` on the unrounded result, the same bits, so that the gradient of a normalisation exists once;
`tokens(normalize=True)` likewise.
Backward ops read masks and bounds again and write the gradient of hidden; they save nothing of its size, but hidden
itself where a gradient depends on its values (Mode.gradient_reads_hidden).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, several
from .arguments import POOL_TENSORS, TOKENS, codes, given, named
from .calls import accumulator
from .constants import NORM_EPS
from .modes import MODES, Activation
from .ops import library
from .recording import Function, NoDoubleBackward, at_next_level, below_autograd, record, records, shape_of, widened
from .reference.finish import round_once

_TENSORS = tuple(argument.name for argument in POOL_TENSORS)
_ONCE = next(name for name, mode in MODES.items() if mode.activates_result and mode.activation is Activation.RELU)
_OF_TOKENS = tuple(argument.name for argument in TOKENS if argument.type.startswith("Tensor"))


def _pool(
    mode: str, scale: float, truncate_dim: int | None, out_dtype: torch.dtype | None, *tensors: Tensor | None
) -> Tensor:
    """The op of a mode, without normalisation; `tensors` are those of every mode, in their order."""
    values: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
    values |= {"scale": scale, "truncate_dim": truncate_dim, "out_dtype": out_dtype}
    by_place, by_name = given(mode, {**values, "normalize": False})
    result: Tensor = getattr(torch.ops.fastpool, mode).default(*by_place, **by_name)
    return result


def _shared(gradient: Tensor, query: Tensor) -> Tensor:
    """The gradient of a query from that of each segment's, [B, K, H]: the segments add up as tokens do."""
    if query.dim() < 3:
        gradient = torch.ops.fastpool.sum.default(gradient.flatten(1)[None])
    return round_once(gradient.reshape(query.shape), query.dtype)


class _Pool(Function):
    """A pooling op without normalisation."""

    @staticmethod
    def forward(*args: Any) -> Tensor:  # as _pool's
        return at_next_level(_pool, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mode, ctx.scale, ctx.truncate_dim, _, hidden, *rest = inputs
        ctx.requested = dispatch.thread_requested()
        mode, needed = MODES[ctx.mode], ctx.needs_input_grad[-len(_TENSORS) :]
        ctx.of = [name for name, needs in zip(_TENSORS, needed, strict=True) if needs]
        ctx.reads_hidden = any(mode.gradient_reads_hidden(of) for of in ctx.of)
        # The result itself serves where it was not rounded.
        exact = output.dtype == accumulator(hidden.dtype) or (mode.copies_tokens and output.dtype == hidden.dtype)
        saved = output if ctx.reads_hidden and exact else None
        ctx.save_for_backward(hidden if ctx.reads_hidden else shape_of(hidden), *rest, saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *tensors, result = ctx.saved_tensors
        name, dtype = f"fastpool.{ctx.mode}", accumulator(tensors[0].dtype)
        gradient = widened(name, "gradient", gradient, dtype)

        def backward() -> dict[str, Tensor]:
            exact = result
            if ctx.reads_hidden:
                exact = _pool(ctx.mode, ctx.scale, ctx.truncate_dim, dtype, *tensors) if result is None else result
                exact = widened(name, "result", exact, dtype)
            op = torch.ops.fastpool._pool_backward.default
            found = {of: op(*codes(ctx.mode, of), gradient, *tensors, ctx.scale, exact) for of in ctx.of}
            if "query" in found:
                of_each, query = found["query"], tensors[_TENSORS.index("query")]
                found["query"] = dispatch.of_gradient(lambda: _shared(of_each, query))
            return found

        gradients = dispatch.requesting(ctx.requested, backward)  # autograd may run this in a thread of its own
        return None, None, None, None, *(gradients.get(name) for name in _TENSORS)


_CHUNK = 4096  # columns whose gradients are in the accumulator's dtype together


def _activated(x: Tensor, mode: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """Each element of x [..., D] by a mode's activation: pooled as if it were a text of its own, which has one token,
    by a mode that activates its result."""
    op: Callable[..., Tensor] = getattr(torch.ops.fastpool, mode).default
    return op(x.reshape(x.shape[:-1].numel(), 1, x.shape[-1]), out_dtype=out_dtype).view(x.shape)


def _through_activation(gradient: Tensor, x: Tensor, mode: str) -> Tensor:
    """Before a mode's activation of x: g / (1 + x), over 1 + ln(1 + x) where that is taken twice; 0 from x = 0 down,
    and where g is, for what stands in padding may be NaN."""
    by = 1 + x
    if MODES[mode].activation is Activation.LOG1P_RELU:
        by = by * (1 + _activated(x, _ONCE))
    return torch.where((gradient == 0) | (x <= 0), 0, gradient / by)


def _once(ctx: Any, backward: Callable[..., Tensor], *args: Any) -> Tensor:
    """What a function of torch's operations gives, which has no gradient of its own, on the backend that pooled."""

    def run() -> Tensor:
        if records(*(one for one in args if isinstance(one, Tensor))):
            found: Tensor = record(NoDoubleBackward, backward, f"fastpool.{ctx.mode}", *args)
            return found
        return backward(*args)

    return dispatch.requesting(ctx.requested, lambda: dispatch.of_gradient(run))


class _ActivateResult(Function):
    """What modes of a maximum do to it."""

    @staticmethod
    def forward(x: Tensor, mode: str, out_dtype: torch.dtype) -> Tensor:
        return at_next_level(_activated, x, mode, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.mode, _ = inputs
        ctx.requested = dispatch.thread_requested()
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gradient = widened(f"fastpool.{ctx.mode}", "gradient", gradient, x.dtype)
        of_x = _once(ctx, _through_activation, gradient, x, ctx.mode)
        return of_x, None, None


class _AddActivated(Function):
    """A mode that adds up activated tokens, without normalisation."""

    @staticmethod
    def forward(*args: Any) -> Tensor:  # as _pool's
        return at_next_level(_pool, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mode, _, _, _, *tensors = inputs
        ctx.requested = dispatch.thread_requested()
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, *others = ctx.saved_tensors
        plain, dtype = MODES[ctx.mode].without_activation, accumulator(hidden.dtype)
        gradient = widened(f"fastpool.{ctx.mode}", "gradient", gradient, dtype)

        def backward(gradient: Tensor, hidden: Tensor, *others: Tensor | None) -> Tensor:
            found: Tensor = hidden.new_zeros(hidden.shape)
            op = torch.ops.fastpool._pool_backward.default
            for begin in range(0, gradient.shape[-1], _CHUNK):
                columns = slice(begin, min(begin + _CHUNK, gradient.shape[-1]))
                x = hidden[..., columns].to(dtype)
                own = gradient[:, columns].contiguous()
                reduced = op(*codes(plain, "hidden"), own, shape_of(x), *others, 1.0, None)
                found[..., columns] = round_once(_through_activation(reduced, x, ctx.mode), hidden.dtype)
            return found

        of_hidden = _once(ctx, backward, gradient, hidden, *others)
        return None, None, None, None, of_hidden, *(None for _ in others)


class _Tokens(Function):
    """tokens without normalisation."""

    @staticmethod
    def forward(
        truncate_dim: int | None, out_dtype: torch.dtype | None, total: int | None, *tensors: Tensor | None
    ) -> Any:
        values = dict(zip(_OF_TOKENS, tensors, strict=True))
        options = {"truncate_dim": truncate_dim, "normalize": False, "out_dtype": out_dtype, "total": total}
        by_place, by_name = given("tokens", {**values, **options})
        return at_next_level(torch.ops.fastpool.tokens.default, *by_place, **by_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, _, hidden, *rest = inputs
        ctx.requested = dispatch.thread_requested()
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(shape_of(hidden), *rest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        tensors = ctx.saved_tensors
        gradient = widened("fastpool.tokens", "gradient", gradient, accumulator(tensors[0].dtype))
        op = torch.ops.fastpool._tokens_backward
        return None, None, None, dispatch.requesting(ctx.requested, lambda: op(gradient, *tensors)), *[None] * 4


class _Normalize(Function):
    """l2_normalize."""

    @staticmethod
    def forward(
        x: Tensor, truncate_dim: int | None, truncate_dims: Tensor | None, eps: float, out_dtype: torch.dtype | None
    ) -> Tensor:
        op: Callable[..., Tensor] = torch.ops.fastpool.l2_normalize.default
        return at_next_level(
            op, x, truncate_dim=truncate_dim, truncate_dims=truncate_dims, eps=eps, out_dtype=out_dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, truncate_dims, ctx.eps, _ = inputs
        ctx.requested = dispatch.thread_requested()
        ctx.save_for_backward(x, truncate_dims)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, truncate_dims = ctx.saved_tensors
        gradient = widened("fastpool.l2_normalize", "gradient", gradient, accumulator(x.dtype))
        op = torch.ops.fastpool._l2_normalize_backward
        of_x = dispatch.requesting(ctx.requested, lambda: op(gradient, x, ctx.eps, truncate_dims))
        return of_x, None, None, None, None


def _pool_kernel(mode: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.fastpool, mode).default

    def kernel(*args: Any, **more: Any) -> Tensor:
        if not records(*(argument for argument in args if isinstance(argument, Tensor))):
            with below_autograd():
                return op(*args, **more)
        return recorded(*args, **more)

    def recorded(
        *args: Any, truncate_dim: int | None = None, normalize: bool = False, out_dtype: torch.dtype | None = None,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        tensors = named(mode, args, more)
        hidden = tensors["hidden"]
        unrounded = accumulator(hidden.dtype) if normalize else out_dtype
        scale = tensors.get("scale", 1.0)
        taken = (tensors.get(name) for name in _TENSORS)
        row = MODES[mode]
        if row.activates_result:
            maximum = record(_Pool, row.without_activation, scale, truncate_dim, accumulator(hidden.dtype), *taken)
            pooled: Tensor = record(_ActivateResult, maximum, mode, unrounded or hidden.dtype)
        else:
            kind = _AddActivated if row.activates_tokens else _Pool
            pooled = record(kind, mode, scale, truncate_dim, unrounded, *taken)
        if not normalize:
            return pooled
        normalized: Tensor = torch.ops.fastpool.l2_normalize.default(pooled, out_dtype=out_dtype or hidden.dtype)
        return normalized

    return kernel


def _normalize_kernel(
    x: Tensor,
    *,
    truncate_dim: int | None = None,
    truncate_dims: Tensor | None = None,
    eps: float = NORM_EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if records(x):
        recorded: Tensor = record(_Normalize, x, truncate_dim, truncate_dims, eps, out_dtype)
        return recorded
    op = torch.ops.fastpool.l2_normalize.default
    with below_autograd():
        result: Tensor = op(x, truncate_dim=truncate_dim, truncate_dims=truncate_dims, eps=eps, out_dtype=out_dtype)
    return result


def _tokens_kernel(*args: Any, **more: Any) -> Any:
    op = torch.ops.fastpool.tokens.default
    values = named("tokens", args, more)
    hidden = values["hidden"]
    if not records(hidden):
        with below_autograd():
            return op(*args, **more)
    normalize, out_dtype = values.get("normalize", False), values.get("out_dtype")
    unrounded = accumulator(hidden.dtype) if normalize else out_dtype
    truncate_dim, total = values.get("truncate_dim"), values.get("total")
    tokens, cu_seqlens = record(_Tokens, truncate_dim, unrounded, total, *map(values.get, _OF_TOKENS))
    if normalize:
        tokens = torch.ops.fastpool.l2_normalize.default(tokens, out_dtype=out_dtype or hidden.dtype)
    return tokens, cu_seqlens


def _several_kernel(*args: Any, **more: Any) -> Tensor:
    if records(*(argument for argument in (*args, *more.values()) if isinstance(argument, Tensor))):
        return several.apart(*args, **more)
    with below_autograd():
        result: Tensor = torch.ops.fastpool._pool_several.default(*args, **more)
    return result


def _backward_kernel(name: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.fastpool, name).default

    def kernel(*args: Any) -> Tensor:
        if records(*(argument for argument in args if isinstance(argument, Tensor))):
            said = list(MODES)[args[0]] if isinstance(args[0], int) else name[1:].removesuffix("_backward")
            recorded: Tensor = record(NoDoubleBackward, op, f"fastpool.{said}", *args)
            return recorded
        with below_autograd():
            return op(*args)

    return kernel


for _mode in MODES:
    library.impl(_mode, _pool_kernel(_mode), "Autograd")
library.impl("_pool_several", _several_kernel, "Autograd")
library.impl("l2_normalize", _normalize_kernel, "Autograd")
library.impl("tokens", _tokens_kernel, "Autograd")
for _name in ("_pool_backward", "_l2_normalize_backward", "_tokens_backward"):
    library.impl(_name, _backward_kernel(_name), "Autograd")
