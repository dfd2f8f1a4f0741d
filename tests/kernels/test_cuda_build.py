"""What nvcc made of the CUDA kernels, as far as it shows without a GPU: for which GPUs, registers and spills, wide
loads that come together, no contraction, nothing linked that not every torch has."""

import os
import re
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from fastpool.backends import native
from fastpool.modes import Reduce, Weight

LIBRARY = native.LIBRARY.with_name("libfastpool_cuda.so")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
# Without nvcc there is no CUDA library to look at.
pytestmark = [pytest.mark.gpu_machine, pytest.mark.skipif(NVCC is None, reason="no nvcc here")]
SOFTMAX = f"WeightE{Weight.SCORE.value}"  # in a kernel's name
AUDIT = Path(sys.executable).parent / "torch-abi-audit"


def said(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    import triton  # brings NVIDIA's binary tools

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assert NVCC is not None
    found = shutil.which("cuobjdump", path=f"{folder}:{Path(NVCC).parent}:{os.environ['PATH']}")
    assert found is not None
    return found


def test_is_built_for_every_gpu(cuobjdump: str) -> None:
    report = native.build_report()["cuda"]
    assert LIBRARY.exists(), report["reason"]
    assert native.info is not None
    version = re.search(r"release (\d+)\.(\d+)", said(NVCC, "--version"))
    assert version is not None
    known = "80,86,89,90,100,120" if (int(version[1]), int(version[2])) >= (12, 8) else "80,86,89,90"
    wanted = report["architectures"] or known
    assert native.info.cuda_architectures == wanted
    built = re.findall(r"\.sm_(\d+)\.cubin", said(cuobjdump, "-lelf", LIBRARY))
    files = 6  # a dtype each, token outputs, and the counters that stay on a GPU
    assert sorted(built) == sorted(wanted.split(",") * files)
    translatable = re.findall(r"\.sm_(\d+)\.ptx", said(cuobjdump, "-lptx", LIBRARY))
    assert translatable == wanted.split(",")[:1] * files
    assert LIBRARY.stat().st_size < 10e6


def test_nothing_spills(cuobjdump: str) -> None:
    kernels = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        said(cuobjdump, "--dump-resource-usage", LIBRARY),
    )
    assert native.info is not None
    # Per dtype: four kinds of states, logits activated once and twice, states of several queries, the gradient of a
    # query, one token, and for gradients the shares and the maxima, each with wide loads and with narrow ones; the
    # gradient of weights or scores, and that of hidden by its products with queries; the norm and its gradient;
    # buckets, tanh and bits; token outputs and their gradient. Per accumulator what prepares gradients. Three that
    # find tokens.
    assert len(kernels) == (4 * (2 * 11 + 9) + 2 + 3) * len(native.info.cuda_architectures.split(","))
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        # Two blocks of 256 threads on a multiprocessor, four of those that are all latency, or three in wide dtypes;
        # and of what multiplies by queries, whose pieces on their way take registers, two, in float64 one.
        one = re.search(f"reduce_kernelId.*(QueryGradientState|{SOFTMAX})", name)
        two = re.search("reduce_kernel|scatter_attention", name)
        three = re.search("normalize_backward_kernelId|scatter_weight_gradient_kernelI[fd]", name)
        most = 255 if one else 128 if two else 80 if three else 64
        assert int(registers) <= most, name


def machine_code(cuobjdump: str) -> dict[str, list[str]]:
    """The operations of each kernel, for one kind of GPU."""
    assert native.info is not None
    architectures = native.info.cuda_architectures.split(",")
    one = "90" if "90" in architectures else architectures[0]
    kernels = said(cuobjdump, "-sass", "-arch", f"sm_{one}", LIBRARY).split("Function : ")[1:]
    operation = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
    return {kernel.split("\n", 1)[0]: operation.findall(kernel) for kernel in kernels}


def test_loads_are_wide_and_come_together(cuobjdump: str) -> None:
    """Eight rows of 16 bytes are on their way before anything is done with the first; not of activated logits, where
    arithmetic takes the time."""
    seen = 0
    for name, code in machine_code(cuobjdump).items():
        state = re.search(
            r"reduce_kernelI\w*(?:ReduceE(\d)ELNS_10ActivationE0EE|QueryGradientState)ELi(\d+)ELi(\d+)E", name
        )
        # By queries, for which eight pieces of tokens are loaded before, and parts of a query; and looks at scales.
        # That takes registers: in 16 bits one or two of the eight rows may be loaded behind a first product.
        multiplies = SOFTMAX in name or "QueryGradientState" in name
        # A maximum of float64 works on predicates, of which there are too few; it has one to four loads on their way.
        # So has what multiplies by queries in float64.
        if state is None or state[2] == "1":
            continue
        if "reduce_kernelId" in name and (multiplies or state[1] == str(Reduce.MAX.value)):
            continue
        arithmetic = ("FADD", "DADD", "FMUL", "DMUL", *(() if multiplies else ("FSETP", "DSETP")))
        loads = [op for op in code if op.startswith(("LDG.E.128", *arithmetic))]
        runs = [len(list(run)) for is_load, run in groupby(loads, lambda op: op.startswith("LDG")) if is_load]
        least = 6 if SOFTMAX in name and not re.search("reduce_kernelI[fd]", name) else 8
        if state[3] != "1":  # the sums of several queries leave registers for four rows
            least = 4
        assert {*range(least, 9)} & {*runs} if multiplies else runs == [8], (name, runs)
        seen += 1
    assert seen == 4 * 6 - 4


def test_gradients_are_written_16_bytes_at_a_time(cuobjdump: str) -> None:
    """Once for every row, whatever it holds."""
    stores = {
        name: [op for op in code if op.startswith(("STG", "ST."))]
        for name, code in machine_code(cuobjdump).items()
        if re.search(r"scatter_gradient_kernelI\w*Li(2|4|8)E", name)
    }
    assert len(stores) == 4
    for name, found in stores.items():
        assert len(found) == 1, name
        assert found[0].startswith("STG.E.128"), name


def test_arrivals_are_ordered_once(cuobjdump: str) -> None:
    """By the atomic that counts them. What other blocks wrote is read past the first-level cache."""
    kernels = [code for code in said(cuobjdump, "-ptx", LIBRARY).split(".entry ")[1:] if "reduce_kernel" in code[:99]]
    assert len(kernels) == 4 * 8 * 2
    for code in kernels:
        name = code.split("(", 1)[0]
        ordered = re.findall(r"\b(?:atom|red|fence|membar|ld|st)\.[a-z0-9_.:]*(?:acq|rel|sc|gpu|sys)[a-z0-9_.:]*", code)
        assert ordered == ["atom.acq_rel.gpu.global.add.s32"], (name, ordered)
        children = re.findall(r"\bld\.global\.cg\.", code)
        weights, exponents = f"WeightE{Weight.TOKEN.value}" in name, SOFTMAX in name
        of_each = 4 if exponents else 3 if weights else 2  # counts, sums, and maybe weights and exponents
        assert len(children) == 8 * of_each, name
        assert not re.search(r"\b(?:fence|membar)\b", code), name
    for name, operations in machine_code(cuobjdump).items():
        if "reduce_kernel" in name:
            assert not [op for op in operations if op.startswith("MEMBAR.SC")], name


def test_nothing_is_contracted(cuobjdump: str) -> None:
    """Every product and sum asks for a rounding of its own, which ptxas keeps; division and root are IEEE's, and so are
    the smallest numbers. (Machine code has fused operations all the same, inside a division.)"""
    ptx = said(cuobjdump, "-ptx", LIBRARY)
    assert not re.findall(r"\b\w+\.[a-z0-9.]*(?:ftz|approx)\b|\bdiv\.full\b|\bfma\.", ptx)
    found = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp|rsqrt)\.[a-z0-9.]*f(?:16|32|64)\b", ptx))
    assert found == {f"{op}.rn.{kind}" for op in ("mul", "add", "sub", "div", "sqrt") for kind in ("f32", "f64")}


@pytest.mark.skipif(
    not AUDIT.exists() and os.environ.get("CI") != "true",
    reason="torch-abi-audit is not installed: a machine with a GPU need not have it, CI must",
)
def test_uses_the_stable_abi_alone() -> None:
    audit = subprocess.run([str(AUDIT), str(LIBRARY)], capture_output=True, text=True)
    assert "unstable=0" in audit.stdout, audit.stdout + audit.stderr
    assert "min-torch=2.10.0" in audit.stdout


def test_links_only_what_every_torch_has() -> None:
    dynamic = said("readelf", "-d", LIBRARY)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert {"libfastpool.so", "libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if "cuda" in name]  # the runtime is inside
    assert re.search(r"(RUNPATH|RPATH).*\[\$ORIGIN\]", dynamic)
    exported = said("nm", "-D", "--defined-only", "--demangle", LIBRARY)
    assert "cudaLaunch" not in exported
