"""What a call costs the host before a GPU has anything to do: microseconds of Python, without a GPU.

    TRITON_INTERPRET=1 python benchmarks/host_time.py [--json FILE]

Tensors are on the CPU, and a stand-in takes the place of a compiled Triton program, so that everything runs but the
launch itself (Triton's launcher and the driver, some 5 us) and the questions about the current stream. `op` is
torch.ops.fastpool.*, from the caller to the stand-in, by way of C++, which sends the call on to Python; `dispatch` is
Python's part of it: checks, choice, plan, memory, arguments. `new` is the first call of its shape, `again` any other.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from fastpool.triton_kernels import counters, launch  # Triton reads the variable as it is imported

import fastpool
from fastpool import dispatch, known
from fastpool.segments import NormalizeCall, PoolBackwardCall, PoolCall, accumulator
from machine import cpu_model, describe_commit, describe_versions

LIMIT_US = 15.0  # of Python's part, for a call that looks like one before


class Program:
    """A compiled program that is launched in no time."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: None


def cases() -> dict[str, tuple[dispatch.Call, Callable[[], Any]]]:
    """A call as Python's dispatch has it, and the op that comes to it. Small ones: what a CPU's allocator takes for much
    memory is nothing that a GPU's does."""
    ops = torch.ops.fastpool
    padded, mask = torch.zeros(32, 64, 384, dtype=torch.bfloat16), torch.ones(32, 64, dtype=torch.int64)
    packed, cu = torch.zeros(8192, 64, dtype=torch.bfloat16), torch.arange(0, 8193, 512, dtype=torch.int32)
    short, one = padded[0], torch.tensor([0, 64], dtype=torch.int32)
    gradient = torch.zeros(1, 384, dtype=accumulator(short.dtype))
    return {
        "mean, padded, mask": (
            PoolCall("mean", padded, mask, normalize=True),
            lambda: ops.mean(padded, mask, normalize=True),
        ),
        "mean, packed, split": (
            PoolCall("mean", packed, cu_seqlens=cu, normalize=True),
            lambda: ops.mean(packed, None, cu, normalize=True),
        ),
        "l2_normalize": (NormalizeCall(short), lambda: ops.l2_normalize(short)),
        "gradient of mean": (
            PoolBackwardCall(PoolCall("mean", short, cu_seqlens=one), gradient),
            lambda: ops._mean_backward(gradient, short, None, one, None, None, None, None),
        ),
    }


def microseconds(call: Callable[[], Any], before: Callable[[], Any], repeats: int) -> float:
    """Of this thread's CPU time, the median; `before` each is not billed."""
    taken = []
    for _ in range(repeats):
        before()
        start = time.thread_time_ns()
        call()
        taken.append(time.thread_time_ns() - start)
    return median(taken) / 1e3


def anew(call: dispatch.Call) -> dispatch.Call:
    """Another object that describes the same call, as every call of an op makes one."""
    return replace(call, pool=replace(call.pool)) if isinstance(call, PoolBackwardCall) else replace(call)


def measure(repeats: int) -> dict[str, dict[str, float]]:
    launch.knows_programs = lambda device: True
    # A CPU's values are checked, which a GPU's are not.
    for kind in (PoolCall, PoolBackwardCall, NormalizeCall):
        kind.check_values = lambda self: None
    found: dict[str, dict[str, float]] = {}
    for name, (call, op) in cases().items():

        def python(call: dispatch.Call = call) -> None:
            dispatch.run(anew(call))

        def overhead(call: dispatch.Call = call) -> None:
            anew(call)

        class Compiles(dict):  # every program is known
            def get(self, key: Any, default: Any = None) -> Program:
                return Program()

        launch._compiled = Compiles()
        with fastpool.backend("triton"), torch.inference_mode():
            nothing = lambda: None  # noqa: E731
            for warm in (python, op):
                warm()
            building = microseconds(overhead, nothing, repeats)
            found[name] = {
                "dispatch, again": microseconds(python, nothing, repeats) - building,
                "dispatch, new": microseconds(python, known.forget, repeats) - building,
                "op, again": microseconds(op, nothing, repeats),
                "op, new": microseconds(op, known.forget, repeats),
            }
        counters._pairs.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=2000)
    arguments = parser.parse_args()
    gc.disable()
    torch.set_num_threads(1)
    found = measure(arguments.repeats)
    columns = list(next(iter(found.values())))
    print(f"{'microseconds':24}" + "".join(f"{column:>18}" for column in columns))
    for name, row in found.items():
        print(f"{name:24}" + "".join(f"{row[column]:18.1f}" for column in columns))
    if arguments.json:
        head = {"commit": describe_commit(), "cpu": cpu_model(), "versions": describe_versions("triton")}
        arguments.json.write_text(json.dumps({**head, "host_us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
