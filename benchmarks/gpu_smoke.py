"""The first minute on a GPU: does each backend give the CPU's bits, does it go on doing so, how fast is it.

    python -m benchmarks.gpu_smoke [PART...] [--backends BACKEND...]

                    all three
bits repeat         these alone
--backends native   one backend's

A line per finding, as soon as it is there; exits with 1 if any is wrong. SMOKE_DEVICE=cpu runs what a CPU can: native's
bits, with TRITON_INTERPRET=1 Triton's on the smallest shapes, and a few of the repeats.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastpool
from benchmarks.case_results import Spread
from benchmarks.cases import SKEWED, Batch, Case, build
from benchmarks.gpu import Gpu
from benchmarks.providers import INPUT_LAYOUTS as WAYS
from benchmarks.providers import Call
from benchmarks.timing_cuda import Cuda, copies_of, eager_turn, seconds_of, time_calls
from fastpool.backends import triton
from fastpool.testing import LAYOUTS, function_of, gradients, moved, required, same_bits, sequences, special_values

BACKENDS = ("native", "triton")
_SMALL = 1 << 17  # elements that the interpreter pools within a second or so


@dataclass(frozen=True)
class Shape:
    """A batch whose pooling takes a way through the kernels of its own."""

    name: str
    mode: str
    layout: str
    lengths: Sequence[int]
    width: int
    dtype: torch.dtype = torch.bfloat16
    given: str | None = None
    holes: bool = False

    @property
    def small(self) -> bool:
        return sum(self.lengths) * self.width <= _SMALL

    def arguments(self) -> dict[str, Any]:
        made = sequences([*self.lengths], self.width, self.dtype, holes=self.holes)
        return LAYOUTS[self.layout].make(made, self.given)


SHAPES = (
    Shape("whole", "mean", "padded_right_mask", [16, 3, 0, 11], 384),
    Shape("whole, from the left", "last", "padded_left_mask", [16, 3, 0, 11], 384),
    Shape("split, mask", "mean", "padded_right_mask", [700, 5000, 1, 0, 31], 1024),
    Shape("split, lengths", "max", "padded_lengths", [700, 5000, 1, 0, 31], 768, torch.float16),
    Shape("search", "mean", "packed", [700, 5000, 1, 0, 31, 8192] + [8] * 200, 1024),
    Shape("search, holes", "weighted_mean", "packed_mask", [700, 2000, 1, 0, 31], 130, torch.float32, "weights", True),
    Shape("deep tree", "mean", "packed", [32 * 8 * 8 * 8 + 5, 3], 64),
    Shape("one wide text", "mean", "padded_lengths", [3000], 4096),
    Shape("strips", "mean", "packed", [300, 3], 20000),
    Shape("strips of float64", "sum", "padded_middle_strided", [300, 40], 1100, torch.float64),
    Shape("any order", "mean_sqrt_len", "packed_shuffled", [700, 64, 33, 5], 200, torch.float32),
    Shape("one token", "cls", "packed", [700, 64, 1, 5], 768),
    Shape("nested", "weighted_mean", "nested", [300, 1, 77], 96, torch.float16, "weights"),
    Shape("scores", "softmax_mean", "padded_left_mask", [16, 3, 0, 11], 384, torch.bfloat16, "scores"),
    Shape("scores, search", "softmax_mean", "packed_mask", [700, 2000, 1, 0, 31], 132, torch.float32, "scores", True),
    Shape("query", "attention", "padded_right_mask", [16, 3, 0, 11], 384, torch.bfloat16, "query"),
    Shape("query, split", "attention", "packed", [700, 5000, 1, 0, 31], 1024, torch.float16, "query"),
    Shape("logits", "splade_max_relu", "packed", [30, 3, 0], 30522),
    Shape("logits, twice", "splade_max_log1p_relu", "padded_right_mask", [30, 3, 0], 30528),
    Shape("sums of logits", "splade_sum_relu", "packed", [300, 3, 0], 8192),
    Shape("sums of logits, twice", "splade_sum_log1p_relu", "padded_lengths", [30, 3, 1], 1002, torch.float32),
)
# Segments that are split, by a search and by counting; and many that are barely.
REPEATED = (
    Shape("few", "mean", "packed", [5000, 1, 3000, 700, 8, 8], 512),
    Shape("long", "mean", "padded_lengths", [8192] * 3, 1024),
    Shape("many", "mean", "packed", [300] * 64, 256),
)
SPEEDS = (Case(512, 64, 1024), Case(32768, 1, 4096), Case(16, 32, 384), Case(512, 64, 768), Case(SKEWED, 256, 1024))
_ROUNDS = 9
_PADDED_BYTES = 1 << 30  # a batch that is mostly padding is timed as packed alone


@dataclass
class Findings:
    """What was found so far, each printed at once."""

    device: str
    wrong: int = 0
    started: float = field(default_factory=time.monotonic)

    def say(self, *words: object) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s]", *words, flush=True)

    def check(self, ok: bool, *words: object) -> None:
        self.wrong += not ok
        self.say("ok   " if ok else "WRONG", *words)

    def attempt(self, step: Callable[[], None], *words: object) -> None:
        """A step that may break, and then is wrong. Once the device is lost nothing more can be said."""
        try:
            step()
        except Exception as error:
            self.wrong += 1
            self.say("FAILS", *words, "".join(traceback.format_exception_only(error)).strip()[:600])
            if self.on_gpu and not _answers():
                self.say("the device is lost")
                raise SystemExit(2) from error

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def there(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: moved(value, self.device) for name, value in arguments.items()}


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _interpreted(backend: str) -> bool:
    return backend == "triton" and triton.INTERPRETED


def pool(backend: str, mode: str, arguments: dict[str, Any]) -> Tensor:
    function: Callable[..., Tensor] = function_of(mode)
    with fastpool.backend(backend):
        return function(**arguments, normalize=True)


# ---- the same bits


def bits(found: Findings, backend: str) -> None:
    for shape in SHAPES:
        if _interpreted(backend) and not shape.small:
            continue
        found.attempt(partial(_forward, found, backend, shape), backend, shape.name)
        found.attempt(partial(_gradients, found, backend, shape), backend, shape.name, "gradients")
    for mode in ("mean", "max", "sum", "softmax_mean", "attention"):
        found.attempt(partial(_special, found, backend, mode), backend, "special values", mode)
    found.attempt(partial(_own_sizes, found, backend), backend, "l2_normalize with truncate_dims")


def _forward(found: Findings, backend: str, shape: Shape) -> None:
    arguments = shape.arguments()
    expected = pool("native", shape.mode, arguments)
    there = found.there(arguments)
    began = time.monotonic()
    result = pool(backend, shape.mode, there).cpu()
    took = f"first call {1e3 * (time.monotonic() - began):.0f} ms"
    found.check(same_bits(result, expected), backend, shape.name, shape.mode, took + _apart(result, expected))


def _apart(result: Tensor, expected: Tensor) -> str:
    """By how much, and where: a wrong unit shows as one row, a wrong epilogue in all."""
    rows = [i for i in range(len(expected)) if not same_bits(result[i], expected[i])]
    if not rows:
        return ""
    largest = (result.double() - expected.double()).abs().max()
    return f"; {len(rows)} of {len(expected)} rows differ, {rows[:8]}, by {largest:.3g} at most"


def _gradients(found: Findings, backend: str, shape: Shape) -> None:
    arguments = shape.arguments()
    function: Callable[..., Tensor] = function_of(shape.mode)
    both = []
    for name, given in (("native", arguments), (backend, found.there(arguments))):
        with fastpool.backend(name):
            with torch.no_grad():
                result = function(**given, normalize=True)
            gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(4)).to(result)
            both.append([one.cpu() for one in gradients(function, given, gradient, normalize=True)])
    same = all(same_bits(one, other) for one, other in zip(*both, strict=True))
    found.check(same, backend, shape.name, shape.mode, "gradients")


def _special(found: Findings, backend: str, mode: str) -> None:
    hidden = special_values(6, 40 if _interpreted(backend) else 300, 90)
    arguments = {"hidden": hidden, **required(mode, hidden.shape)}
    expected, result = pool("native", mode, arguments), pool(backend, mode, found.there(arguments)).cpu()
    found.check(same_bits(result, expected), backend, "special values", mode + _apart(result, expected))


def _own_sizes(found: Findings, backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9 if _interpreted(backend) else 300, 1024, generator=generator).bfloat16()
    truncate_dims = torch.randint(0, 1025, (len(x),), generator=generator)
    results = []
    for name, given in (
        ("native", {"x": x, "truncate_dims": truncate_dims}),
        (backend, found.there({"x": x, "truncate_dims": truncate_dims})),
    ):
        with fastpool.backend(name):
            results.append(fastpool.l2_normalize(**given).cpu())
    found.check(same_bits(*results), backend, "l2_normalize with truncate_dims")


# ---- again and again


@dataclass
class Repeated:
    """A call whose results are counted where they differ, without waiting for any."""

    found: Findings
    backend: str
    shape: Shape

    def __post_init__(self) -> None:
        arguments = self.shape.arguments()
        self.expected = pool("native", self.shape.mode, arguments).to(self.found.device)
        self.there = self.found.there(arguments)
        self.differ = torch.zeros((), dtype=torch.int64, device=self.found.device)
        self.calls = 0

    def call(self) -> Tensor:
        return pool(self.backend, self.shape.mode, self.there)

    def count(self, result: Tensor) -> None:
        self.calls += 1
        self.differ += (result.view(torch.int16) != self.expected.view(torch.int16)).any()

    def tell(self, *words: object) -> None:
        differ = int(self.differ)
        self.found.check(differ == 0, self.backend, self.shape.name, *words, f"{differ} of {self.calls} differ")


def repeat(found: Findings, backend: str) -> None:
    """Split segments: the memory ordering of the arrival trees, and their counters."""
    for shape in REPEATED:
        if _interpreted(backend):
            continue  # it runs one program after another: test_triton.py has its orders
        one = Repeated(found, backend, shape)
        found.attempt(partial(_beside_other_work, one), backend, shape.name, "repeated")
    if not found.on_gpu:
        found.say("     ", backend, "cu_seqlens that decrease, streams and graphs need a GPU")
        return
    found.attempt(partial(_after_bad_bounds, found, backend), backend, "after cu_seqlens that decrease")
    found.attempt(partial(_two_streams, found, backend), backend, "on two streams in turn")
    found.attempt(partial(_graph_beside_calls, found, backend), backend, "a graph beside calls")


def _beside_other_work(one: Repeated) -> None:
    on_gpu = one.found.on_gpu
    noise = torch.randn(1 << 24 if on_gpu else 1, device=one.found.device)
    side = torch.cuda.Stream() if on_gpu else None
    for i in range(400 if on_gpu else 3):
        if i % 2:
            with torch.cuda.stream(side):
                noise.mul_(1.0001)
        one.count(one.call())
    one.tell("repeated:")


def _after_bad_bounds(found: Findings, backend: str) -> None:
    """No result is promised for cu_seqlens that decrease, but the next call is right."""
    for shape in (REPEATED[0], REPEATED[2]):
        one = Repeated(found, backend, shape)
        good = one.there["cu_seqlens"]
        for i in range(50):
            bad = good.flip(0) if i % 2 else good.roll(i % len(good))
            pool(backend, shape.mode, {**one.there, "cu_seqlens": bad})
            one.count(one.call())
        one.tell("after cu_seqlens that decrease:")


def _two_streams(found: Findings, backend: str) -> None:
    both = [Repeated(found, backend, shape) for shape in (REPEATED[0], REPEATED[1])]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    for _ in range(100):
        for one, stream in zip(both, streams, strict=True):
            with torch.cuda.stream(stream):
                one.count(one.call())
    torch.cuda.synchronize()
    for one in both:
        one.tell("on two streams in turn:")


def _graph_beside_calls(found: Findings, backend: str) -> None:
    """Captured on one stream, replayed on another, while the calls of a third find counters of their own."""
    captured, beside = Repeated(found, backend, REPEATED[0]), Repeated(found, backend, REPEATED[2])
    captured.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [captured.call(), captured.call()]
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    for _ in range(100):
        with torch.cuda.stream(other):
            for result in results:
                result.fill_(torch.nan)
            graph.replay()
            for result in results:
                captured.count(result)
        beside.count(beside.call())
    torch.cuda.synchronize()
    captured.tell("in a graph on another stream:")
    beside.tell("beside a graph:")


# ---- how fast


def share(nbytes: int, us: float, gb_per_s: float) -> float:
    """The rate at which these bytes are read, as a share of another rate."""
    return nbytes / us / 1e3 / gb_per_s


def speed(found: Findings, backends: Sequence[str], gpu: Gpu) -> None:
    """Cold calls in a graph, as a share of the fastest read-only stream; calls from Python, one after another, and what
    one costs the host. In a graph, a call that splits segments clears its counters by a launch of its own."""
    rates, empty = Cuda(gpu, _ROUNDS).limits()
    for reader, rate in rates.items():
        found.say(f"      read-only stream, {reader}: {rate:.0f} GB/s")
    found.say("      an empty kernel:", ", ".join(f"{name} {one.median:.2f} us" for name, one in empty.items()))
    for case in SPEEDS:
        batches = copies_of(build(case, gpu.device), gpu)
        for backend, (name, (layout, way)) in product(backends, WAYS.items()):
            if layout == "packed" or not _mostly_padding(case):
                what = f"{case.name}, {backend}, {name}:"
                with fastpool.backend(backend), torch.inference_mode():
                    found.attempt(partial(_speed, found, gpu, way, batches, max(rates.values()), what), what)
        del batches
        gpu.free()


def _speed(
    found: Findings, gpu: Gpu, way: Callable[[Batch, bool], Call], batches: list[Batch], rate: float, what: str
) -> None:
    calls = [way(one, True) for one in batches]
    us = time_calls(calls, gpu, _ROUNDS).median
    turn = eager_turn(gpu, "", calls, seconds_of(gpu, calls[0]), _ROUNDS)
    samples = [turn.sample() for _ in range(turn.rounds)]
    eager, host = (Spread.of([sample[column] for sample in samples]).median for column in ("eager", "host"))
    graph = f"{us:.1f} us in a graph, {100 * share(batches[0].real_bytes, us, rate):.0f} % of the stream"
    found.say(f"      {what} {graph}; eager {eager:.1f} us, host {host:.1f} us")


def _mostly_padding(case: Case) -> bool:
    return case.batch * max(case.lengths()) * case.width * 2 > _PADDED_BYTES


PARTS = ("bits", "repeat", "speed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=os.environ.get("SMOKE_DEVICE", "cuda"))
    asked = parser.parse_args(arguments)
    found = Findings(asked.device)
    for part in asked.parts or PARTS:
        if part == "speed":
            if found.on_gpu:
                speed(found, asked.backends, Gpu())
            continue
        for backend in asked.backends:
            {"bits": bits, "repeat": repeat}[part](found, backend)
    found.say(f"{found.wrong} wrong")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
