"""From a call to a launch: which kernel, on what grid, with which arguments. Reads shapes, never data, so nothing here
waits for the device, and a launch can be planned for tensors that hold nothing (aot.py)."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..calls import NormalizeBackwardCall, PoolCall, accumulator
from ..modes import MODES
from .arrival_tree import TOTALS
from .config import (
    LOAD_BYTES,
    Config,
    Shape,
    choose,
    deep,
    deepest,
    halved,
    one_row,
    one_token,
    queries_together,
    registers,
    row_columns,
    single_program,
    slug,
    warps,
)
from .finish import ONE
from .launch import Launch, options
from .normalize import normalize_backward_kernel, normalize_kernel
from .pool import pool_kernel
from .state import OF_QUERY

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
    """Elements of the widest load, of 16 bytes at most, of which all lengths are multiples."""
    elements = LOAD_BYTES // element_size
    while any(n % elements for n in lengths):
        elements //= 2
    return elements


def query_strides(call: PoolCall) -> tuple[int, ...]:
    """Of a query: between segments, between those of one, and its width; nothing where there is none."""
    query = call.query
    if query is None:
        return ()
    return query.stride(0) if query.dim() == 3 else 0, query.stride(-2) if query.dim() > 1 else 0, query.shape[-1]


def of_query(call: PoolCall, vector_width: int) -> dict[str, int | None]:
    """What kernels take beside a query; None where there is none."""
    names = "query_batch_stride", "query_stride", "width", "queries"
    if call.query is None:
        return dict.fromkeys(names)
    return dict(zip(names, (*(n // vector_width for n in query_strides(call)), call.queries), strict=True))


def pieces(width: int, columns: int) -> int:
    """Levels for the pieces, of so many columns, of rows of this width."""
    return (-(-width // columns) - 1).bit_length()


def per_token(call: PoolCall) -> Tensor | None:
    """Weights or scores."""
    return call.weights if call.scores is None else call.scores


def shape_of(call: PoolCall, width: int, device: DeviceProperties, several: bool = True) -> Shape:
    """What the choice of a configuration may depend on; `width` columns are used. Not `several`: a program takes one
    query, as if others were other segments'."""
    mean = call.rows if call.padded else -(-call.rows // call.batch)
    may_overlap = not call.padded and call.cu_seqlens is None
    element_size = call.hidden.element_size()
    columns = row_columns(width, element_size, device.warp_size)
    mode = MODES[call.mode]
    batch, queries = (call.batch, call.queries) if several else (call.batch * call.queries, 1)
    return Shape(
        batch, call.rows, mean, columns, element_size, mode.weighted, device.sm_count, device.warp_size, may_overlap,
        mode.only_adds, mode.softmax, queries,
    )  # fmt: skip


def cut(call: PoolCall, width: int, shape: Shape, device: DeviceProperties) -> tuple[int, Config]:
    """How many columns a program takes, and how the work is cut up otherwise."""
    mode = MODES[call.mode]
    if mode.one_token:
        return shape.columns, one_token(shape)
    columns, config = shape.columns, _in_units(shape, width, device)
    if config is None:
        columns, config = single_program(shape)
        return columns, one_row(config, config.warps) if mode.takes_query else config
    row = min(config.warps, warps(1, columns, shape.element_size, shape.warp_size))
    return columns, one_row(config, row) if mode.takes_query else config


def _in_units(shape: Shape, width: int, device: DeviceProperties) -> Config | None:
    """None: each segment has to be taken by one program, however long it is."""
    config = choose(shape, device.name)
    if shape.longest <= config.split:
        return config
    if not device.splits or -(-shape.longest // config.split) > MOST_UNITS:
        return None
    usual = max(config.levels, deep(shape, config.leaves))
    if shape.may_overlap:
        # Each segment may be as long as all rows, and gets slots for that: larger units, fewer.
        most = max(MIN_WORKSPACE, shape.longest * width)
        while config.levels < deepest(shape, config.leaves) and _workspace(shape, config, width) > most:
            config = replace(config, levels=config.levels + 1)
        if _workspace(shape, config, width) > most:
            return None
    if (shape.weighted or config.levels > usual) and config.warps > 4 and config.registers == 0:
        # Weights or many levels, and the arrival tree, take more registers than each of so many threads has.
        config = halved(config)
    return config


def _workspace(shape: Shape, config: Config, width: int) -> int:
    """Bytes of the states of units, where every segment has slots for the longest."""
    row: int = width + -(-width // shape.columns) * TOTALS.value
    return shape.batch * shape.queries * -(-shape.longest // config.split) * row * max(4, shape.element_size)


@dataclass(frozen=True)
class PoolPlan:
    """A pooling launch but for what a call brings: it follows from shapes, strides, dtypes and alignment alone."""

    grid: tuple[int, int, int]
    shape: tuple[int, ...]  # of the result
    dtype: torch.dtype
    accumulator: torch.dtype
    states: tuple[int, int] | None  # shape of what units leave each other; None: every segment is one
    counters: int  # of their arrival
    fixed: dict[str, Any]
    options: dict[str, Any]
    programs: dict[torch.device, Any] = field(default_factory=dict)

    def launch(self, call: PoolCall, **more: Tensor) -> Launch:
        """The launch of a call that looks like the planned one, with memory for its result and for what programs leave
        each other. (Sizes one by one: torch takes half a microsecond more to read a tuple.) `more`: of its gradient."""
        hidden, starts = call.hidden, call.starts if call.cu_seqlens is None else call.cu_seqlens
        states = counter = None
        if self.states is not None:
            states = hidden.new_empty(*self.states, dtype=self.accumulator)
            counter = _COUNTER  # counters come with the launch
        brought = {
            "hidden": hidden, "out": hidden.new_empty(*self.shape, dtype=self.dtype),
            "mask": call.mask, "weights": per_token(call), "query": call.query,
            "starts": None if starts is None else starts.contiguous(),
            "ends": None if call.ends is None else call.ends.contiguous(),
            "gradient": None, "divisors": None, "products": None, "exponents": None,
            "states": states, "arrivals": counter, "stale": counter, "stale_count": 0, "scale": call.scale, **more,
        }  # fmt: skip
        return Launch(pool_kernel, self.grid, brought, self.fixed, self.options, self.counters, self.programs)


_COUNTER = torch.empty(0, dtype=torch.int32)  # what counters look like to the compiler


def make_pool_plan(call: PoolCall, device: DeviceProperties, gradient_dim: int | None = None) -> PoolPlan:
    """The plan of a pooling call with at least one segment, query and column; or of the gradient of its queries, given
    one of so many columns, where the call's result looks like that."""
    mode = MODES[call.mode]
    weight, divisor = mode.weight.value, mode.divisor.value
    if gradient_dim is not None:
        weight, divisor = OF_QUERY.value, ONE.value
    hidden, mask, weights = call.hidden, call.mask, per_token(call)
    element_size, dim = hidden.element_size(), call.shape[-1]
    batch, rows, cu, queries = call.batch, call.rows, call.cu_seqlens is not None, call.queries
    row_stride, batch_stride = hidden.stride(-2), hidden.stride(0) if call.padded else 0
    shape = shape_of(call, dim, device, several=gradient_dim is None)
    columns, config = cut(call, dim, shape, device)
    strips = -(-dim // columns)

    units = -(-rows // config.split)  # of a segment, at most
    whole = mode.one_token or units <= 1
    together = queries_together(shape, columns, config, whole)
    groups = -(-queries // together)
    most = MAX_PROGRAMS if call.padded else GUESSED_PROGRAMS * device.sm_count
    programs = 1 if whole else min(units, max(1, most // (batch * groups)))
    slots = 0 if whole else rows // config.split + batch if cu else batch * units
    summed = accumulator(hidden.dtype)
    dtype = summed if call.normalize and strips > 1 else call.out_dtype or hidden.dtype

    vector_width = vector(element_size, dim, row_stride, batch_stride, *query_strides(call), gradient_dim or 0)
    # Of narrower loads as many bytes; half of them where logarithms are computed meanwhile.
    loads = max(1, (config.loads * vector_width * element_size // LOAD_BYTES) >> mode.activates_tokens)
    fixed = {
        "select": mode.select.value, "divisor": divisor, "batch": batch, "rows": rows,
        "dim": dim // vector_width, "programs": programs,
        "batch_stride": batch_stride // vector_width, "row_stride": row_stride // vector_width,
        "mask_batch_stride": _batch_stride(mask), "token_stride": 0 if mask is None else mask.stride(-1),
        "weight_batch_stride": _batch_stride(weights), "weight_stride": 0 if weights is None else weights.stride(-1),
        **of_query(call, vector_width), "gradient_dim": None if gradient_dim is None else gradient_dim // vector_width,
        "REDUCE": mode.reduce.value, "WEIGHT": weight, "ACTIVATION": mode.activation.value,
        "NORMALIZE": call.normalize and strips == 1, "CU": cu, "WHOLE": whole,
        "VECTOR": vector_width, "COLUMNS": columns, "LEAVES": config.leaves, "LEVELS": config.levels,
        "PIECES": 0 if call.query is None else pieces(hidden.shape[-1], columns),
        "LOADS": loads, "STAGES": config.stages, "QUERIES": together,
        "SCAN": min(MOST_SCAN, (16 if mode.one_token else 8) * device.warp_size * config.warps),
    }  # fmt: skip
    grid = ((slots if cu and not whole else batch * programs) * groups, strips, 1)
    states = None if whole else (slots * queries, dim + strips * TOTALS.value)
    # float64, exponentials and logarithms need what there is
    shared = element_size < 8 and not (mode.softmax or mode.activates_tokens)
    chosen = options(config.warps, config.registers or registers(config.warps, shared))
    result = call.shape if gradient_dim is None else (batch, queries, dim)
    return PoolPlan(grid, result, dtype, summed, states, slots * groups * strips, fixed, chosen)


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
    outer_stride, inner_stride, inner = two_strides(x)
    columns = row_columns(width, element_size, device.warp_size)
    vector_width = vector(element_size, width, outer_stride, inner_stride)
    fixed = {
        "eps": eps, "dim": width // vector_width, "inner": inner,
        "outer_stride": outer_stride // vector_width, "inner_stride": inner_stride // vector_width,
        "VECTOR": vector_width, "COLUMNS": columns, "LEVELS": pieces(width, columns),
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
    if len(leading(x)) > 2:
        x = x.contiguous()
    return part.launch(
        {"x": x, "out": out, "truncate_dims": None if truncate_dims is None else truncate_dims.contiguous(), **more}
    )


def make_normalize_backward_plan(call: NormalizeBackwardCall, device: DeviceProperties) -> Part:
    """The plan that writes the gradient of an x that is not empty."""
    x, element_size = call.normalize.x, call.normalize.x.element_size()
    dim, width = call.gradient.shape[-1], x.shape[-1]
    outer_stride, inner_stride, inner = two_strides(x)
    columns = row_columns(width, element_size, device.warp_size)
    vector_width = vector(element_size, dim, width, outer_stride, inner_stride)
    fixed = {
        "eps": call.normalize.eps, "dim": dim // vector_width, "width": width // vector_width, "inner": inner,
        "outer_stride": outer_stride // vector_width, "inner_stride": inner_stride // vector_width,
        "VECTOR": vector_width, "COLUMNS": columns, "LEVELS": pieces(width, columns),
    }  # fmt: skip
    num_warps = warps(1, columns, element_size, device.warp_size)
    grid, names = (x.numel() // width, 1, 1), ("gradient", "x", "out", "truncate_dims")
    return Part(normalize_backward_kernel, grid, names, fixed, options(num_warps, registers(num_warps)))


def plan_normalize_backward(call: NormalizeBackwardCall, device: DeviceProperties) -> Launch:
    """The launch that writes the gradient of an x that is not empty."""
    part, normalize = make_normalize_backward_plan(call, device), call.normalize
    return launch_normalize(part, normalize.x, call.output(), normalize.truncate_dims, gradient=call.gradient)


def _batch_stride(per_token: Tensor | None) -> int:
    """Between sequences, in a mask or weights."""
    return per_token.stride(0) if per_token is not None and per_token.dim() == 2 else 0


def two_strides(x: Tensor) -> tuple[int, int, int]:
    """Outer stride, inner stride, inner rows of x, or of its copy where it has more strides than that."""
    found = leading(x)
    if len(found) > 2:
        found = [(x.shape[-1], x.numel() // x.shape[-1])]
    (outer_stride, _), (inner_stride, inner) = ([(0, 1)] + found)[-2:]
    return outer_stride, inner_stride, inner


def leading(x: Tensor) -> list[tuple[int, int]]:
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
