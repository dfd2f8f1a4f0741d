"""How fast every mode and its gradient are on a GPU, beside reading, or writing, the same bytes once.

    python -m benchmarks.gpu_modes [--filter TEXT] [--only TEXT] [--backends BACKEND...] [--seconds N] [--out FILE]

Cold, in a CUDA graph, packed, nothing normalised: microseconds a call, medians. `read` is the fastest kernel that reads
the same token states, `write` torch's own that fills as many; "SDPA", "amax" and "sum" are torch's for texts of one
length. --only: calls whose name holds TEXT. --out: a JSON object a line, as it comes.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

import fastpool
from benchmarks.attention import MODES, QUERIES
from benchmarks.bandwidth_gpu import READERS
from benchmarks.cases import DTYPES, Batch, Case, build
from benchmarks.providers import Call
from fastpool.testing import backward_arguments

CASES = (
    Case(512, 64, 768),
    Case("chunks", 64, 1024),
    Case("passages", 1024, 768),
    Case("passages", 32, 1024),
    Case(8192, 8, 1536),
    Case(32768, 1, 4096),
    Case("chunks", 64, 1024, "fp32"),
)
BACKENDS = ("native", "triton")
_ROUNDS = 7


class Given:
    """What calls of every mode take besides token states."""

    def __init__(self, batch: Batch) -> None:
        generator = torch.Generator(batch.packed.device).manual_seed(0)
        rows, width = batch.packed.shape
        drawn: dict[str, Any] = {"generator": generator, "device": batch.packed.device}
        self.scores = 3 * torch.randn(rows, **drawn)
        self.weights = self.scores.exp()
        self.queries = (torch.randn(QUERIES, width, **drawn) / width**0.5).to(batch.packed.dtype)


def forward(batch: Batch, given: Given) -> dict[str, Call]:
    hidden = batch.packed
    packed: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens}
    return {
        "mean": lambda: fastpool.mean(hidden, **packed),
        "max": lambda: fastpool.max(hidden, **packed),
        "weighted_mean": lambda: fastpool.weighted_mean(hidden, weights=given.weights, **packed),
        "softmax_mean": lambda: fastpool.softmax_mean(hidden, scores=given.scores, **packed),
        "attention": lambda: fastpool.attention(hidden, given.queries[:1], **packed),
        f"attention, {QUERIES} queries": lambda: fastpool.attention(hidden, given.queries, **packed),
        "cls": lambda: fastpool.cls(hidden, **packed),
        ", ".join(MODES): lambda: fastpool.pool(hidden, modes=MODES, **packed),
    }


def backward(batch: Batch, given: Given) -> dict[str, Call]:
    """The gradients of token states, as autograd asks for them."""
    texts, width = len(batch.cu_seqlens) - 1, batch.packed.shape[1]
    generator = torch.Generator(batch.packed.device).manual_seed(1)
    gradient = torch.randn(texts, width, generator=generator, device=batch.packed.device)
    tensors = {"hidden": batch.packed, "cu_seqlens": batch.cu_seqlens}
    added: dict[str, dict[str, Any]] = {
        "mean": {},
        "max": {},
        "weighted_mean": {"weights": given.weights},
        "softmax_mean": {"scores": given.scores},
        "attention": {"query": given.queries[0]},
    }

    def call(mode: str) -> Call:
        result = getattr(torch.ops.fastpool, mode)(**tensors, **added[mode], out_dtype=gradient.dtype)
        arguments = backward_arguments(mode, "hidden", gradient, result, **tensors, **added[mode])
        return partial(torch.ops.fastpool._pool_backward, *arguments)

    return {f"gradient of {mode}": call(mode) for mode in added}


def of_torch(case: Case, batch: Batch, given: Given) -> dict[str, Call]:
    """Its own ways, for texts of one length."""
    calls: dict[str, Call] = {"write": lambda: torch.zeros_like(batch.packed)}
    if isinstance(case.mix, int):
        hidden = batch.packed.view(case.batch, case.mix, case.width)
        keys = hidden.unsqueeze(1)

        def attended(some: Tensor) -> Tensor:
            expanded = some.expand(len(hidden), 1, *some.shape)
            return F.scaled_dot_product_attention(expanded, keys, keys, scale=1.0)

        calls |= {
            "sum": lambda: hidden.sum(1),
            "amax": lambda: hidden.amax(1),
            "SDPA": partial(attended, given.queries[:1]),
            f"SDPA, {QUERIES} queries": partial(attended, given.queries),
        }
    return calls


def plan() -> None:
    """Makes our calls, on a CPU, for precompile.py, which does not run them."""
    for case in CASES:
        rows = torch.empty(sum(case.lengths()), case.width, dtype=DTYPES[case.dtype])
        bounds = torch.tensor([0, *case.lengths()]).cumsum(0).int()
        batch = Batch(rows, rows, rows, bounds)
        given = Given(batch)
        with fastpool.backend("triton"):
            for call in {**forward(batch, given), **backward(batch, given)}.values():
                call()


@torch.inference_mode()
def measure(case: Case, only: str, backends: Sequence[str], until: float) -> Iterator[dict[str, Any]]:
    from benchmarks.gpu import Gpu
    from benchmarks.timing_cuda import copies_of, time_calls

    gpu = Gpu()
    batches = copies_of(build(case, gpu.device), gpu)
    given = Given(batches[0])

    def timed(backend: str, name: str, calls: list[Call]) -> dict[str, Any]:
        found: dict[str, Any] = {"case": case.name, "bytes": batches[0].real_bytes, "backend": backend, "name": name}
        try:
            with fastpool.backend(backend):
                return found | {"us": round(time_calls(calls, gpu, _ROUNDS).median, 2)}
        except Exception as error:  # the others are still to be measured
            return found | {"failure": f"{type(error).__name__}: {str(error)[:200]}"}

    reads = [timed("auto", "read", [READERS[name](one.packed) for one in batches]) for name in READERS]
    yield min(reads, key=lambda one: one.get("us", math.inf))
    of_each = [of_torch(case, one, given) for one in batches]
    ours = [forward(one, given) | backward(one, given) for one in batches]
    for calls, by in ((of_each, ("auto",)), (ours, backends)):
        for name in calls[0]:
            for backend in by if only in name else ():
                if time.monotonic() < until:
                    yield timed(backend, name, [one[name] for one in calls])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name holds TEXT, and no others")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose name holds TEXT, and no others")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="nothing is begun after so many")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a file to write besides")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    if asked.out:
        asked.out.unlink(missing_ok=True)
    for case in CASES:
        if asked.filter not in case.name or time.monotonic() > until:
            continue
        read = 0.0
        for one in measure(case, asked.only, asked.backends, until):
            read = one.get("us", 0.0) if one["name"] == "read" else read
            shown = (
                f"{one['us']:9.2f} us {one['us'] / (read or math.nan):6.2f} reads" if "us" in one else one["failure"]
            )
            print(f"{case.name}, {one['backend']}, {one['name']}: {shown}", flush=True)
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps(one) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
