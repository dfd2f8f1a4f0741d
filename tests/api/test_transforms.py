"""Gradients where torch transforms the call: torch.func, and autograd that is compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.modes import MODES
from fastpool.testing import function_of, required, same_bits


def eager_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    real = mask[..., None].to(hidden.dtype)
    return (hidden * real).sum(-2) / real.sum(-2)


@pytest.mark.parametrize("called", [fastpool.mean, torch.ops.fastpool.mean])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap without a rule of its own calls one by one
def test_torch_func(called: Callable[..., Tensor]) -> None:
    func = torch.func
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, 7, 5, generator=generator)
    mask = torch.rand(3, 7, generator=generator) > 0.3
    mask[:, 0] = True
    for transform in (
        lambda f: lambda x: f(x[0]),
        lambda f: lambda x: func.grad(lambda y: f(y).pow(2).sum())(x[0]),
        lambda f: func.vmap(f),
        lambda f: func.vmap(func.grad(lambda y: f(y).pow(2).sum())),
        lambda f: func.grad(lambda x: func.vmap(lambda y: f(y).pow(2).sum())(x).sum()),
        lambda f: lambda x: func.jacrev(f)(x[0]),
        lambda f: lambda x: func.vjp(f, x[0])[1](torch.ones(3, 5))[0],
    ):
        got, expected = (transform(lambda x, f=f: f(x, mask))(hidden) for f in (called, eager_mean))
        assert torch.allclose(got, expected, atol=1e-6)


def eager_softmax_mean(hidden: Tensor, scores: Tensor) -> Tensor:
    return (scores.softmax(-1)[..., None] * hidden).sum(-2)


def eager_attention(hidden: Tensor, query: Tensor) -> Tensor:
    return torch.nn.functional.softmax(query @ hidden.mT, -1) @ hidden


@pytest.mark.parametrize("ops", [fastpool, torch.ops.fastpool])
@pytest.mark.parametrize(
    ("mode", "eager", "shape"),
    [("softmax_mean", eager_softmax_mean, (4, 3, 7)), ("attention", eager_attention, (4, 3, 2, 5))],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # as above
def test_torch_func_of_scores_and_queries(
    mode: str, eager: Callable[..., Tensor], shape: tuple[int, ...], ops: Any
) -> None:
    func, generator = torch.func, torch.Generator().manual_seed(0)
    hidden, own = torch.randn(4, 3, 7, 5, generator=generator), torch.randn(shape, generator=generator)
    name = "scores" if mode == "softmax_mean" else "query"
    for transform in (
        lambda f: f(hidden[0], own[0]),
        lambda f: func.grad(lambda y: f(hidden[0], y).pow(2).sum())(own[0]),
        lambda f: func.vmap(f)(hidden, own),
        lambda f: func.vmap(f, in_dims=(0, None))(hidden, own[0]),
        lambda f: func.vmap(func.grad(lambda x, y: f(x, y).pow(2).sum(), argnums=1))(hidden, own),
        lambda f: func.jacrev(f, argnums=1)(hidden[0], own[0]),
    ):
        got = transform(lambda x, y: getattr(ops, mode)(x, **{name: y}))
        assert torch.allclose(got, transform(eager), atol=1e-5)


@pytest.mark.parametrize("called", [fastpool.mean, torch.ops.fastpool.mean, fastpool.nn.Pooling("mean")])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # as above
def test_torch_func_around_what_is_recorded(called: Callable[..., Tensor]) -> None:
    """A leaf outside a transform is recorded through it."""
    func = torch.func
    for transform in (
        lambda f, x: func.vmap(lambda s: f(x * s).sum())(torch.arange(1.0, 4.0)),
        lambda f, x: func.vmap(f)(x[None]),
        lambda f, x: func.functionalize(f)(x),
        lambda f, x: func.grad_and_value(lambda s: func.vmap(lambda t: f(x * t).sum())(s).sum())(torch.ones(2))[1],
    ):
        got = []
        for function in (called, lambda y: y.mean(-2)):
            x = torch.arange(24.0).view(2, 3, 4).requires_grad_()
            result = transform(function, x)
            assert result.requires_grad
            (result.sum() + x.sum()).backward()
            got.append(x.grad)
        assert torch.allclose(*got)


@pytest.mark.parametrize("mode", [*MODES, "l2_normalize"])
def test_compiled_autograd(mode: str) -> None:
    """Of what was recorded without a compiler."""
    function, grads = function_of(mode), []
    own = required(mode, (2, 3, 4)) if mode in MODES else {}
    for compiled in (False, True):
        x = torch.arange(24.0).view(2, 3, 4).requires_grad_()
        result = function(x, out_dtype=torch.float64, **own).pow(2).sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                result.backward()
        else:
            result.backward()
        grads.append(x.grad)
    assert same_bits(*grads)


def test_what_vmap_refuses_is_said_in_the_ops_words() -> None:
    masks = torch.ones(3, 2, 5).long()
    masks[1, 0, 2] = 7
    with pytest.raises(ValueError, match=r"mask must hold 0 and 1 alone, got mask\[0, 2\] = 7"):
        torch.func.vmap(fastpool.mean)(torch.randn(3, 2, 5, 8), masks)
