"""The quick cases under pytest-benchmark: pytest benchmarks/ --benchmark-only, and --benchmark-compare across commits.

Data are as warm as a loop leaves them, on one CPU thread: good for comparing a change with itself. What pooling costs
on data that come from memory is what run.py measures.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastpool
from benchmarks.case_results import WRONG_BEYOND
from benchmarks.cases import SHAPES, Batch, Case, build, exact, relative_error
from benchmarks.measure import skipped
from benchmarks.providers import COMPILED, FASTPOOL, PROVIDERS, Call, Provider, backend_of

pytest.importorskip("pytest_benchmark")

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MAIN = {"cpu": ("native",), "cuda": ("triton", "native")}[_DEVICE]
_PEERS = ("sentence-transformers", "torch.compile", "bmm", "embedding_bag", "vLLM")
# Of the padded batch: skewed lengths would take longer than everything else together.
_MOST_BYTES = {"cpu": 150e6, "cuda": 10e9}[_DEVICE]
_CASES = [
    case for case in SHAPES if case.quick and _DEVICE in case.devices and skipped(case).padded_bytes <= _MOST_BYTES
]
_PROVIDERS = [one for one in PROVIDERS if (one in FASTPOOL and one.backend in _MAIN) or one.name in _PEERS]
# On a CPU the thread's own time, in which other processes count as little as they can.
_TIMER = time.perf_counter if _DEVICE == "cuda" else time.thread_time


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def batch(case: Case) -> Batch:
    return build(case, _DEVICE)


@pytest.fixture(scope="module")
def expected(batch: Batch) -> torch.Tensor:
    return exact(batch)


def _until_done(call: Call) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        result = call()
        torch.cuda.synchronize()
        return result

    return run if _DEVICE == "cuda" else call


@pytest.mark.benchmark(timer=_TIMER, max_time=0.2, min_rounds=3, warmup=False)
@pytest.mark.parametrize("provider", _PROVIDERS, ids=lambda provider: provider.name)
@torch.inference_mode()
def test_speed(benchmark: Any, case: Case, batch: Batch, expected: torch.Tensor, provider: Provider) -> None:
    if provider is COMPILED:
        torch.compiler.reset()  # each shape is compiled for itself
    with fastpool.backend(provider.backend):
        if reason := backend_of(provider, batch)[1]:
            pytest.skip(reason)  # a backend that is not built here has no time
        call = _until_done(provider.prepare(batch, True))
        error = relative_error(call(), expected)  # which warms up, too
        if not error <= WRONG_BEYOND[case.dtype]:
            assert provider not in FASTPOOL, f"a relative error of {error:.1e}"
            # What is wrong has no time; the error stands in run.py's table.
            pytest.skip(f"wrong: a relative error of {error:.1e}")
        benchmark.group = case.name
        benchmark.extra_info |= {"real_bytes": batch.real_bytes, "relative_error": error}
        benchmark(call)
    if benchmark.stats is not None:  # there are none with --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = batch.real_bytes / benchmark.stats["median"] / 1e9
