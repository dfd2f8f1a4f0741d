"""From a call to a launch: which kernel, on what grid, with which arguments. Reads shapes, never data, so nothing here
waits for the device, and a launch can be planned for tensors that hold nothing (aot.py)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..modes import MODES
from ..segments import NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall, accumulator
from . import backward, config
from .config import LOAD_BYTES, Config, Shape, choose, endless, registers, row_columns, slug, warps
from .normalize import normalize_backward_kernel, normalize_kernel
from .pool import NORM_EPS, pool_kernel
from .reduce import FAMILIES, MAX, SUM, WEIGHTED

MAX_PROGRAMS = 65536  # where their number is a guess: programs without a unit cost little, but not nothing
MOST_UNITS = 8**8  # that the arrival tree can count
MIN_WORKSPACE = 64 << 20  # bytes; a larger workspace may have half as many as bfloat16 token states


@dataclass
class Launch:
    """`arguments` stand in the kernel's order; those in capitals are compiled in."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """On the current stream of the tensors' device."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(device)
        else:
            self._run(device)

    def _run(self, device: torch.device) -> None:
        arguments = self.arguments.values()
        if device.type != "cuda" or torch.version.hip is not None:
            self.kernel[self.grid](*arguments, **self.options)
            return
        # Triton's own look-up costs 10 us and more; a program that is known by what it was compiled for is launched at
        # once. (For AMD, Triton also looks at the size of a tensor's memory.)
        key = (self.kernel, device.index, self.options["num_warps"], *self._compiled_for())
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = self.kernel[self.grid](*arguments, **self.options)
        else:
            compiled[self.grid](*arguments)

    def _compiled_for(self) -> list[Any]:
        """All that Triton may look at in arguments: types, alignment, whether an integer is 1, or needs 64 bits."""
        seen: list[Any] = []
        for name, value in self.arguments.items():
            if name.isupper() or value is None:
                seen.append(value)
            elif isinstance(value, Tensor):
                seen.append((value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, int):
                seen.append((value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
        return seen


_compiled: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Device:
    """What plans depend on."""

    name: str
    processors: int
    lanes: int = 32  # of a warp
    # Whether a barrier waits for stores, which the arrival tree stands on: not in Triton's code for AMD GPUs.
    splits: bool = True


def options(warps: int, sums: bool = True) -> dict[str, Any]:
    """No contraction: a fused multiply-add rounds once where the canonical order rounds twice."""
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if torch.version.hip is None:
        chosen["maxnreg"] = registers(warps, sums)
    return chosen


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        slug(properties.name), properties.multi_processor_count, properties.warp_size, torch.version.hip is None
    )


def vector(element_size: int, *lengths: int) -> int:
    """Elements of a 16-byte load, if all lengths are multiples of it; else 1."""
    elements = LOAD_BYTES // element_size
    return elements if all(n % elements == 0 for n in lengths) else 1


def shape_of(call: PoolCall, width: int, device: Device) -> Shape:
    """What the choice of a configuration may depend on; `width` columns are used."""
    mean = call.rows if call.padded else -(-call.rows // call.batch)
    element_size = call.hidden.element_size()
    columns = row_columns(width, element_size, device.lanes)
    weighted = FAMILIES[call.mode] is WEIGHTED
    return Shape(call.batch, call.rows, mean, columns, element_size, weighted, device.processors, device.lanes)


def cut(call: PoolCall, width: int, device: Device) -> tuple[int, Config]:
    """How many columns a program takes, and how the work is cut up otherwise."""
    shape = shape_of(call, width, device)
    config = choose(shape, device.name)
    units = -(-call.rows // config.split)  # of a segment, at most
    if units <= 1:
        return shape.columns, config
    if not device.splits or units > MOST_UNITS:
        return endless(shape)
    may_overlap = not call.padded and call.cu_seqlens is None  # then every segment may be as long as all rows
    if may_overlap and call.batch * units * width * 4 > max(MIN_WORKSPACE, call.rows * width):
        return endless(shape)
    return shape.columns, config


def plan_pool(call: PoolCall, device: Device) -> Launch:
    """The launch that pools a call with at least one segment and one column. Rows that are cut into strips (its grid's
    second dimension) are not normalised, and then not rounded either."""
    hidden, mask, weights = call.hidden, call.mask, call.weights
    element_size, width = hidden.element_size(), hidden.shape[-1] if call.dim is None else call.dim
    batch, rows, cu = call.batch, call.rows, call.cu_seqlens is not None
    row_stride, batch_stride = hidden.stride(-2), hidden.stride(0) if call.padded else 0
    columns, config = cut(call, width, device)
    strips = -(-width // columns)

    units = max(1, -(-rows // config.split))  # of a segment, at most
    whole = units == 1
    programs = min(units, max(1, MAX_PROGRAMS // batch))
    slots = rows // config.split + batch if cu else batch * units
    shape, dtype = (batch, width), call.out_dtype or hidden.dtype
    if call.normalize and strips > 1:
        dtype = accumulator(hidden.dtype)
    if whole:
        out = hidden.new_empty(shape, dtype=dtype)
        states = totals = arrivals = None
    else:
        states = hidden.new_empty((slots, width), dtype=accumulator(hidden.dtype))
        totals = hidden.new_empty((slots, 2), dtype=torch.float64)
        out, arrivals = _cleared(hidden, shape, dtype, slots * strips)

    aligned = vector(element_size, width, row_stride, batch_stride)
    starts = call.cu_seqlens if cu else call.starts
    arguments = {
        "hidden": hidden, "out": out, "mask": mask, "weights": weights,
        "starts": None if starts is None else starts.contiguous(),
        "ends": None if call.ends is None else call.ends.contiguous(),
        "states": states, "totals": totals, "arrivals": arrivals,
        "mode": MODES[call.mode].code, "batch": batch, "rows": rows, "dim": width // aligned, "programs": programs,
        "batch_stride": batch_stride // aligned, "row_stride": row_stride // aligned,
        "mask_batch_stride": _batch_stride(mask), "token_stride": 0 if mask is None else mask.stride(-1),
        "weight_batch_stride": _batch_stride(weights), "weight_stride": 0 if weights is None else weights.stride(-1),
        "FAMILY": FAMILIES[call.mode].value, "NORMALIZE": call.normalize and strips == 1, "CU": cu, "WHOLE": whole,
        "VECTOR": aligned, "COLUMNS": columns, "LEAVES": config.leaves, "LEVELS": config.levels, "ROWS": config.rows,
        "SCAN": min(1024, 8 * device.lanes * config.warps),  # mask elements looked at in one go, eight a thread
    }  # fmt: skip
    grid = (slots if cu and not whole else batch * programs, strips, 1)
    return Launch(pool_kernel, grid, arguments, options(config.warps, FAMILIES[call.mode] is SUM and element_size < 8))


def _cleared(like: Tensor, shape: tuple[int, int], dtype: torch.dtype, counters: int) -> tuple[Tensor, Tensor]:
    """A result and arrival counters, in one piece of memory, which takes one launch to clear. The result too, since a
    cu_seqlens that runs backwards leaves rows that no program finds."""
    size = -(-shape[0] * shape[1] * dtype.itemsize // 16) * 16
    memory = like.new_zeros(size + 4 * counters, dtype=torch.uint8)
    result = memory[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)
    return result, memory[size:].view(torch.int32)


def plan_normalize(x: Tensor, eps: float, out: Tensor, device: Device, dims: Tensor | None = None) -> Launch:
    """The launch that normalises the first columns of x, as many as `out` has or dims say, into `out`; neither is
    empty."""
    element_size, width = x.element_size(), out.shape[-1]
    x, outer_stride, inner_stride, inner = _two_strides(x)
    columns = row_columns(width, element_size, device.lanes)
    aligned = vector(element_size, width, outer_stride, inner_stride)
    arguments = {
        "x": x, "out": out, "dims": None if dims is None else dims.contiguous(), "eps": eps,
        "dim": width // aligned, "inner": inner,
        "outer_stride": outer_stride // aligned, "inner_stride": inner_stride // aligned,
        "VECTOR": aligned, "COLUMNS": columns, "LEVELS": (-(-width // columns) - 1).bit_length(),
    }  # fmt: skip
    few = warps(1, columns, element_size, device.lanes)
    return Launch(normalize_kernel, (out.numel() // width, 1, 1), arguments, options(few))


def plan_normalize_backward(call: NormalizeBackwardCall, device: Device) -> Launch:
    """The launch that writes the gradient of an x that is not empty."""
    gradient, dims, eps, out = call.gradient, call.normalize.dims, call.normalize.eps, call.output()
    element_size, dim, width = out.element_size(), gradient.shape[-1], out.shape[-1]
    x, outer_stride, inner_stride, inner = _two_strides(call.normalize.x)
    columns = row_columns(width, element_size, device.lanes)
    aligned = vector(element_size, dim, width, outer_stride, inner_stride)
    arguments = {
        "gradient": gradient, "x": x, "out": out, "dims": None if dims is None else dims.contiguous(), "eps": eps,
        "dim": dim // aligned, "width": width // aligned, "inner": inner,
        "outer_stride": outer_stride // aligned, "inner_stride": inner_stride // aligned,
        "VECTOR": aligned, "COLUMNS": columns, "LEVELS": (-(-width // columns) - 1).bit_length(),
    }  # fmt: skip
    few = warps(1, columns, element_size, device.lanes)
    return Launch(normalize_backward_kernel, (out.numel() // width, 1, 1), arguments, options(few))


def plan_pool_backward(call: PoolBackwardCall, device: Device) -> list[Launch]:
    """The launches, one after another, of a call with at least one segment, row and column. The last has the gradient
    as its `out`."""
    pool, gradient, out = call.pool, call.gradient, call.output()
    hidden, mask, weights = pool.hidden, pool.mask, pool.weights
    element_size, dim, width = hidden.element_size(), gradient.shape[1], hidden.shape[-1]
    padded, cu, rows, batch = pool.padded, pool.cu_seqlens is not None, pool.rows, pool.batch
    skew, mask_skew, weight_skew = (_skew(x, rows, padded) for x in (hidden.select(-1, 0), mask, weights))
    starts = pool.cu_seqlens if cu else pool.starts
    family = SUM if pool.mode in ("cls", "last") else FAMILIES[pool.mode]
    known = {
        "gradient": gradient, "result": call.result, "hidden": hidden, "out": out, "mask": mask, "weights": weights,
        "starts": None if starts is None else starts.contiguous(),
        "ends": None if pool.ends is None else pool.ends.contiguous(),
        "spans": hidden.new_empty((batch, 2), dtype=torch.int64), "divisors": gradient.new_empty(batch),
        "products": gradient.new_empty(batch) if call.of_weights else None, "maxima": None,
        "mode": MODES[pool.mode].code, "batch": batch, "rows": rows, "mask_skew": mask_skew, "weight_skew": weight_skew,
        "token_stride": 0 if mask is None else mask.stride(-1),
        "weight_stride": 0 if weights is None else weights.stride(-1), "PADDED": padded, "CU": cu,
    }  # fmt: skip

    def planned(kernel: Any, grid: tuple[int, int, int], threads: int, **more: Any) -> Launch:
        values = {**known, **more}
        chosen = options(threads // device.lanes, sums=False)
        if kernel is backward.share_kernel and (padded or cu) and "maxnreg" in chosen:
            chosen["maxnreg"] = config.SHARE_REGISTERS
        return Launch(kernel, grid, {k: values[k] for k in kernel.arg_names}, chosen)

    def over_chunks(kernel: Any, width: int, aligned: int, **more: Any) -> Launch:
        columns, tile_rows = config.tile(width, element_size)
        strips = 1 if call.of_weights else -(-width // columns)
        total = batch * rows if padded else rows
        each = config.chunk(total, strips, tile_rows, device.processors)
        return planned(
            kernel, (-(-total // each), strips, 1), config.TILE_THREADS, dim=dim // aligned, width=width // aligned,
            chunk=each, FAMILY=family.value, VECTOR=aligned, COLUMNS=columns, ROWS=tile_rows, **more,
        )  # fmt: skip

    columns, _ = config.tile(dim, element_size)
    levels = (-(-dim // columns) - 1).bit_length()
    size, threads = config.scan(rows if padded else -(-rows // batch), family is WEIGHTED)
    launches = [
        planned(
            backward.prepare_kernel, (batch, 1, 1), threads, result=call.result if call.of_weights else None, dim=dim,
            FAMILY=(WEIGHTED if family is WEIGHTED else SUM).value, COLUMNS=columns, LEVELS=levels, SCAN=size,
        )
    ]  # fmt: skip
    read = vector(element_size, dim, hidden.stride(-2), skew)
    strides = {"skew": skew // read, "row_stride": hidden.stride(-2) // read}
    if call.of_weights:
        return [*launches, over_chunks(backward.share_of_weights_kernel, dim, read, LEVELS=levels, **strides)]
    if family is MAX:
        known["maxima"] = hidden.new_full((batch, dim), backward.NEVER.value, dtype=torch.int32)
        launches.append(over_chunks(backward.first_maximum_kernel, dim, read, **strides))
    return [*launches, over_chunks(backward.share_kernel, width, vector(element_size, dim, width))]


def _skew(per_token: Tensor | None, rows: int, padded: bool) -> int:
    """What there is between sequences beside their rows."""
    return per_token.stride(0) - rows * per_token.stride(1) if per_token is not None and padded else 0


def _batch_stride(per_token: Tensor | None) -> int:
    """Between sequences, in a mask or weights."""
    return per_token.stride(0) if per_token is not None and per_token.dim() == 2 else 0


def _two_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x, copied where its rows have more strides than a kernel takes; outer stride, inner stride, inner rows."""
    leading = _leading(x)
    if len(leading) > 2:
        x = x.contiguous()
        leading = _leading(x)
    (outer_stride, _), (inner_stride, inner) = ([(0, 1)] + leading)[-2:]
    return x, outer_stride, inner_stride, inner


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


def pool(call: PoolCall) -> Tensor:
    """Runs a PoolCall."""
    if call.batch == 0 or call.hidden.shape[-1] == 0:
        return call.output()
    _check_rows(call)
    device = device_of(call.hidden.device)
    launch = plan_pool(call, device)
    launch.run()
    out: Tensor = launch.arguments["out"]
    if call.normalize and launch.grid[1] > 1:
        # No program holds a whole row: it is normalised in a second launch, and rounded there.
        unrounded, out = out, call.output()
        plan_normalize(unrounded, NORM_EPS.value, out, device).run()
    return out


def _check_rows(call: PoolCall) -> None:
    if call.rows >= 2**31:
        raise RuntimeError(f"{call.op}: Triton kernels take fewer than 2^31 rows of a sequence, got {call.rows}")


def pool_backward(call: PoolBackwardCall) -> Tensor:
    """Runs a PoolBackwardCall."""
    if call.pool.batch == 0 or call.pool.hidden.numel() == 0:
        return call.output().zero_()
    _check_rows(call.pool)
    launches = plan_pool_backward(call, device_of(call.gradient.device))
    for launch in launches:
        launch.run()
    out: Tensor = launches[-1].arguments["out"]
    return out


def l2_normalize(call: NormalizeCall) -> Tensor:
    """Runs a NormalizeCall."""
    out: Tensor = call.output()
    if out.numel() > 0:
        plan_normalize(call.x, call.eps, out, device_of(out.device), call.dims).run()
    return out


def l2_normalize_backward(call: NormalizeBackwardCall) -> Tensor:
    """Runs a NormalizeBackwardCall."""
    if call.tensor.numel() == 0:
        return call.output()
    launch = plan_normalize_backward(call, device_of(call.tensor.device))
    launch.run()
    out: Tensor = launch.arguments["out"]
    return out
