"""Compiles, without a GPU, every variant of the kernels that the heuristic can choose; `fastpool aot` prints them.

Launches are planned for tensors on torch's meta device and handed to Triton's own warm-up, so that what is compiled
here is what a server's first request would have compiled, under the same key of Triton's cache.
"""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import active_children, get_context
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from ..calls import PoolBackwardCall, PoolCall, accumulator
from ..modes import MODES, Weight
from ..text import shown, told
from .aot_rows import empty, row_launches
from .config import LOAD_BYTES
from .launch import Launch, settle_cache_keys
from .machine_code import Report, read_amd, read_nvidia
from .plan import DeviceProperties, plan_pool
from .plan_backward import plan_pool_backward
from .targets import last_words

DIMS = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 16384)
SM_COUNTS = (108, 132, 148, 304)  # of an A100, an H100 or H200, a B200, an MI300X
# (batch, rows) that bring out every configuration of the heuristic, and of gradients; a test draws others and finds no
# more. Packed segments may have less than a row each.
SHAPES = tuple(product((2**k for k in range(13)), (part * 2**k for k in range(-12, 16) for part in (1.0, 1.5))))
GRADIENT_SHAPES = ((8, 512), (8, 4096))


# What a kernel does with aligned rows, by LOAD_BYTES a thread.
WIDE = {
    "pool": ("load",),
    "normalize": ("load",),
    "segment_prologue": (),
    "first_maximum": ("load",),
    "scatter_gradient": ("store",),
    "scatter_weight_gradient": ("load",),
    "normalize_backward": ("load", "store"),
    "quantize": ("load",),
}


@dataclass(frozen=True)
class Variant:
    """One machine program, and a launch that needs it."""

    name: str
    launch: Launch
    key: tuple[object, ...]
    warp_size: int = 32

    @property
    def wide(self) -> tuple[str, ...]:
        """What has to be LOAD_BYTES wide: nothing where rows are not aligned, nor where a program has more threads than
        its rows have such loads, as one of a long text with a query, or of a narrow row."""
        arguments, name = self.launch.arguments, kernel_name(self.launch)
        values = arguments.get("out" if name == "scatter_gradient" else "hidden", arguments.get("x"))
        if values is None or arguments.get("VECTOR", 1) * values.element_size() < LOAD_BYTES:
            return ()
        if (rows := arguments.get("LEAVES", arguments.get("TILE_ROWS"))) is not None:
            loads = rows * arguments["COLUMNS"] * values.element_size() // LOAD_BYTES
            if loads < self.warp_size * self.launch.options["num_warps"]:
                return ()
        return WIDE[name]

    @property
    def meets(self) -> bool:
        """Whether its programs may have parts of one segment."""
        return not self.launch.arguments.get("WHOLE", True)

    @property
    def spills(self) -> int:
        """Bytes that it may spill. Of a softmax in float64 each level of the counter is three numbers, which are six
        registers, and up to 28 of them with the polynomial's constants are more than the 255 of a thread."""
        arguments = self.launch.arguments
        double = any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in arguments.values())
        softmax = arguments.get("WEIGHT") in [weight for weight in Weight if weight.softmax]
        return 320 if double and softmax else 0


def kernel_name(launch: Launch) -> str:
    name: str = launch.kernel.fn.__name__
    return name.removesuffix("_kernel")


@dataclass(frozen=True)
class Layout:
    """What a call gives besides token states and weights."""

    padded: bool
    bounds: tuple[str, ...]
    mask: torch.dtype | None

    @property
    def plain(self) -> "Layout":
        """This layout without what a call can leave out."""
        return Layout(self.padded, () if self.padded else self.bounds, None)


# Every layout, and the usual ones, which come to the same code as the others but for a bound that is loaded or not.
# Masks are int64, as tokenizers make them and as takes the most registers, and bool in one.
BOOL_MASK = Layout(True, (), torch.bool)
LAYOUTS = (BOOL_MASK,) + tuple(
    Layout(padded, bounds, mask)
    for padded, every in (
        (True, ((), ("starts",), ("ends",), ("starts", "ends"))),
        (False, (("cu_seqlens",), ("starts", "ends"))),
    )
    for bounds in every
    for mask in (torch.int64, None)
)
USUAL = tuple(
    one for one in LAYOUTS if not one.padded or (one.bounds, one.mask is None) in (((), False), (("ends",), True))
)
QUERIES = {"query": 1, "2 queries": 2, "4 queries": 4}  # as many as a program takes
# A mode of every family, one that reads one token, and what each is given by itself, which is one more argument.
FAMILY_MODES: tuple[tuple[str, str | None], ...] = (
    ("mean", None),
    ("max", None),
    ("last", None),
    ("weighted_mean", None),
    ("weighted_mean", "weights"),
    ("softmax_mean", "scores"),
    ("attention", "query"),
    ("attention", "2 queries"),
    ("attention", "4 queries"),
    ("splade_max_relu", None),
    ("splade_sum_relu", None),
    ("splade_max_log1p_relu", None),
    ("splade_sum_log1p_relu", None),
)
REQUIRED = ("scores", *QUERIES)  # without which there is no call


def make_call(
    mode: str,
    dtype: torch.dtype,
    dim: int,
    shape: tuple[int, float],
    layout: Layout,
    normalize: bool = False,
    given: str | None = None,
) -> PoolCall:
    """A call of `shape`, (batch, rows), without data: programs depend on what is given, not on strides and lengths."""
    batch, rows = shape
    per_token = (batch, max(1, int(rows))) if layout.padded else (max(1, int(batch * rows)),)
    arguments: dict[str, Any] = {
        name: empty(batch + 1, dtype=torch.int32) if name == "cu_seqlens" else empty(batch, dtype=torch.int64)
        for name in layout.bounds
    }
    if layout.mask is not None:
        arguments["mask"] = empty(*per_token, dtype=layout.mask)
    if given in QUERIES:
        arguments["query"] = empty(QUERIES[given], dim, dtype=dtype)
    elif given is not None:
        arguments[given] = empty(*per_token, dtype=torch.float32)
    return PoolCall(mode, empty(*per_token, dim, dtype=dtype), normalize=normalize, **arguments)


def _layout_of(call: PoolCall) -> str:
    names = ("weights", "scores", "query", "cu_seqlens", "starts", "ends")
    given = [name for name in names if getattr(call, name) is not None]
    if call.mask is not None:
        given.insert(0, f"{str(call.mask.dtype).removeprefix('torch.')} mask")
    return ", ".join(["padded" if call.padded else "packed", *given])


@cache
def _choices(
    mode: str,
    dtype: torch.dtype,
    dim: int,
    layout: Layout,
    normalize: bool,
    given: str | None,
    of_query: bool,
    warp_size: int,
    splits: bool,
) -> list[tuple[tuple[int, float], int]]:
    """Shapes and numbers of processors, one of each for every configuration that the heuristic chooses. It does not
    look at more than the layout."""
    found: dict[tuple[object, ...], tuple[tuple[int, float], int]] = {}
    for shape in SHAPES:
        call = make_call(mode, dtype, dim, shape, layout, normalize, given)
        for count in SM_COUNTS:
            device = DeviceProperties("aot", count, warp_size, splits)
            launch = _gradient(call, "query", device)[-1] if of_query else plan_pool(call, device)
            found.setdefault(key_of(launch), (shape, count))
    return list(found.values())


def _gradient(call: PoolCall, of: str, device: DeviceProperties) -> list[Launch]:
    gradient = empty(*call.shape, dtype=accumulator(call.hidden.dtype))
    return plan_pool_backward(PoolBackwardCall(call, gradient, gradient, of), device)


def _launches(dtype: torch.dtype, dim: int, warp_size: int, splits: bool, every: bool) -> Iterator[tuple[str, Launch]]:
    """What calls of this dtype and width come to, and from what."""
    layouts = LAYOUTS if every else USUAL
    for mode, given in FAMILY_MODES:
        for normalize in (False, True):
            for layout in layouts if every or normalize else (BOOL_MASK,):
                own = given if given in REQUIRED else None
                for shape, count in _choices(mode, dtype, dim, layout.plain, normalize, own, False, warp_size, splits):
                    call = make_call(mode, dtype, dim, shape, layout, normalize, given)
                    yield (
                        f"{mode}({_layout_of(call)})",
                        plan_pool(call, DeviceProperties("aot", count, warp_size, splits)),
                    )
        for shape, layout in product(GRADIENT_SHAPES, () if MODES[mode].of_logits else layouts):
            call = make_call(mode, dtype, dim, shape, layout, given=given)
            for of in ("hidden", given) if given and given not in QUERIES else ("hidden",):
                for launch in _gradient(call, of, DeviceProperties("aot", 1, warp_size)):
                    yield f"gradient of {of} {kernel_name(launch)} {mode}({_layout_of(call)})", launch
        for layout in layouts if given == "query" else ():
            for shape, count in _choices(mode, dtype, dim, layout.plain, False, given, True, warp_size, splits):
                call = make_call(mode, dtype, dim, shape, layout, given=given)
                for launch in _gradient(call, "query", DeviceProperties("aot", count, warp_size, splits)):
                    yield f"gradient of query {kernel_name(launch)} {mode}({_layout_of(call)})", launch
    yield from row_launches(dtype, dim, warp_size)


def key_of(launch: Launch) -> tuple[object, ...]:
    """What makes a machine program: constants, options, and the types of what is given."""
    types = tuple(v.dtype if isinstance(v, Tensor) else v is None for v in launch.arguments.values())
    constants = tuple((name, int(v)) for name, v in launch.arguments.items() if name.isupper())
    return kernel_name(launch), types, constants, *launch.options.values()


def variants(
    dtypes: Sequence[torch.dtype], dims: Sequence[int], warp_size: int = 32, splits: bool = True, every: bool = False
) -> list[Variant]:
    """The machine programs that calls of these dtypes and widths come to: every configuration that the heuristic can
    choose, in every family, and in the usual layouts or every one. Other types of indices, masks and weights, and a
    result of another dtype are programs of their own, which differ in a load, a comparison or a store."""
    found: dict[tuple[object, ...], Variant] = {}
    for dtype, dim in product(dtypes, dims):
        for what, launch in _launches(dtype, dim, warp_size, splits, every):
            key = key_of(launch)
            if key not in found:
                found[key] = Variant(_name(what, dtype, launch), launch, key, warp_size)
    return list(found.values())


def _name(what: str, dtype: torch.dtype, launch: Launch) -> str:
    constants = {name: int(v) for name, v in launch.arguments.items() if name.isupper()}
    shown = [
        f"{name.lower()}={constants[name]}"
        for name in ("COLUMNS", "LEAVES", "LEVELS", "LOADS", "TILE_ROWS", "SCAN")
        if name in constants
    ]
    flags = [name.lower() for name in ("WHOLE", "NORMALIZE") if constants.get(name)]
    flags += [f"queries={constants['QUERIES']}"] if constants.get("QUERIES", 1) > 1 else []
    written = launch.arguments["out"].dtype if kernel_name(launch) == "pool" else dtype
    flags += [f"to {str(written).removeprefix('torch.')}"] if written != dtype else []
    unaligned = ["unaligned"] if constants.get("VECTOR", LOAD_BYTES) * dtype.itemsize < LOAD_BYTES else []
    warps = f"warps={launch.options['num_warps']}"
    return " ".join([what, str(dtype).removeprefix("torch."), *shown, warps, *flags, *unaligned])


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


def compile_variant(variant: Variant, target: GPUTarget) -> Report:
    """Raises whatever Triton raises."""
    launch = variant.launch
    arguments = {k: MockTensor(v.dtype) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    options = {k: v for k, v in launch.options.items() if target.backend == "cuda" or k != "maxnreg"}
    driver.set_active(_Nowhere(target))  # and stays: this process is for compiling
    settle_cache_keys()
    compiled = launch.kernel.warmup(**arguments, **options, grid=launch.grid)
    if target.backend == "hip":
        return read_amd(compiled)
    parameters = [name for name, value in launch.arguments.items() if value is not None and not name.isupper()]
    return read_nvidia(compiled, [parameters.index("states")] if "states" in parameters else [])


@cache
def _variants(dtype: str, dim: int, target: GPUTarget, every: bool) -> list[Variant]:
    return variants([getattr(torch, dtype)], [dim], target.warp_size, target.backend == "cuda", every)


def _compile(job: tuple[GPUTarget, str, int, bool, int]) -> tuple[str, Report | str]:
    """A report, or what went wrong. Jobs are named, not handed over: kernels and plans do not travel between
    processes."""
    target, dtype, dim, every, index = job
    variant = _variants(dtype, dim, target, every)[index]
    try:
        return variant.name, compile_variant(variant, target)
    except Exception as error:  # whatever it is, the others are still to be compiled
        return variant.name, f"{type(error).__name__}: {last_words(str(error))}"


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile, and end at once where this one does not go on."""
    others = active_children()
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that compiles has died, as by a compiler's abort or for lack of memory; --jobs 1 shows where"
            ) from None
        except BaseException:
            for process in active_children():
                if process not in others:
                    process.terminate()
            raise


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C is heard afterwards, and never by processes that start meanwhile: they need not end by it themselves."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def run(
    targets: Sequence[GPUTarget],
    dtypes: Sequence[str],
    dims: Sequence[int],
    jobs: int,
    every: bool = False,
    only: str = "",
) -> int:
    """Compiles and prints, a line each and a total; 1 if any failed or has a complaint, else 0. `only`: those whose
    name holds it.

    Raises:
        ValueError: there is none.
        ChildProcessError: a process that compiles has died.
    """
    work = []
    for target in targets:
        seen: set[tuple[object, ...]] = set()
        for dtype, dim in product(dtypes, dims):
            for index, variant in enumerate(_variants(dtype, dim, target, every)):
                if variant.key not in seen and only in variant.name:
                    seen.add(variant.key)
                    work.append((target, dtype, dim, every, index))
    if not work:
        raise ValueError(f"no variant has {shown(only)} in its name")
    wrong = 0
    with _processes(min(jobs, len(work))) as pool:
        with _deaf():
            futures = [pool.submit(_compile, job) for job in work]
        for (target, dtype, dim, _, index), future in zip(work, futures, strict=True):
            name, found = future.result()
            head = f"{target.backend}:{target.arch}  {name}"
            if isinstance(found, str):
                wrong += 1
                print(f"{head}  FAILED: {told(found)}", flush=True)
                continue
            variant = _variants(dtype, dim, target, every)[index]
            complaint = found.complaint(variant.wide, variant.meets, variant.spills)
            wrong += complaint is not None
            print(
                f"{head}  registers {found.registers}  spills {found.spills}  shared {found.shared}  load {found.load}"
                f"  store {found.store}" + (f"  WRONG: {complaint}" if complaint else ""),
                flush=True,
            )
    print(f"{len(work)} variants, {wrong} wrong")
    return 1 if wrong else 0
