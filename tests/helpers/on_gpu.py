"""What the tests that need a GPU share; their fixture `backend` is conftest's."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastpool import testing
from fastpool.testing import DTYPES, LAYOUTS, same_bits, sequences

DEVICE = "cuda"
BACKENDS = ("triton", "native")
MARKS = [
    pytest.mark.gpu_machine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def moved(value: Any, device: str | None = None) -> Tensor:
    """A tensor on the GPU, or another device."""
    return testing.moved(value, device or DEVICE)


def all_moved(arguments: dict[str, Any], device: str | None = None) -> dict[str, Tensor]:
    return {name: moved(value, device) for name, value in arguments.items()}


class Case(NamedTuple):
    layout: str
    lengths: list[int]
    width: int
    holes: bool


def batches(
    shapes: Sequence[tuple[list[int], int]], mode: str, given: str | None, dtype: torch.dtype
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Cases and their arguments: each shape (lengths, width) in the layouts whose turn it is, with holes and
    without.

    Over all modes and dtypes, every layout comes with every mode and with every dtype. It does not come with every
    pair of them, which would be four times as many programs, each a second or two of Triton's compiler. Modes that
    Triton compiles alike come with the same."""
    turn = {"max": 1, "cls": 1, "last": 1, "weighted_mean": 2}.get(mode, 0) + bool(given) - DTYPES.index(dtype)
    for name in list(LAYOUTS)[turn % len(DTYPES) :: len(DTYPES)]:
        for lengths, width in shapes:
            for holes in (False, True) if LAYOUTS[name].holes else (False,):
                batch = sequences(lengths, width, dtype, holes=holes)
                yield Case(name, lengths, width, holes), LAYOUTS[name].make(batch, given)


# ---- graphs


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call, and its result's memory. The call runs before on a stream of its own, as torch asks of what
    records gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def assert_a_graph_sees_new_lengths(layout: str, rows: int, pool: Callable[..., Tensor]) -> None:
    """Captures pool(hidden, mask) or pool(hidden, mask, cu_seqlens) once; then other tokens and bounds, of up to `rows`
    to a segment, stand in the same memory."""
    hidden = torch.zeros((3, rows, 128) if layout == "padded" else (3 * rows, 128), dtype=torch.bfloat16, device=DEVICE)
    mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=DEVICE)
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device=DEVICE)

    def call() -> Tensor:
        return pool(hidden, mask) if layout == "padded" else pool(hidden, mask, cu_seqlens)

    graph, result = captured(call)
    for lengths in ([1, rows, 0], [300, 20, rows - 1], [0, 0, 0], [rows, rows, 4]):
        hidden.normal_()
        mask.copy_(torch.rand_like(hidden[..., 0]) > 0.2)
        ends = torch.tensor(lengths, device=DEVICE)
        if layout == "padded":
            mask &= torch.arange(rows, device=DEVICE) < ends[:, None]
        else:
            cu_seqlens[1:] = ends.cumsum(0)
        result.fill_(torch.nan)
        graph.replay()
        assert same_bits(result, call()), lengths


# ---- waiting


def seen(launches: int | None) -> int:
    """A number of launches, where the tools to count them work."""
    if launches is None:
        lost = os.environ.get("FAIL_WITHOUT_CUDA") == "1"
        (pytest.fail if lost else pytest.skip)("this torch does not show what it launches")
    return launches


def waits(call: Callable[[], object]) -> bool:
    """Whether a call returns only once the device has done what was queued before it: here a sleep. After a slow host
    the device is awake as well, so that further tries let it sleep four times as long, up to some ten seconds: a call
    that waits is as slow as any of them, a host is not. Synchronisations that torch sees are errors."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for cycles in (5_000_000 * 4**n for n in range(7)):
            awake = torch.cuda.Event()
            torch.cuda._sleep(cycles)
            awake.record()
            call()
            if not awake.query():
                return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True
