"""Compiles on all cores, without the GPU, the Triton programs that its first minutes ask for, into Triton's cache.

    python -m benchmarks.precompile PART... [--jobs N]

smoke figures     for gpu_smoke.py, and for every case of run.py (quick: for those of run.py --quick)
modes             for gpu_modes.py
tune tune-all     for tune.py's short list, and for all that it may try
tests -- -k bf16  for the GPU tests, or those that pytest's own options choose
--jobs 12         on so many processes

Where torch sees no GPU, for an H100. What is compiled is what calls ask for: calls are made, for tensors of the same
shapes, and planned as for the GPU by the same code, but a launch is only compiled, under Triton's own key. Each process
makes all calls, and compiles the programs that no other one has taken. As a pytest plugin (-p benchmarks.precompile) it
does so with the calls of tests, which get their results from `native`. Not compiled here is what tests ask for in
processes of their own (test_validation_where_asked, test_after_a_launch_that_failed), what torch.compile makes of them,
and what those ask for that need much memory.
"""

import argparse
import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

# Before Triton's kernels are imported: a precompiled program is not an interpreted one.
os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from benchmarks import ROOT, bandwidth_gpu, gpu_modes, tune
from benchmarks.cases import CASES, DTYPES, Case
from benchmarks.gpu_stages import GPU_TESTS, MARKED, workers
from benchmarks.machine import cores
from benchmarks.staging import die_with_parent
from fastpool import dispatch
from fastpool.backends import native
from fastpool.calls import Call, PoolCall
from fastpool.testing import Sequence as Text
from fastpool.testing import sequences
from fastpool.triton_kernels import aot, run
from fastpool.triton_kernels.config import candidates, slug
from fastpool.triton_kernels.launch import Launch, settle_cache_keys
from fastpool.triton_kernels.plan import DeviceProperties, device_of

TESTS = ROOT / "tests"
_SHARED = "FASTPOOL_PRECOMPILE"  # a folder for all processes of a run: which process compiles what, and what came of it


@dataclass(frozen=True)
class Gpu:
    """What programs are planned and compiled for."""

    device: DeviceProperties
    target: GPUTarget

    @staticmethod
    def here() -> "Gpu":
        """The one that torch sees, or an H100."""
        if not torch.cuda.is_available():
            return Gpu(DeviceProperties(slug("NVIDIA H100 80GB HBM3"), 132), GPUTarget("cuda", 90, 32))
        major, minor = torch.cuda.get_device_capability()
        return Gpu(device_of(torch.device("cuda", 0)), GPUTarget("cuda", 10 * major + minor, 32))


def instead_of_launching(gpu: Gpu, compile_only: Callable[[Launch], None]) -> None:
    """From here on this process plans as on that GPU, and hands its launches over. All that is known here of how a
    launch comes about."""
    driver.set_active(aot._Nowhere(gpu.target))
    run.device_of = lambda device: gpu.device  # type: ignore[assignment]  # in its place
    Launch.run = lambda one: compile_only(one)  # type: ignore[method-assign, assignment]  # in its place


@dataclass
class Compiler:
    """One process of many, which share a folder."""

    shared: Path
    compiled: int = 0
    failed: list[str] = field(default_factory=list)
    _asked: bool = False  # whether the launch at hand is the first of its program

    def __post_init__(self) -> None:
        knobs.runtime.jit_cache_hook = self._taken

    def _taken(self, *, key: str, fn: Any, **_: Any) -> bool:
        """Triton asks before it compiles a program that this process has not; whether another one does."""
        name = sha256(f"{fn.name} {key}".encode()).hexdigest()
        try:
            (self.shared / name).touch(exist_ok=False)
        except FileExistsError:
            return True
        self._asked = True
        return False

    def __call__(self, one: Launch) -> None:
        self._asked = False
        try:
            settle_cache_keys()
            compiled = one.kernel.warmup(**one.arguments, **one.options, grid=one.grid)
            if self._asked:
                launcher(compiled)
                self.compiled += 1
        except Exception as error:  # whatever it is, the others are still to be compiled
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            self.failed.append(f"{aot.kernel_name(one)}: {type(error).__name__}: {lines[-1]}")


@cache
def no_launchers() -> str:
    """Why the C functions that launch programs cannot be compiled here, which some Tritons do for each signature; or
    nothing."""
    if not hasattr(nvidia, "make_launcher"):
        return "this Triton compiles none"
    try:
        nvidia.libcuda_dirs()
    except AssertionError:
        return "there is no libcuda.so.1"
    nvidia.CudaUtils()  # which a launch needs besides
    return ""


def launcher(compiled: Any) -> None:
    """Compiles what launches a program."""
    if not no_launchers():
        nvidia.CudaLauncher(compiled.src, compiled.metadata)


class StandIn:
    """The Triton backend, for CPU tensors too: calls are planned, launches handed over, and results are native's."""

    @staticmethod
    def supports(call: Call) -> None:
        return None

    def __getattr__(self, kernel: str) -> Callable[[Any], Tensor]:
        def planned(call: Any) -> Tensor:
            getattr(run, kernel)(call)
            result: Tensor = getattr(native, kernel)(call)
            return result

        return planned


def stand_in(gpu: Gpu, shared: Path) -> Compiler:
    """Makes this process one that compiles."""
    compiler = Compiler(shared)
    instead_of_launching(gpu, compiler)
    dispatch.BACKENDS["triton"] = StandIn()  # type: ignore[assignment]  # no module
    torch.set_num_threads(1)
    return compiler


# ---- whose calls


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Shapes are all that planning reads."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cheap(lengths: list[int], width: int, dtype: torch.dtype, holes: bool = False) -> list[Text]:
    """What testing.sequences makes, except that each row holds one number throughout: drawing them all takes a process
    longer than planning with them."""
    narrow = sequences(lengths, 1, dtype, holes)
    return [Text(one.states.expand(-1, width), one.real, one.weights) for one in narrow]


def smoke() -> None:
    from benchmarks import gpu_smoke

    with patch.object(gpu_smoke, "sequences", cheap):
        wrong = gpu_smoke.main(["bits", "repeat", "--device", "cpu", "--backends", "triton"])
    if wrong:
        raise RuntimeError("gpu_smoke.py fails where its calls are only planned: run it with SMOKE_DEVICE=cpu")
    for case in gpu_smoke.SPEEDS:
        plan_case(case)


def plan_case(case: Case) -> None:
    """A batch as the benchmarks spell it: with a mask, with lengths, packed. A text that is alone also twice, as
    measure.py looks for its bits in another batch."""
    lengths, dtype = case.lengths(), DTYPES[case.dtype]
    for batch in (lengths, lengths * 2) if len(lengths) == 1 else (lengths,):
        padded = empty(len(batch), case.rows or max(batch), case.width, dtype=dtype)
        packed = empty(sum(batch), case.width, dtype=dtype)
        mask, ends = empty(*padded.shape[:2], dtype=torch.int64), empty(len(batch), dtype=torch.int32)
        run.pool(PoolCall("mean", padded, mask, normalize=True))
        run.pool(PoolCall("mean", padded, ends=ends, normalize=True))
        run.pool(PoolCall("mean", packed, cu_seqlens=empty(len(batch) + 1, dtype=torch.int32), normalize=True))


def figures(quick: bool = False) -> None:
    for block, warps, _ in bandwidth_gpu.SHAPES:
        words, sums = empty(1 << 20, dtype=torch.int32), empty(1, dtype=torch.int64)
        fixed = {"count": words.numel(), "BLOCK": block}
        Launch(bandwidth_gpu.read_kernel, (1, 1, 1), {"words": words, "sums": sums}, fixed, {"num_warps": warps}).run()
    for case in CASES:
        if "cuda" in case.devices and (case.quick or not quick):
            plan_case(case)


def quick() -> None:
    figures(quick=True)


PARTS: dict[str, Callable[[], None]] = {
    "smoke": smoke,
    "figures": figures,
    "quick": quick,
    "modes": gpu_modes.plan,
    "tune": partial(tune.plan_calls, tune.SHORT_LIST, tune.near),
    "tune-all": partial(tune.plan_calls, tune.ALL, candidates),
}


# ---- on all cores


def _work(gpu: Gpu, shared: Path, calls: Sequence[Callable[[], None]]) -> Compiler:
    compiler = stand_in(gpu, shared)
    for one in calls:
        try:
            with redirect_stdout(io.StringIO()):
                one()
        except Exception as error:  # the calls of others are still to be made
            compiler.failed.append(f"{type(error).__name__}: {error}")
    return compiler


def compile_calls(calls: Sequence[Callable[[], None]], jobs: int) -> list[Compiler]:
    """Makes the calls of these functions, which a spawned process must be able to import, in so many processes."""
    with (
        tempfile.TemporaryDirectory() as shared,
        ProcessPoolExecutor(jobs, get_context("spawn"), die_with_parent) as pool,
    ):
        work = [pool.submit(_work, Gpu.here(), Path(shared), calls) for _ in range(jobs)]
        return [one.result() for one in work]


def compile_tests(options: Sequence[str], jobs: int) -> list[Compiler]:
    """The calls of the GPU tests."""
    with tempfile.TemporaryDirectory() as shared:
        (Path(shared) / "gpu").write_bytes(pickle.dumps(Gpu.here()))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=no",
            "-p",
            "benchmarks.precompile",
            "-p",
            "no:cacheprovider",
        ]
        command += [*workers(jobs), "-m", MARKED, *GPU_TESTS, *options]
        path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
        hidden = {"CUDA_VISIBLE_DEVICES": "", "FAIL_WITHOUT_CUDA": "0"}
        environment = {**os.environ, **hidden, "PYTHONPATH": path, _SHARED: shared}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=die_with_parent
        )
        if done.returncode not in (0, 1):  # tests that passed, and that failed for want of a GPU
            raise SystemExit(f"precompile.py: no tests were run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        compilers = [pickle.loads(one.read_bytes()) for one in Path(shared).glob("done-*")]
        processes = 1 + (jobs if workers(jobs) else 0)
        if len(compilers) < processes:  # what the others compiled is in the cache, but what they left out is unknown
            raise SystemExit(
                f"precompile.py: {processes - len(compilers)} of {processes} processes of the tests ended early:\n"
                f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return compilers


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Runs where this module is a pytest plugin, before the tests look for a GPU: torch says from then on that there is
    one, and takes whatever is asked of it."""
    torch.cuda.is_available = lambda: True
    for name in (
        "CUDAGraph",
        "Event",
        "Stream",
        "_sleep",
        "current_stream",
        "graph",
        "set_sync_debug_mode",
        "stream",
        "synchronize",
    ):
        setattr(torch.cuda, name, MagicMock())


def pytest_configure(config: pytest.Config) -> None:
    """Tests that find results wrong, or miss something else of a GPU, fail, and it does not matter here."""
    from helpers import on_gpu

    shared = Path(os.environ[_SHARED])
    config.stash[_COMPILER] = stand_in(pickle.loads((shared / "gpu").read_bytes()), shared)
    on_gpu.DEVICE = "cpu"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Before pytest-xdist says that a process has finished, which is then ended soon."""
    compiler = session.config.stash[_COMPILER]
    (compiler.shared / f"done-{os.getpid()}").write_bytes(pickle.dumps(compiler))


_COMPILER = pytest.StashKey[Compiler]()


def tell(what: str, compilers: Sequence[Compiler], seconds: float) -> int:
    """Prints what came of it; how many programs failed."""
    failed = list(dict.fromkeys(line for one in compilers for line in one.failed))
    for line in failed:
        print(f"FAILED {line}", flush=True)
    compiled, without = sum(one.compiled for one in compilers), no_launchers()
    launchers = f", no launchers ({without})" if without else ""
    print(
        f"precompiled {compiled} programs for {what}{launchers}: {seconds:.0f} s on {len(compilers)} processes, ",
        end="",
    )
    print(f"{len(failed)} failed", flush=True)
    return len(failed)


def main() -> int:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="+", choices=[*PARTS, "tests"], metavar="PART", help=", ".join([*PARTS, "tests"])
    )
    parser.add_argument("--jobs", type=int, default=cores())
    asked = parser.parse_args(words[:at])
    failed = 0
    parts = [part for part in asked.parts if part != "tests"]
    if parts:
        began = time.monotonic()
        compilers = compile_calls([PARTS[part] for part in parts], asked.jobs)
        failed += tell(" ".join(parts), compilers, time.monotonic() - began)
    if "tests" in asked.parts:
        began = time.monotonic()
        failed += tell("tests", compile_tests(words[at + 1 :], asked.jobs), time.monotonic() - began)
    return 1 if failed else 0


if __name__ == "__main__":
    from benchmarks import precompile  # by its name, under which other processes find its classes

    sys.exit(precompile.main())
