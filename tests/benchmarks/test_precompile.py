"""Triton programs that are compiled before a GPU is asked anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_COUNT = """
import sys, torch
from pathlib import Path
from benchmarks import precompile
from fastpool.calls import PoolCall
from fastpool.triton_kernels import run
from fastpool.triton_kernels.launch import settle_cache_keys
from triton import knobs

asked = []
knobs.runtime.jit_cache_hook = None
knobs.compilation.listener = lambda *, src, metadata, metadata_group, times, cache_hit: asked.append(cache_hit)


def warm(one):
    settle_cache_keys()  # as a launch does
    one.kernel.warmup(**one.arguments, **one.options, grid=one.grid)


precompile.instead_of_launching(precompile.Gpu.here(), warm)
hidden, cu = torch.randn(640, 128).bfloat16(), torch.tensor([0, 600, 640], dtype=torch.int32)
run.pool(PoolCall("mean", hidden, cu_seqlens=cu, normalize=True))
run.pool(PoolCall("max", torch.randn(2, 320, 128).bfloat16(), ends=torch.tensor([3, 300]), normalize=True))
print(*asked)
"""

_PLAN = """
import sys, torch
from benchmarks import precompile
from fastpool.calls import PoolCall
from fastpool.triton_kernels import run


def calls():
    empty = precompile.empty
    packed, cu = empty(640, 128, dtype=torch.bfloat16), empty(3, dtype=torch.int32)
    run.pool(PoolCall("mean", packed, cu_seqlens=cu, normalize=True))
    padded, ends = empty(2, 320, 128, dtype=torch.bfloat16), empty(2, dtype=torch.int64)
    run.pool(PoolCall("max", padded, ends=ends, normalize=True))


if __name__ == "__main__":
    compilers = precompile.compile_calls([calls, calls], jobs=2)
    sys.exit(precompile.tell("two calls", compilers, 0))
"""


def said(tmp_path: Path, *command: str) -> str:
    """By a process with Triton's cache, and nothing interpreted."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_calls_find_what_was_compiled_for_them(tmp_path: Path) -> None:
    """Planned on tensors without data by two processes at once, each program compiled once; then, in another process
    and with tensors that have data, every one is found under the key that the call looks for."""
    pytest.importorskip("triton")  # there is no Triton for every platform
    program = tmp_path / "plan.py"
    program.write_text(_PLAN)
    assert "precompiled 2 programs for two calls" in said(tmp_path, str(program))
    files = sorted((tmp_path / "cache").rglob("*.cubin"))
    assert len(files) == 2
    assert said(tmp_path, "-c", _COUNT).split() == ["True", "True"]
    assert sorted((tmp_path / "cache").rglob("*.cubin")) == files


_KEYS = """
import sys, torch
from fastpool.triton_kernels import aot, backward, normalize, plan, pool, targets
from fastpool.calls import PoolCall

device, hidden, x = plan.DeviceProperties("test", 132), torch.zeros(4, 50, 64), torch.zeros(4, 64)
launches = {
    "mean": plan.plan_pool(PoolCall("mean", hidden), device),
    "l2_normalize": plan.plan_normalize(x, 1e-12, x, device),
}


class Stopped(Exception):
    pass


class Kernel:  # asks for its key as Triton does, and no more
    def __init__(self, kernel):
        self.kernel = kernel

    def warmup(self, *args, **options):
        self.kernel.cache_key
        raise Stopped

    def __getitem__(self, grid):
        return self.warmup


one = launches[sys.argv[1]]
one.kernel = Kernel(one.kernel)
try:
    if sys.argv[2] == "launched":
        one.run()
    else:
        aot.compile_variant(aot.Variant("", one, ()), targets.parse_target("cuda:90"))
except Stopped:
    kernels = (pool.pool_kernel, normalize.normalize_kernel)
    kernels += (backward.segment_prologue_kernel, backward.scatter_gradient_kernel)
    print(*(kernel.cache_key for kernel in kernels))
"""


def test_keys_do_not_depend_on_what_is_called_first(tmp_path: Path) -> None:
    """Nor on whether it is launched or compiled beforehand: Triton's own do."""
    pytest.importorskip("triton")  # likewise
    keys = {
        said(tmp_path, "-c", _KEYS, first, how) for first in ("mean", "l2_normalize") for how in ("launched", "aot")
    }
    assert len(keys) == 1
    assert len(keys.pop().split()) == 4


def test_what_gpu_tests_call_is_compiled(tmp_path: Path) -> None:
    """By a run of the tests themselves, which need no GPU for it."""
    pytest.importorskip("triton")  # likewise
    one = "test_rows_wider_than_a_program and triton"
    told = said(tmp_path, "-m", "benchmarks.precompile", "tests", "--jobs", "1", "--", "-k", one)
    assert "precompiled 2 programs for tests" in told  # strips, and the norm over them
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 2


_CHEAP = """
import torch
from benchmarks import gpu_smoke, precompile

for shape in gpu_smoke.SHAPES + gpu_smoke.REPEATED:
    right = shape.arguments()
    gpu_smoke.sequences, kept = precompile.cheap, gpu_smoke.sequences
    cheap = shape.arguments()
    gpu_smoke.sequences = kept
    assert cheap.keys() == right.keys(), shape
    for one, other in zip(right.values(), cheap.values()):
        if one.is_nested:
            assert torch.equal(one.offsets(), other.offsets()), shape
            one, other = one.values(), other.values()
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), shape
        assert one.dtype not in (torch.int32, torch.int64) or torch.equal(one, other), shape
"""


def test_what_is_planned_are_the_batches_of_the_smoke_test(tmp_path: Path) -> None:
    """Made without their numbers."""
    pytest.importorskip("triton")  # likewise
    said(tmp_path, "-c", _CHEAP)


_TUNE = """
import sys, torch
from benchmarks import gpu, precompile, tune
from fastpool.triton_kernels import plan, run


class Stopped(Exception):
    pass


def stop():
    raise Stopped


here = precompile.Gpu.here()
precompile.Gpu.here = staticmethod(lambda: here)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA H100 80GB HBM3"
gpu.Gpu = stop
if __name__ == "__main__":
    sys.argv = ["tune.py", "--filter", "16 B1 H384", "--out", sys.argv[1]]
    try:
        tune.main()
    except Stopped:
        print("stopped")
"""


def test_the_tuner_gets_as_far_as_the_gpu(tmp_path: Path) -> None:
    """Of a case that is not tuned it compiles what the heuristic takes, and nothing else."""
    pytest.importorskip("triton")  # likewise
    program = tmp_path / "tune_it.py"
    program.write_text(_TUNE)
    told = said(tmp_path, str(program), str(tmp_path / "tuned.json"))
    assert "precompiled 1 programs for 1 cases" in told
    assert told.endswith("stopped\n")
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 1
