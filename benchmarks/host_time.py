"""What a GPU call costs the host before the device has anything to do: microseconds, without a GPU.

    python -m benchmarks.host_time [--cuda] [--json FILE]

Triton: tensors are on the CPU, and a stand-in takes the place of a compiled program, so that everything runs but the
launch itself (Triton's launcher and the driver) and the questions about the current stream. `op` is an op of
torch.ops.fastpool from the caller to the stand-in, by way of C++, which sends the call on to Python; `without C++` is
the same where torch's dispatcher comes to Python at once, so that the difference is the price of that way; `Python` is
Python's part of both: checks, choice, plan, memory, arguments. `new` is a call that looks like none before, `again` any
other.

What a torch.empty takes comes first: machines, and hours of one that others share, differ by more than calls do.

--cuda: CUDA C++ in the build of its sources for a CPU (tests/cpp/cuda_host), with launches that do nothing.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch

import fastpool
from benchmarks import ROOT
from benchmarks.machine import cpu_model, describe_commit, describe_versions
from fastpool import dispatch, known
from fastpool.calls import Call, NormalizeCall, PoolBackwardCall, PoolCall, accumulator
from fastpool.testing import backward_arguments
from fastpool.triton_kernels import counters, launch  # Triton reads the variable as it is imported

LIMIT_US = 15.0  # of Python's part of a pooling call, again
TESTS = ROOT / "tests"

Run = Callable[[], Any]
Cases = dict[str, tuple[Call, Callable[[Any], Run]]]


class Programs(dict[Any, Any]):
    """Every program is compiled, and launched in no time."""

    def get(self, key: Any, default: Any = None) -> "Programs":
        return self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments: None


class PythonOps:
    """The ops without what the native libraries fill."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op: Callable[..., Any] = getattr(torch.ops.fastpool, f"_python_{name}")
        return op


def cases() -> Cases:
    """A call as Python's dispatch has it, and the op that comes to it, of any namespace. Small ones: what is much
    memory to a CPU's allocator is nothing to a GPU's."""
    padded, mask = torch.zeros(32, 64, 384, dtype=torch.bfloat16), torch.ones(32, 64, dtype=torch.int64)
    packed, cu = torch.zeros(8192, 64, dtype=torch.bfloat16), torch.arange(0, 8193, 512, dtype=torch.int32)
    short, one = padded[0], torch.tensor([0, 64], dtype=torch.int32)
    gradient = torch.zeros(1, 384, dtype=accumulator(short.dtype))
    of_mean = backward_arguments("mean", "hidden", gradient, hidden=short, cu_seqlens=one)
    return {
        "mean, padded, mask": (
            PoolCall("mean", padded, mask, normalize=True),
            lambda ops: lambda: ops.mean(padded, mask, normalize=True),
        ),
        "mean, packed, split": (
            PoolCall("mean", packed, cu_seqlens=cu, normalize=True),
            lambda ops: lambda: ops.mean(packed, None, cu, normalize=True),
        ),
        "l2_normalize": (NormalizeCall(short), lambda ops: lambda: ops.l2_normalize(short)),
        "gradient of mean": (
            PoolBackwardCall(PoolCall("mean", short, cu_seqlens=one), gradient),
            lambda ops: lambda: ops._pool_backward(*of_mean),
        ),
    }


def microseconds(run: Run, repeats: int, before: Run = lambda: None) -> float:
    """The median of this thread's CPU time for a call; what `before` takes ahead of each is not counted."""
    run()
    taken = []
    for _ in range(repeats):
        before()
        start = time.thread_time_ns()
        run()
        taken.append(time.thread_time_ns() - start)
    return median(taken) / 1e3


def anew(call: Any) -> Any:
    """Another object that describes the same call, as every call of an op makes one."""
    return replace(call, pool=replace(call.pool)) if isinstance(call, PoolBackwardCall) else replace(call)


def triton(repeats: int) -> dict[str, dict[str, float]]:
    found = {}
    kinds = (PoolCall, PoolBackwardCall, NormalizeCall)
    values = [patch.object(kind, "check_values", lambda self: None) for kind in kinds]  # which a GPU's are not
    for one in values:
        one.start()
    with patch.object(launch, "knows_programs", lambda device: True), patch.object(launch, "_compiled", Programs()):
        known.forget()
        for name, (call, op) in cases().items():
            with fastpool.backend("triton"), torch.inference_mode():

                def python(call: Any = call) -> None:
                    dispatch.run(anew(call))

                def describes(call: Any = call) -> None:
                    anew(call)

                describing, run = microseconds(describes, repeats), op(torch.ops.fastpool)
                found[name] = {
                    "Python, again": microseconds(python, repeats) - describing,
                    "Python, new": microseconds(python, repeats, known.forget) - describing,
                    "op, again": microseconds(run, repeats),
                    "without C++": microseconds(op(PythonOps()), repeats),
                    "op, new": microseconds(run, repeats, known.forget),
                }
    for one in values:
        one.stop()
    known.forget()
    counters._pairs.clear()
    return found


def cuda(repeats: int) -> dict[str, dict[str, float]]:
    sys.path.insert(0, str(TESTS))
    from helpers import cuda_host

    host = cuda_host.Host(cuda_host.build("cuda_host"))
    host.c.cuda_host_skip_launches(1)
    with torch.inference_mode():
        return {name: {"op": microseconds(op(host.ops), repeats)} for name, (_, op) in cases().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="CUDA C++ too, which is built for it (a minute)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=2000)
    arguments = parser.parse_args()
    gc.disable()
    torch.set_num_threads(1)
    empty = microseconds(lambda: torch.empty((16, 64), dtype=torch.float32, device="cpu"), arguments.repeats)
    print(f"torch.empty: {empty:.1f} us")
    found = {"Triton": triton(arguments.repeats)}
    if arguments.cuda:
        found["CUDA C++"] = cuda(arguments.repeats)
    for path, rows in found.items():
        columns = list(next(iter(rows.values())))
        print(f"{path + ', microseconds':28}" + "".join(f"{column:>15}" for column in columns))
        for name, row in rows.items():
            print(f"{name:28}" + "".join(f"{row[column]:15.1f}" for column in columns))
    for name, row in found["Triton"].items():
        if name.startswith("mean"):
            met = "within" if row["Python, again"] <= LIMIT_US else "over"
            print(f"{name}: Python, again is {met} {LIMIT_US:g} us")
    if arguments.json:
        head = {"commit": describe_commit(), "cpu": cpu_model(), "versions": describe_versions("triton")}
        arguments.json.write_text(json.dumps({**head, "empty_us": empty, "host_us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
