"""Compiles, without a GPU, every variant of the kernels that the heuristic can choose; `fastpool aot` prints them.

Launches are planned for tensors on torch's meta device and handed to Triton's own warm-up, so that what is compiled
here is what a server's first request would have compiled, under the same key of Triton's cache.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from ..segments import NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall, accumulator
from .config import LOAD_BYTES
from .launch import Launch
from .plan import Device, plan_normalize, plan_normalize_backward, plan_pool, plan_pool_backward

DIMS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 16384)
PROCESSORS = (108, 132, 148, 304)  # of an A100, an H100 or H200, a B200, an MI300X
# (batch, rows) that bring out every configuration of the heuristic; a test draws others and finds no more.
SHAPES = tuple(product((1, 8, 64, 1024), (16, 32, 64, 128, 256, 512, 1024, 4096, 32768)))


# What a kernel does with aligned rows, by LOAD_BYTES a thread.
WIDE = {
    "pool": ("load",),
    "normalize": ("load",),
    "prepare": (),
    "first_maximum": ("load",),
    "share": ("store",),
    "share_of_weights": ("load",),
    "normalize_backward": ("load", "store"),
}


@dataclass(frozen=True)
class Variant:
    """One machine program, and a launch that needs it."""

    name: str
    launch: Launch
    key: tuple[object, ...]

    @property
    def wide(self) -> tuple[str, ...]:
        """What has to be LOAD_BYTES wide."""
        return WIDE[kernel_name(self.launch)] if self.launch.arguments.get("VECTOR", 1) > 1 else ()


def kernel_name(launch: Launch) -> str:
    name: str = launch.kernel.fn.__name__
    return name.removesuffix("_kernel")


@dataclass(frozen=True)
class Report:
    """What a variant became on a target: registers of a thread, bytes of them spilled to memory, bytes of shared
    memory, bytes of a thread's widest load and widest store, of token states and their gradient where those are the
    widest; fused multiply-adds, which round once where the canonical order rounds twice (on AMD they cannot be told
    from those of a division)."""

    registers: int
    spills: int
    shared: int
    load: int
    store: int
    fused: int = 0

    def complaint(self, wide: Sequence[str]) -> str | None:
        """What is wrong with it, if anything. `wide`: what has to be LOAD_BYTES wide."""
        if self.spills:
            return f"{self.spills} bytes spilled"
        if self.fused:
            return f"{self.fused} multiply-adds are fused"
        for what in wide:
            if getattr(self, what) < LOAD_BYTES:
                return f"the widest {what} of aligned rows is {getattr(self, what)} bytes"
        return None


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls(mode: str, weighted: bool, dtype: torch.dtype, dim: int) -> Iterator[PoolCall]:
    """The usual spellings of every shape. What strides and lengths are does not matter, only what is there."""
    for batch, rows in SHAPES:
        index, cu = _empty(batch, dtype=torch.int64), _empty(batch + 1, dtype=torch.int32)
        padded, packed = _empty(batch, rows, dim, dtype=dtype), _empty(batch * rows, dim, dtype=dtype)
        weights = _empty(batch, rows, dtype=torch.float32) if weighted else None
        flat = None if weights is None else weights.view(-1)
        for normalize in (False, True):
            mask = _empty(batch, rows, dtype=torch.int64 if normalize else torch.bool)
            yield PoolCall(mode, padded, mask, weights=weights, normalize=normalize)
        yield PoolCall(mode, padded, ends=index, weights=weights, normalize=True)
        yield PoolCall(mode, packed, cu_seqlens=cu, weights=flat, normalize=True)
        yield PoolCall(mode, packed, starts=index, ends=index, weights=flat, normalize=True)


def _backward_calls(call: PoolCall) -> Iterator[PoolBackwardCall]:
    gradient = _empty(call.batch, call.hidden.shape[-1], dtype=accumulator(call.hidden.dtype))
    for of_weights in (False, True) if call.weights is not None else (False,):
        yield PoolBackwardCall(call, gradient, gradient, of_weights)


# A mode of every family; weights are one more argument.
FAMILY_MODES = (("mean", False), ("max", False), ("weighted_mean", False), ("weighted_mean", True))


def key_of(launch: Launch, what: str) -> tuple[object, ...]:
    """What makes a machine program: constants, types, warps, and `what` is given."""
    constants = tuple((k, v) for k, v in launch.arguments.items() if k.isupper())
    types = tuple(v.dtype for v in launch.arguments.values() if isinstance(v, Tensor))
    return what, types, constants, launch.options["num_warps"]


def variants(dtypes: Sequence[torch.dtype], dims: Sequence[int], lanes: int = 32, splits: bool = True) -> list[Variant]:
    """The machine programs that calls of these dtypes and widths come to: every configuration that the heuristic can
    choose, in every family and the usual spellings. Other types of indices and masks, other combinations
    of bounds, and a result of another dtype are programs of their own, which differ in a load, a comparison or a
    store."""
    found: dict[tuple[object, ...], Variant] = {}

    def add(launch: Launch, dtype: torch.dtype, what: str) -> None:
        constants = {k: int(v) for k, v in launch.arguments.items() if k.isupper()}
        shown = [f"{k.lower()}={constants[k]}" for k in ("COLUMNS", "LEAVES", "LEVELS", "SCAN") if k in constants]
        flags = [k.lower() for k in ("WHOLE", "NORMALIZE") if constants.get(k)]
        unaligned = ["unaligned"] if constants.get("VECTOR") == 1 else []
        name = [
            what,
            str(dtype).removeprefix("torch."),
            *shown,
            f"warps={launch.options['num_warps']}",
            *flags,
            *unaligned,
        ]
        key = key_of(launch, what)
        found.setdefault(key, Variant(" ".join(name), launch, key))

    for dtype, dim in product(dtypes, dims):
        for mode, weighted in FAMILY_MODES:
            for call in _calls(mode, weighted, dtype, dim):
                given = [
                    name for name in ("weights", "cu_seqlens", "starts", "ends") if getattr(call, name) is not None
                ]
                if call.mask is not None:
                    given.insert(0, f"{str(call.mask.dtype).removeprefix('torch.')} mask")
                spelled = f"({', '.join(given)})"
                for count in PROCESSORS:
                    add(plan_pool(call, Device("aot", count, lanes, splits)), dtype, mode + spelled)
                for backward in _backward_calls(call):
                    of = "weights" if backward.of_weights else "hidden"
                    for launch in plan_pool_backward(backward, Device("aot", 1, lanes)):
                        add(launch, dtype, f"gradient of {of} {kernel_name(launch)} {mode}{spelled}")
        x, one = _empty(1, dim, dtype=dtype), Device("aot", 1, lanes)
        for spelled, dims in (("", None), ("(dims)", _empty(1, dtype=torch.int32))):
            add(plan_normalize(x, 1e-12, x, one, dims), dtype, f"l2_normalize{spelled}")
            gradient = NormalizeBackwardCall(NormalizeCall(x, dims=dims), _empty(1, dim, dtype=accumulator(dtype)))
            add(plan_normalize_backward(gradient, one), dtype, f"gradient of l2_normalize{spelled}")
    return list(found.values())


class _Nowhere:
    """A device of Triton's that can be compiled for and not launched on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def parse_target(text: str) -> GPUTarget:
    """cuda:90 or hip:gfx942. Raises ValueError for anything else."""
    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdecimal():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"a target must look like cuda:90 or hip:gfx942, got {text!r}")


def compile_variant(variant: Variant, target: GPUTarget) -> Report:
    """Raises whatever Triton raises."""
    launch = variant.launch
    arguments = {k: MockTensor(v.dtype) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    options = {k: v for k, v in launch.options.items() if target.backend == "cuda" or k != "maxnreg"}
    driver.set_active(_Nowhere(target))  # and stays: this process is for compiling
    compiled = launch.kernel.warmup(**arguments, **options, grid=launch.grid)
    return _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)


def _read_nvidia(compiled: Any) -> Report:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Token states: nothing else is as wide, but for states of the arrival tree, which are read past the L1 cache.
    ptx = compiled.asm["ptx"]

    def widest(instruction: str) -> int:
        found = re.findall(rf"{instruction}(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)", ptx)
        return max((int(elements or 1) * int(bits) // 8 for elements, bits in found), default=0)

    return Report(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        compiled.metadata.shared,
        widest(r"ld\.global(?!\.cg)"),
        widest(r"st\.global"),
        len(re.findall(r"\bfma\.", ptx)),
    )


_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _read_amd(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def most(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    def widest(what: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{what}_[us]?(\w+)", text)
        return max((_AMD_BYTES.get(kind, 0) for kind in found), default=0)

    spilled = most("private_segment_fixed_size")  # scalar registers spill to vector registers, not to memory
    return Report(most("vgpr_count"), spilled, compiled.metadata.shared, widest("load"), widest("store"))


@cache
def _variants(dtype: str, dim: int, target: GPUTarget) -> list[Variant]:
    return variants([getattr(torch, dtype)], [dim], target.warp_size, splits=target.backend == "cuda")


def _compile(job: tuple[GPUTarget, str, int, int]) -> tuple[str, Report | str]:
    """A report, or what went wrong. Jobs are named, not handed over: kernels and plans do not travel between
    processes."""
    target, dtype, dim, index = job
    variant = _variants(dtype, dim, target)[index]
    try:
        return variant.name, compile_variant(variant, target)
    except Exception as error:  # whatever it is, the others are still to be compiled
        words = [line for line in str(error).splitlines() if line.strip()] or [""]
        return variant.name, f"{type(error).__name__}: {words[-1]}"


def run(targets: Sequence[GPUTarget], dtypes: Sequence[str], dims: Sequence[int], jobs: int) -> int:
    """Compiles and prints, a line each and a total; 1 if any failed, spills, or loads or stores aligned rows by too
    little, else 0."""
    work = []
    for target in targets:
        seen: set[tuple[object, ...]] = set()
        for dtype, dim in product(dtypes, dims):
            for index, variant in enumerate(_variants(dtype, dim, target)):
                if variant.key not in seen:
                    seen.add(variant.key)
                    work.append((target, dtype, dim, index))
    wrong = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for (target, dtype, dim, index), (name, found) in zip(work, pool.map(_compile, work, chunksize=8), strict=True):
            head = f"{target.backend}:{target.arch}  {name}"
            if isinstance(found, str):
                wrong += 1
                print(f"{head}  FAILED: {found}", flush=True)
                continue
            complaint = found.complaint(_variants(dtype, dim, target)[index].wide)
            wrong += complaint is not None
            print(
                f"{head}  registers {found.registers}  spills {found.spills}  shared {found.shared}  load {found.load}"
                f"  store {found.store}" + (f"  WRONG: {complaint}" if complaint else ""),
                flush=True,
            )
    print(f"{len(work)} variants, {wrong} wrong")
    return 1 if wrong else 0
