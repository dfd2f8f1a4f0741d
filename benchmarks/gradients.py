"""What gradients cost on a CPU above writing them once.

    python -m benchmarks.gradients [--keep-memory] [--json]

Milliseconds, medians: fastpool's backward ops, the floor, and the formula's backward. --keep-memory: malloc gives no
memory back, so that no gradient meets a page for the first time: else most of the time is the system's, which clears
that page. --json: for programs.

The floor is torch.zeros of hidden's shape: memory, and one write. Half of every batch is padding. It is the CPU time of
one thread.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import ROOT
from benchmarks.measure import no_collection
from benchmarks.tables import table_of
from fastpool.testing import backward_arguments

MODES = ("mean", "max", "weighted_mean")
SHAPES = (
    ("padded", 64, 512, 768, torch.float32),
    ("padded", 64, 512, 768, torch.bfloat16),
    ("padded", 16, 2048, 1024, torch.bfloat16),
    ("packed", 64, 512, 1024, torch.float32),
    ("padded", 64, 128, 384, torch.float32),  # stays in the last cache
)


@dataclass(frozen=True)
class Batch:
    hidden: Tensor  # padded [B, S, H], or packed [B S, H]
    mask: Tensor | None
    cu_seqlens: Tensor | None
    gradient: Tensor  # [B, H], of the accumulator


def build(layout: str, batch: int, length: int, width: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, width, generator=generator).to(dtype)
    gradient = torch.randn(batch, width, generator=generator)
    if layout == "packed":
        return Batch(hidden.flatten(0, 1), None, torch.arange(batch + 1) * length, gradient)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return Batch(hidden, (torch.arange(length) < lengths).long(), None, gradient)


def op(mode: str, batch: Batch) -> Callable[[], Tensor]:
    """fastpool's backward op, as autograd calls it."""
    hidden, dtype = batch.hidden, batch.gradient.dtype
    result = getattr(torch.ops.fastpool, mode)(hidden, batch.mask, batch.cu_seqlens, out_dtype=dtype)
    backward = torch.ops.fastpool._pool_backward
    given = {"hidden": hidden, "mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
    arguments = backward_arguments(mode, "hidden", batch.gradient, result, **given)
    return lambda: backward(*arguments)


def formula(mode: str, batch: Batch) -> Callable[[], Tensor]:
    """The backward of what people write: the masked formula, and segment_reduce for packed input."""
    hidden = batch.hidden.detach().requires_grad_()
    if batch.mask is None:
        assert batch.cu_seqlens is not None
        result = torch.segment_reduce(hidden, "max" if mode == "max" else "mean", offsets=batch.cu_seqlens)
    elif mode == "max":
        result = hidden.masked_fill(batch.mask[..., None] == 0, -torch.inf).amax(1)
    else:
        weights = batch.mask if mode == "mean" else batch.mask * torch.arange(1, batch.mask.shape[1] + 1)
        weights = weights[..., None].to(hidden.dtype)
        result = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    gradient = batch.gradient.to(result.dtype)
    return lambda: torch.autograd.grad(result, hidden, gradient, retain_graph=True)[0]


def medians(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, all in turn, so that drift hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with no_collection():
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.thread_time()
                result = call()
                taken[name].append(1e3 * (time.thread_time() - start))
                del result  # freed after the clock has stopped
    return {name: statistics.median(times) for name, times in taken.items()}


def calls_of(batch: Batch) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {"floor": lambda: torch.zeros_like(batch.hidden)}
    for mode in MODES:
        calls[mode] = op(mode, batch)
        if batch.mask is not None or mode != "weighted_mean":
            calls[f"{mode}'s formula"] = formula(mode, batch)
    return calls


def keep_memory() -> None:
    """glibc's malloc, as if nothing were too large for it and the system needed nothing back."""
    libc: Any = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def measure(rounds: int) -> list[dict[str, object]]:
    """For each shape, milliseconds by name."""
    torch.set_num_threads(1)
    found: list[dict[str, object]] = []
    for shape in SHAPES:
        batch = build(*shape)
        calls = calls_of(batch)
        check(calls)
        ms = {name: round(one, 4) for name, one in medians(calls, rounds).items()}
        dtype = str(batch.hidden.dtype).removeprefix("torch.")
        case = f"{shape[0]} {' x '.join(map(str, batch.hidden.shape))} {dtype}"
        found.append({"case": case, "bytes": batch.hidden.nbytes, "ms": ms})
    return found


def check(calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raises AssertionError where fastpool's gradient is not the formula's: what is not right is not timed. Only mean's
    and weighted_mean's: formulas share out maxima as they like."""
    for name in ("mean", "weighted_mean"):
        if f"{name}'s formula" in calls:
            mine, theirs = calls[name]().float(), calls[f"{name}'s formula"]().float()
            assert (mine - theirs).norm() <= 0.01 * theirs.norm(), f"the gradient of {name} is wrong"


def in_processes_of_their_own(rounds: int) -> dict[str, list[dict[str, object]]]:
    """`measure` both ways: what malloc does is a matter of the whole process."""
    found = {}
    for name, options in {"memory kept": ["--keep-memory"], "fresh pages": []}.items():
        command = [sys.executable, "-m", "benchmarks.gradients", "--json", f"--rounds={rounds}", *options]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-memory", action="store_true", help="measure without the system's page faults")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_memory()
    found = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(found))
    else:
        print_gradients(Console(), found)


def print_gradients(console: Console, found: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for one in found for name in one["ms"]))
    table = table_of("gradients of hidden: ms, and multiples of the floor", "case", *names)
    for one in found:
        ms = one["ms"]
        cells = [f"{ms[name]:.2f}\n{ms[name] / ms['floor']:.2f}x" if name in ms else "-" for name in names]
        table.add_row(one["case"], *cells)
    console.print(table)


if __name__ == "__main__":
    main()
