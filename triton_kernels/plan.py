"""From a call to a launch: which kernel, on what grid, with which arguments. Reads shapes, never data, so nothing here
waits for the device, and a launch can be planned for tensors that hold nothing (aot.py)."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..calls import NormalizeBackwardCall, PoolBackwardCall, PoolCall, accumulator
from ..modes import MODES
from . import backward, config
from .arrival_tree import TOTALS_BYTES
from .config import (
    LOAD_BYTES,
    Config,
    Shape,
    choose,
    deep,
    deepest,
    halved,
    one_token,
    registers,
    row_columns,
    single_program,
    slug,
    warps,
)
from .launch import Launch, options
from .normalize import normalize_backward_kernel, normalize_kernel
from .pool import pool_kernel

MAX_PROGRAMS = 65536
# Of a processor, where segments may overlap, and so each may be as long as all rows: programs without a unit cost
# little, but not nothing.
GUESSED_PROGRAMS = 32
# Elements of a mask looked at in one go: at most eight a thread, or twice as many where there is little else to do.
# (32 of int64 do not fit a thread's registers.)
MOST_SCAN = 1024
MOST_UNITS = 8**8  # that the arrival tree can count
MIN_WORKSPACE = 64 << 20  # bytes; a larger workspace may have half as many as bfloat16 token states


@dataclass(frozen=True)
class DeviceProperties:
    """What plans depend on."""

    name: str
    sm_count: int
    warp_size: int = 32
    # Whether a barrier waits for stores, which the arrival tree stands on: not in Triton's code for AMD GPUs.
    splits: bool = True


@cache
def device_of(device: torch.device) -> DeviceProperties:
    if device.type != "cuda":
        return DeviceProperties("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        slug(properties.name), properties.multi_processor_count, properties.warp_size, torch.version.hip is None
    )


def vector(element_size: int, *lengths: int) -> int:
    """Elements of a 16-byte load, if all lengths are multiples of it; else 1."""
    elements = LOAD_BYTES // element_size
    return elements if all(n % elements == 0 for n in lengths) else 1


def shape_of(call: PoolCall, width: int, device: DeviceProperties) -> Shape:
    """What the choice of a configuration may depend on; `width` columns are used."""
    mean = call.rows if call.padded else -(-call.rows // call.batch)
    may_overlap = not call.padded and call.cu_seqlens is None
    element_size = call.hidden.element_size()
    columns = row_columns(width, element_size, device.warp_size)
    mode = MODES[call.mode]
    return Shape(
        call.batch, call.rows, mean, columns, element_size, mode.takes_weights, device.sm_count, device.warp_size,
        may_overlap, mode.only_adds,
    )  # fmt: skip


def cut(call: PoolCall, width: int, device: DeviceProperties) -> tuple[int, Config]:
    """How many columns a program takes, and how the work is cut up otherwise."""
    shape = shape_of(call, width, device)
    if MODES[call.mode].one_token:
        return shape.columns, one_token(shape)
    config = choose(shape, device.name)
    if shape.longest <= config.split:
        return shape.columns, config
    if not device.splits or -(-shape.longest // config.split) > MOST_UNITS:
        return single_program(shape)
    usual = max(config.levels, deep(shape, config.leaves))
    if shape.may_overlap:
        # Each segment may be as long as all rows, and gets slots for that: larger units, fewer.
        most = max(MIN_WORKSPACE, shape.longest * width)
        while config.levels < deepest(shape, config.leaves) and _workspace(shape, config, width) > most:
            config = replace(config, levels=config.levels + 1)
        if _workspace(shape, config, width) > most:
            return single_program(shape)
    if (shape.weighted or config.levels > usual) and config.warps > 4 and config.registers == 0:
        # Weights or many levels, and the arrival tree, take more registers than each of so many threads has.
        config = halved(config)
    return shape.columns, config


def _workspace(shape: Shape, config: Config, width: int) -> int:
    """Bytes of the states of units, where every segment has slots for the longest."""
    row: int = width * max(4, shape.element_size) + -(-width // shape.columns) * TOTALS_BYTES.value
    return shape.batch * -(-shape.longest // config.split) * row


@dataclass(frozen=True)
class PoolPlan:
    """A pooling launch but for what a call brings: it follows from shapes, strides, dtypes and alignment alone."""

    grid: tuple[int, int, int]
    shape: tuple[int, int]  # of the result
    dtype: torch.dtype
    accumulator: torch.dtype
    states: tuple[int, int] | None  # shape of what units leave each other; None: every segment is one
    counters: int  # of their arrival
    fixed: dict[str, Any]
    options: dict[str, Any]
    programs: dict[torch.device, Any] = field(default_factory=dict)

    def launch(self, call: PoolCall) -> Launch:
        """The launch of a call that looks like the planned one, with memory for its result and for what programs leave
        each other. (Sizes one by one: torch takes half a microsecond more to read a tuple.)"""
        hidden, starts = call.hidden, call.starts if call.cu_seqlens is None else call.cu_seqlens
        states = counter = None
        if self.states is not None:
            states = hidden.new_empty(*self.states, dtype=self.accumulator)
            counter = _COUNTER  # counters come with the launch
        brought = {
            "hidden": hidden, "out": hidden.new_empty(*self.shape, dtype=self.dtype),
            "mask": call.mask, "weights": call.weights,
            "starts": None if starts is None else starts.contiguous(),
            "ends": None if call.ends is None else call.ends.contiguous(),
            "states": states, "arrivals": counter, "stale": counter, "stale_count": 0,
        }  # fmt: skip
        return Launch(pool_kernel, self.grid, brought, self.fixed, self.options, self.counters, self.programs)


_COUNTER = torch.empty(0, dtype=torch.int32)  # what counters look like to the compiler


def make_pool_plan(call: PoolCall, device: DeviceProperties) -> PoolPlan:
    """The plan of a pooling call with at least one segment and one column."""
    mode = MODES[call.mode]
    hidden, mask, weights = call.hidden, call.mask, call.weights
    element_size, width = hidden.element_size(), hidden.shape[-1] if call.truncate_dim is None else call.truncate_dim
    batch, rows, cu = call.batch, call.rows, call.cu_seqlens is not None
    row_stride, batch_stride = hidden.stride(-2), hidden.stride(0) if call.padded else 0
    columns, config = cut(call, width, device)
    strips = -(-width // columns)

    units = -(-rows // config.split)  # of a segment, at most
    whole = mode.one_token or units <= 1
    most = MAX_PROGRAMS if call.padded else GUESSED_PROGRAMS * device.sm_count
    programs = 1 if whole else min(units, max(1, most // batch))
    slots = 0 if whole else rows // config.split + batch if cu else batch * units
    summed = accumulator(hidden.dtype)
    dtype = summed if call.normalize and strips > 1 else call.out_dtype or hidden.dtype

    vector_width = vector(element_size, width, row_stride, batch_stride)
    fixed = {
        "select": mode.select.value, "divisor": mode.divisor.value, "batch": batch, "rows": rows,
        "dim": width // vector_width, "programs": programs,
        "batch_stride": batch_stride // vector_width, "row_stride": row_stride // vector_width,
        "mask_batch_stride": _batch_stride(mask), "token_stride": 0 if mask is None else mask.stride(-1),
        "weight_batch_stride": _batch_stride(weights), "weight_stride": 0 if weights is None else weights.stride(-1),
        "REDUCE": mode.reduce.value, "WEIGHTED": mode.takes_weights,
        "NORMALIZE": call.normalize and strips == 1, "CU": cu, "WHOLE": whole,
        "VECTOR": vector_width, "COLUMNS": columns, "LEAVES": config.leaves, "LEVELS": config.levels,
        "LOADS": config.loads, "STAGES": config.stages,
        "SCAN": min(MOST_SCAN, (16 if mode.one_token else 8) * device.warp_size * config.warps),
    }  # fmt: skip
    grid = (slots if cu and not whole else batch * programs, strips, 1)
    states = None if whole else (slots, width + strips * (TOTALS_BYTES.value // summed.itemsize))
    shared = element_size < 8  # float64 needs what there is
    chosen = options(config.warps, config.registers or registers(config.warps, shared))
    return PoolPlan(grid, (batch, width), dtype, summed, states, slots * strips, fixed, chosen)


def plan_pool(call: PoolCall, device: DeviceProperties) -> Launch:
    """The launch that pools a call with at least one segment and one column. Rows that are cut into strips (its grid's
    second dimension) are not normalised, and then not rounded either."""
    return make_pool_plan(call, device).launch(call)


@dataclass(frozen=True)
class Part:
    """A launch but for the tensors `names`."""

    kernel: Any
    grid: tuple[int, int, int]
    names: tuple[str, ...]
    fixed: dict[str, Any]
    options: dict[str, Any]
    programs: dict[torch.device, Any] = field(default_factory=dict)

    def launch(self, tensors: dict[str, Any]) -> Launch:
        brought = {name: tensors[name] for name in self.names}
        return Launch(self.kernel, self.grid, brought, self.fixed, self.options, programs=self.programs)


def make_normalize_plan(x: Tensor, eps: float, width: int, device: DeviceProperties) -> Part:
    """The plan that normalises the first `width` columns of an x that is not empty."""
    element_size = x.element_size()
    outer_stride, inner_stride, inner = _two_strides(x)
    columns = row_columns(width, element_size, device.warp_size)
    vector_width = vector(element_size, width, outer_stride, inner_stride)
    fixed = {
        "eps": eps, "dim": width // vector_width, "inner": inner,
        "outer_stride": outer_stride // vector_width, "inner_stride": inner_stride // vector_width,
        "VECTOR": vector_width, "COLUMNS": columns, "LEVELS": (-(-width // columns) - 1).bit_length(),
    }  # fmt: skip
    num_warps = warps(1, columns, element_size, device.warp_size)
    grid = (x.numel() // x.shape[-1], 1, 1)
    return Part(normalize_kernel, grid, ("x", "out", "truncate_dims"), fixed, options(num_warps, registers(num_warps)))


def plan_normalize(
    x: Tensor, eps: float, out: Tensor, device: DeviceProperties, truncate_dims: Tensor | None = None
) -> Launch:
    """The launch that normalises the first columns of x, as many as `out` has or truncate_dims say, into `out`; neither
    is empty."""
    return launch_normalize(make_normalize_plan(x, eps, out.shape[-1], device), x, out, truncate_dims)


def launch_normalize(part: Part, x: Tensor, out: Tensor, truncate_dims: Tensor | None, **more: Tensor) -> Launch:
    """x is copied where its rows have more strides than a kernel takes."""
    if len(_leading(x)) > 2:
        x = x.contiguous()
    return part.launch(
        {"x": x, "out": out, "truncate_dims": None if truncate_dims is None else truncate_dims.contiguous(), **more}
    )


def make_normalize_backward_plan(call: NormalizeBackwardCall, device: DeviceProperties) -> Part:
    """The plan that writes the gradient of an x that is not empty."""
    x, element_size = call.normalize.x, call.normalize.x.element_size()
    dim, width = call.gradient.shape[-1], x.shape[-1]
    outer_stride, inner_stride, inner = _two_strides(x)
    columns = row_columns(width, element_size, device.warp_size)
    vector_width = vector(element_size, dim, width, outer_stride, inner_stride)
    fixed = {
        "eps": call.normalize.eps, "dim": dim // vector_width, "width": width // vector_width, "inner": inner,
        "outer_stride": outer_stride // vector_width, "inner_stride": inner_stride // vector_width,
        "VECTOR": vector_width, "COLUMNS": columns, "LEVELS": (-(-width // columns) - 1).bit_length(),
    }  # fmt: skip
    num_warps = warps(1, columns, element_size, device.warp_size)
    grid, names = (x.numel() // width, 1, 1), ("gradient", "x", "out", "truncate_dims")
    return Part(normalize_backward_kernel, grid, names, fixed, options(num_warps, registers(num_warps)))


def plan_normalize_backward(call: NormalizeBackwardCall, device: DeviceProperties) -> Launch:
    """The launch that writes the gradient of an x that is not empty."""
    part, normalize = make_normalize_backward_plan(call, device), call.normalize
    return launch_normalize(part, normalize.x, call.output(), normalize.truncate_dims, gradient=call.gradient)


def make_pool_backward_plan(call: PoolBackwardCall, device: DeviceProperties) -> list[Part]:
    """The plans of the launches, in their order, of a call with at least one segment, row and column."""
    pool, gradient, hidden = call.pool, call.gradient, call.pool.hidden
    element_size, dim, width = hidden.element_size(), gradient.shape[1], hidden.shape[-1]
    padded, cu, rows, batch = pool.padded, pool.cu_seqlens is not None, pool.rows, pool.batch
    skew, mask_skew, weight_skew = (_skew(x, rows, padded) for x in (hidden.select(-1, 0), pool.mask, pool.weights))
    mode = MODES[pool.mode]
    finds_maxima = call.needs_result and call.of == "hidden"
    several = not padded and not cu  # segments may hold a row
    shared = {
        "select": mode.select.value, "divisor": mode.divisor.value, "batch": batch, "rows": rows,
        "mask_skew": mask_skew, "weight_skew": weight_skew,
        "token_stride": 0 if pool.mask is None else pool.mask.stride(-1),
        "weight_stride": 0 if pool.weights is None else pool.weights.stride(-1), "PADDED": padded, "CU": cu,
    }  # fmt: skip

    def planned(kernel: Any, grid: tuple[int, int, int], threads: int, **more: Any) -> Part:
        values = {**shared, **more}
        num_warps = threads // device.warp_size
        most = registers(num_warps, shared=False)
        if kernel is backward.scatter_gradient_kernel and not several:
            many = finds_maxima or values["COLUMNS"] * element_size <= LOAD_BYTES
            most = registers(num_warps) if many else config.SCATTER_REGISTERS
        names = tuple(name for name in kernel.arg_names if name in _TENSORS)
        fixed = {name: values[name] for name in kernel.arg_names if name not in _TENSORS}
        return Part(kernel, grid, names, fixed, options(num_warps, most))

    def over_chunks(kernel: Any, width: int, vector_width: int, **more: Any) -> Part:
        columns, tile_rows = config.tile(width, element_size)
        if several:
            one_load = config.TILE_THREADS * LOAD_BYTES // (columns * element_size)
            tile_rows = min(tile_rows, max(config.SEVERAL_ROWS, one_load))
        strips = 1 if call.of == "weights" else -(-width // columns)
        total = batch * rows if padded else rows
        each = config.chunk(total, strips, tile_rows, device.sm_count)
        return planned(
            kernel, (-(-total // each), strips, 1), config.TILE_THREADS,
            dim=dim // vector_width, width=width // vector_width, chunk=each, WEIGHTED=mode.takes_weights,
            VECTOR=vector_width, COLUMNS=columns, TILE_ROWS=tile_rows, **more,
        )  # fmt: skip

    columns, _ = config.tile(dim, element_size)
    levels = (-(-dim // columns) - 1).bit_length()
    size, threads = config.scan(rows if padded else -(-rows // batch), mode.takes_weights)
    parts = [
        planned(
            backward.segment_prologue_kernel, (batch, 1, 1), threads, dim=dim, COLUMNS=columns, LEVELS=levels,
            SCAN=size, WEIGHTED=mode.takes_weights,
        )
    ]  # fmt: skip
    read = vector(element_size, dim, hidden.stride(-2), skew)
    strides = {"skew": skew // read, "row_stride": hidden.stride(-2) // read}
    if call.of == "weights":
        return [*parts, over_chunks(backward.scatter_weight_gradient_kernel, dim, read, LEVELS=levels, **strides)]
    if finds_maxima:
        parts.append(over_chunks(backward.first_maximum_kernel, dim, read, **strides))
    return [*parts, over_chunks(backward.scatter_gradient_kernel, width, vector(element_size, dim, width))]


def launch_parts(parts: list[Part], call: PoolBackwardCall) -> list[Launch]:
    """The launches planned for such a call, with memory for the result, the `out` of the last, and for what they leave
    each other."""
    pool, gradient, batch = call.pool, call.gradient, call.pool.batch
    starts = pool.starts if pool.cu_seqlens is None else pool.cu_seqlens
    finds_maxima = any(part.kernel is backward.first_maximum_kernel for part in parts)
    tensors = {
        "gradient": gradient, "result": call.result, "hidden": pool.hidden, "out": call.output(),
        "mask": pool.mask, "weights": pool.weights,
        "starts": None if starts is None else starts.contiguous(),
        "ends": None if pool.ends is None else pool.ends.contiguous(),
        "segments": gradient.new_empty(batch, 2, dtype=torch.int64), "divisors": gradient.new_empty(batch),
        "products": gradient.new_empty(batch) if call.of == "weights" else None,
        "maxima": gradient.new_full(gradient.shape, backward.NEVER.value, dtype=torch.int32) if finds_maxima else None,
    }  # fmt: skip
    launches = []
    for part in parts:
        launch = part.launch(tensors)
        if part.kernel is backward.segment_prologue_kernel and call.of != "weights":
            launch.brought["result"] = None  # without it the kernel writes no products
        launches.append(launch)
    return launches


def plan_pool_backward(call: PoolBackwardCall, device: DeviceProperties) -> list[Launch]:
    """The launches, one after another, of a call with at least one segment, row and column. The last has the gradient
    as its `out`."""
    return launch_parts(make_pool_backward_plan(call, device), call)


_TENSORS = {"gradient", "result", "hidden", "out", "mask", "weights", "starts", "ends"}
_TENSORS |= {"segments", "divisors", "products", "maxima"}


def _skew(per_token: Tensor | None, rows: int, padded: bool) -> int:
    """What there is between sequences beside their rows."""
    return per_token.stride(0) - rows * per_token.stride(1) if per_token is not None and padded else 0


def _batch_stride(per_token: Tensor | None) -> int:
    """Between sequences, in a mask or weights."""
    return per_token.stride(0) if per_token is not None and per_token.dim() == 2 else 0


def _two_strides(x: Tensor) -> tuple[int, int, int]:
    """Outer stride, inner stride, inner rows of x, or of its copy where it has more strides than that."""
    leading = _leading(x)
    if len(leading) > 2:
        leading = [(x.shape[-1], x.numel() // x.shape[-1])]
    (outer_stride, _), (inner_stride, inner) = ([(0, 1)] + leading)[-2:]
    return outer_stride, inner_stride, inner


def _leading(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the fewest dimensions that stand for all but the last one."""
    merged = [(0, 1)]
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged[-1][0] == size * stride or merged[-1][1] == 1:
            merged[-1] = (stride, size * merged[-1][1])
        else:
            merged.append((stride, size))
    return merged
