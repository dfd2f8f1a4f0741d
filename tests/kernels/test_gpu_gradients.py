"""Gradients as only a GPU can show them: either backend gives the CPU's bits, and a graph sees new lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.on_gpu import DEVICE, MARKS, all_moved, assert_a_graph_sees_new_lengths, batches, moved
from torch import Tensor

import fastpool
from fastpool.testing import DTYPES, function_of, gradients, own_arguments, same_bits, variants

pytestmark = MARKS

SHAPES = (([1, 40, 0, 700, 33, 64, 5], 72), ([3, 129, 17], 4096), ([260, 2], 1))


def assert_the_cpus(mode: str, arguments: dict[str, Any], case: object = None, **more: Any) -> None:
    """Gradients of hidden and of weights, for the same gradient of the result on either side."""
    function: Callable[..., Tensor] = function_of(mode)
    with fastpool.backend("native"):
        result = function(**arguments, **more)
        gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(4)).to(result.dtype)
        wanted = gradients(function, arguments, gradient, **more)
    found = gradients(function, all_moved(arguments), gradient.to(DEVICE), **more)
    for one, other in zip(found, wanted, strict=True):
        assert same_bits(one.cpu(), other), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_gradients_are_the_cpus(backend: str, mode: str, given: str | None, dtype: torch.dtype) -> None:
    for n, (case, arguments) in enumerate(batches(SHAPES, mode, given, dtype)):
        # By turns, in pairs, since batches with holes and without them take turns too.
        more = {"truncate_dim": max(1, case.width // 2), "normalize": True} if n // 2 % 2 else {}
        assert_the_cpus(mode, arguments, (case, more), **more)


@pytest.mark.sanitized
@pytest.mark.parametrize(("mode", "given"), variants())
def test_gradients_of_overlapping_segments(backend: str, mode: str, given: str | None) -> None:
    """Many on a row, in any order, with gaps."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, 300, (150,), generator=generator)
    arguments = {
        "hidden": torch.randn(400, 130, generator=generator).bfloat16(),
        "mask": torch.rand(400, generator=generator) > 0.2,
        "starts": starts,
        "ends": (starts + torch.randint(0, 300, (150,), generator=generator)).clamp(max=390),
    }
    arguments |= own_arguments(given, torch.rand(400, generator=generator), 130)
    assert_the_cpus(mode, arguments)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_l2_normalize(backend: str, dtype: torch.dtype) -> None:
    for x, eps in ((torch.randn(30, 7, 130), 1e-12), (torch.randn(3, 9001), 1e-12), (torch.randn(9, 64), 20.0)):
        x = x.to(dtype)
        results = []
        for name, device in ((backend, DEVICE), ("native", "cpu")):
            leaf = moved(x, device).requires_grad_()
            with fastpool.backend(name):
                fastpool.l2_normalize(leaf, eps=eps).backward(torch.ones_like(leaf))
            assert leaf.grad is not None
            results.append(leaf.grad.cpu())
        assert same_bits(*results)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_l2_normalize_dims(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    for width in (130, 384, 9001):
        x = torch.randn(30, width, generator=generator).to(dtype)
        truncate_dims = torch.randint(0, width + 1, (30,), generator=generator)
        results = []
        for name, device in ((backend, DEVICE), ("native", "cpu")):
            leaf = moved(x, device).requires_grad_()
            with fastpool.backend(name):
                fastpool.l2_normalize(leaf, truncate_dims=moved(truncate_dims, device)).backward(torch.ones_like(leaf))
            assert leaf.grad is not None
            results.append(leaf.grad.cpu())
        assert same_bits(*results), width


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["mean", "max", "weighted_mean", "last"])
def test_a_graph_of_gradients_sees_new_lengths(backend: str, mode: str, layout: str) -> None:
    """Forward and backward."""
    function: Callable[..., Tensor] = function_of(mode)
    gradient = torch.randn(3, 128, device=DEVICE).bfloat16()

    def gradient_of(hidden: Tensor, *bounds: Tensor) -> Tensor:
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, *bounds, normalize=True), leaf, gradient)[0]

    assert_a_graph_sees_new_lengths(layout, 700, gradient_of)
