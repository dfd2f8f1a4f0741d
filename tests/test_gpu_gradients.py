"""Gradients as only a GPU can show them: either backend gives the reference's bits, and a graph sees new lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, moved
from torch import Tensor

import fastpool
from fastpool.testing import DTYPES, SPELLINGS, gradients, same_bits, sequences, variants

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def gradients_of(
    backend: str, mode: str, arguments: dict[str, Any], device: str | None = None, **more: Any
) -> tuple[Tensor, ...]:
    """Of hidden and of weights, for the same gradient of the result wherever it runs."""
    if device is not None:
        arguments = {name: moved(value, device) for name, value in arguments.items()}
    function: Callable[..., Tensor] = getattr(fastpool, mode)
    with fastpool.backend(backend):
        with torch.no_grad():
            result = function(**arguments, **more)
        generator = torch.Generator().manual_seed(4)
        gradient = torch.randn(result.shape, generator=generator).to(result.dtype).to(result.device)
        return gradients(function, arguments, gradient, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "weighted"), variants())
def test_gradients_are_the_cpus(backend: str, mode: str, weighted: bool, dtype: torch.dtype) -> None:
    for lengths, width in (([1, 40, 0, 700, 33, 64, 5], 72), ([3, 129, 17], 4096), ([260, 2], 1)):
        for holes in (False, True):
            batch = sequences(lengths, width, dtype, holes=holes)
            for name, spelling in SPELLINGS.items():
                if spelling.holes or not holes:
                    arguments = spelling.make(batch, weighted)
                    for more in ({}, {"dim": max(1, width // 2), "normalize": True}):
                        found = gradients_of(backend, mode, arguments, DEVICE, **more)
                        wanted = gradients_of("reference", mode, arguments, **more)
                        for one, other in zip(found, wanted, strict=True):
                            assert same_bits(one.cpu(), other), (name, lengths, holes, more)


@pytest.mark.sanitized
@pytest.mark.parametrize(("mode", "weighted"), variants())
def test_gradients_of_overlapping_segments(backend: str, mode: str, weighted: bool) -> None:
    """Many on a row, in any order, with gaps."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, 300, (150,), generator=generator)
    arguments = {
        "hidden": torch.randn(400, 130, generator=generator).bfloat16(),
        "mask": torch.rand(400, generator=generator) > 0.2,
        "starts": starts,
        "ends": (starts + torch.randint(0, 300, (150,), generator=generator)).clamp(max=390),
    }
    if weighted:
        arguments["weights"] = torch.rand(400, generator=generator)
    found = gradients_of(backend, mode, arguments, DEVICE)
    for one, other in zip(found, gradients_of("reference", mode, arguments), strict=True):
        assert same_bits(one.cpu(), other)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_l2_normalize(backend: str, dtype: torch.dtype) -> None:
    for x, eps in ((torch.randn(30, 7, 130), 1e-12), (torch.randn(3, 9001), 1e-12), (torch.randn(9, 64), 20.0)):
        x = x.to(dtype)
        results = []
        for name, device in ((backend, DEVICE), ("reference", "cpu")):
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
        dims = torch.randint(0, width + 1, (30,), generator=generator)
        results = []
        for name, device in ((backend, DEVICE), ("reference", "cpu")):
            leaf = moved(x, device).requires_grad_()
            with fastpool.backend(name):
                fastpool.l2_normalize(leaf, dims=moved(dims, device)).backward(torch.ones_like(leaf))
            assert leaf.grad is not None
            results.append(leaf.grad.cpu())
        assert same_bits(*results), width


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["mean", "max", "weighted_mean", "last"])
def test_a_graph_of_gradients_sees_new_lengths(backend: str, mode: str, layout: str) -> None:
    """Forward and backward captured once, on a stream of their own; then other tokens and bounds in the same memory."""
    rows = 700 if layout == "padded" else 2100
    hidden = torch.zeros((3, rows, 128) if layout == "padded" else (rows, 128), dtype=torch.bfloat16, device=DEVICE)
    mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=DEVICE)
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    function: Callable[..., Tensor] = getattr(fastpool, mode)
    gradient = torch.randn(3, 128, device=DEVICE).bfloat16()

    def call() -> Tensor:
        leaf = hidden.detach().requires_grad_()
        bounds = () if layout == "padded" else (cu_seqlens,)
        return torch.autograd.grad(function(leaf, mask, *bounds, normalize=True), leaf, gradient)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for lengths in ([1, 700, 0], [300, 20, 699], [0, 0, 0], [700, 700, 4]):
        hidden.normal_()
        ends = torch.tensor(lengths, device=DEVICE)
        if layout == "padded":
            mask.copy_((torch.arange(rows, device=DEVICE) < ends[:, None]) & (torch.rand_like(hidden[..., 0]) > 0.2))
        else:
            cu_seqlens[1:] = ends.cumsum(0)
            mask.copy_(torch.rand_like(hidden[..., 0]) > 0.2)
        result.fill_(torch.nan)
        graph.replay()
        assert same_bits(result, call()), lengths
