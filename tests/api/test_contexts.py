"""What torch is set to for a thread or a block changes no result and no check."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch

import fastpool
from fastpool import known
from fastpool.modes import MODES
from fastpool.testing import cpu_backends, function_of, required, same_bits

HIDDEN = torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(40) % 7 != torch.tensor([[0], [3], [6]])
PACKED, CU = HIDDEN.flatten(0, 1), torch.tensor([0, 10, 10, 100])
LENGTHS, DIMS = torch.tensor([40, 0, 7]), torch.tensor([12, 0, 5])
NESTED = torch.nested.nested_tensor_from_jagged(PACKED, torch.tensor([0, 10, 120]))
ROWS = HIDDEN[:, 0]
OWN = {mode: required(mode, HIDDEN.shape) for mode in MODES}
OWN_PACKED = {mode: required(mode, PACKED.shape) for mode in MODES}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": default_device,
    "device": lambda: torch.device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def calls() -> list[Callable[[], object]]:
    found: list[Callable[[], object]] = [
        lambda: fastpool.weighted_mean(HIDDEN, MASK, weights=HIDDEN[..., 0].double()),
        lambda: fastpool.l2_normalize(ROWS * 1e30, truncate_dims=DIMS),
        lambda: fastpool.l2_normalize(ROWS, truncate_dims=DIMS + 1),
        lambda: fastpool.segments(torch.ones_like(LENGTHS))[1].double(),
        lambda: fastpool.segments(torch.zeros_like(LENGTHS) - 1),
        lambda: fastpool.segments(position_ids=torch.zeros_like(LENGTHS))[0].double(),
        lambda: fastpool.PoolingConfig(("weighted_mean",), include_prompt=False).apply(HIDDEN, MASK, starts=DIMS),
    ]
    for mode in MODES:
        padded = partial(function_of(mode), **OWN[mode])
        packed = partial(function_of(mode), **OWN_PACKED[mode])
        explain = partial(fastpool.explain, mode=mode, **OWN[mode])
        found += [
            partial(padded, HIDDEN, mask=MASK),
            partial(padded, HIDDEN.bfloat16(), mask=MASK.to(torch.uint8), normalize=True, truncate_dim=5),
            partial(packed, PACKED.half(), cu_seqlens=CU, out_dtype=torch.float64),
            partial(padded, HIDDEN.mT.contiguous().mT, lengths=LENGTHS),
            partial(packed, NESTED),
            partial(padded, HIDDEN, mask=MASK * 3),
            partial(packed, PACKED, cu_seqlens=CU.flip(0)),
            partial(padded, HIDDEN, lengths=LENGTHS + 1),
            partial(padded, HIDDEN, mask=MASK.float()),
            partial(explain, HIDDEN, MASK),
            partial(explain, HIDDEN, MASK * 3),
        ]
        if not (MODES[mode].takes_query or MODES[mode].of_logits):
            pooling = fastpool.nn.Pooling((mode, "max"), 15, normalize=True)
            found.append(partial(pooling, HIDDEN, MASK, **OWN[mode]))
    return found


def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


# Triton's interpreter takes its time, and what it does in Python is to make tensors.
CASES = [(context, backend) for context in CONTEXTS for backend in cpu_backends() if backend != "triton"]
CASES += [("default device", "triton")]


@pytest.mark.parametrize(("context", "backend"), CASES)
def test_all_is_as_without(context: str, backend: str) -> None:
    with fastpool.backend(backend):
        expected = [outcome(call) for call in calls()]
        known.forget()  # checks that were made before
        with CONTEXTS[context]():
            found = [outcome(call) for call in calls()]
    assert sum(isinstance(one, str) for one in expected) > 5 * len(MODES)
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, torch.Tensor):
            assert isinstance(other, torch.Tensor)
            assert same_bits(one, other)
        else:
            assert one == other


@pytest.mark.parametrize(("context", "backend"), [case for case in CASES if case[0] not in ("inference", "no_grad")])
def test_gradients_too(context: str, backend: str) -> None:
    def gradients() -> list[torch.Tensor]:
        found = []
        for mode in MODES:
            hidden = HIDDEN.clone().requires_grad_()
            (function_of(mode)(hidden, mask=MASK, normalize=True, **OWN[mode]) ** 2).sum().backward()
            assert hidden.grad is not None
            found.append(hidden.grad)
        return found

    with fastpool.backend(backend):
        expected = gradients()
        with CONTEXTS[context]():
            found = gradients()
    assert all(same_bits(one, other) for one, other in zip(expected, found, strict=True))
