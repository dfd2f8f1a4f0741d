"""Of each mode: its function, what it is given, and what comes out, by the formula alone."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastpool

from ..arguments import GRADIENTS_OF, POOL_BACKWARD, codes
from ..arguments import given as in_order
from ..modes import MODES, Divisor, Reduce
from .inputs import Sequence


def function_of(mode: str) -> Callable[..., Tensor]:
    """What people call for it, with `hidden` and all that every pooling function takes; or l2_normalize."""
    row = MODES.get(mode)
    if row is None or not row.of_logits:
        found: Callable[..., Tensor] = getattr(fastpool, mode)
        return found
    splade = partial(fastpool.splade, pooling=row.reduce.name.lower(), activation=row.activation.name.lower())
    return lambda hidden, *args, **more: splade(hidden, *args, **more)


def variants() -> list[tuple[str, str | None]]:
    """Every (mode, given) there is: with an argument of its own, and without where it can do without."""
    return [
        (name, given)
        for name, mode in MODES.items()
        for given in (
            *((None,) if not mode.softmax else ()),
            *(one.name for one in mode.arguments if one.differentiable),
        )
    ]


def variants_of_states() -> list[tuple[str, str | None]]:
    """Those of token states, whose gradients are the backends' own: gradients of logits go through them."""
    return [(name, given) for name, given in variants() if not MODES[name].of_logits]


def own_arguments(given: str | None, weights: Tensor, width: int) -> dict[str, Tensor]:
    """What a mode gets by itself: these weights, scores between -8 and 8 that are exact, or a query, so wide."""
    if given == "weights":
        return {"weights": weights}
    if given == "scores":
        return {"scores": (weights - 0.625) * 16}
    if given == "query":
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(width))
        return {"query": drawn * (4 / max(width, 1) ** 0.5)}
    return {}


def required(mode: str, shape: Iterable[int]) -> dict[str, Tensor]:
    """What a mode cannot do without beside hidden of that shape: scores, of a token's place in its row, or a query."""
    *leading, width = shape
    own = next(given for name, given in variants() if name == mode)
    return own_arguments(own, (torch.arange(leading[-1]) % 9 / 8).expand(leading), width)


def _weights(sequence: Sequence, given: str | None) -> Tensor:
    """Of every token, in float64. [n]"""
    own = {
        name: value.double()
        for name, value in own_arguments(given, sequence.weights, sequence.states.shape[-1]).items()
    }
    if "query" in own:
        own["scores"] = sequence.states.double() @ own["query"]
    if "scores" in own:
        scores = own["scores"].masked_fill(~sequence.real, float("-inf"))
        return torch.exp(scores - scores[sequence.real].amax()) if sequence.real.any() else scores
    return own.get("weights", torch.arange(1, len(sequence.states) + 1, dtype=torch.float64))


def exact(
    mode: str, sequence: Sequence, given: str | None, truncate_dim: int | None = None, normalize: bool = False
) -> Tensor:
    """The formula itself, in float64. [truncate_dim or H]"""
    x = sequence.states.double()[sequence.real]
    row = MODES[mode]
    w = _weights(sequence, given)[sequence.real, None]
    x, w = x[row.select.among], w[row.select.among]
    if len(x) == 0:
        result = torch.zeros(sequence.states.shape[-1], dtype=torch.float64)
    else:
        for _ in range(row.activation):
            x = x.relu().log1p()  # what is not below 0 stays, the second time
        x = x * w if row.weighted else x
        result = x.amax(0) if row.reduce is Reduce.MAX else x.sum(0)
        n = len(x)
        result = result / {
            Divisor.ONE: 1.0, Divisor.COUNT: n, Divisor.SQRT_COUNT: n**0.5, Divisor.WEIGHT: w.sum(),
        }[row.divisor]  # fmt: skip
    result = result[:truncate_dim]
    return result / result.norm().clamp(min=1e-12) if normalize else result


def gradients(
    function: Callable[..., Tensor], arguments: dict[str, Any], gradient: Tensor, **more: Any
) -> tuple[Tensor, ...]:
    """The gradients of hidden, or of its rows where it is nested, and of weights, scores or a query where they are
    given, for this gradient of the result. Whatever is given may require gradients or not; nothing of it is written."""
    arguments = dict(arguments)
    name = "x" if "x" in arguments else "hidden"  # of l2_normalize
    states = arguments[name]
    leaves = [(states.values() if states.is_nested else states).detach().requires_grad_()]
    nested = torch.nested.nested_tensor_from_jagged
    arguments[name] = nested(leaves[0], states.offsets()) if states.is_nested else leaves[0]
    for own in GRADIENTS_OF:
        if own != "hidden" and own in arguments:
            arguments[own] = arguments[own].detach().requires_grad_()
            leaves.append(arguments[own])
    return torch.autograd.grad(function(**arguments, **more), leaves, gradient)


def backward_arguments(mode: str, of: str, gradient: Any, result: Tensor | None = None, **tensors: Any) -> list[Any]:
    """What _pool_backward takes, in its order; what is not given is None, and a scale 1."""
    values: dict[str, Any] = dict.fromkeys(argument.name for argument in POOL_BACKWARD)
    values["mode"], values["of"] = codes(mode, of)
    values |= {"gradient": gradient, "result": result, "scale": 1.0}
    return in_order("_pool_backward", values | tensors)[0]
