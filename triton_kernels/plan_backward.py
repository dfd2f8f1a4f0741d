"""From a call for a gradient of pooling to launches, as plan.py has it of pooling itself."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calls import PoolBackwardCall
from ..constants import LEAF
from ..modes import MODES
from . import backward, config
from .config import LOAD_BYTES, registers
from .launch import Launch, options
from .plan import DeviceProperties, Part, PoolPlan, make_pool_plan, of_query, per_token, pieces, query_strides, vector

_OF_SEGMENTS = ("gradient", "divisors", "products", "exponents")
_BROUGHT = {*_OF_SEGMENTS, "result", "hidden", "out", "mask", "weights", "query", "starts", "ends"}
_BROUGHT |= {"segments", "maxima", "scale"}


def make_pool_backward_plan(call: PoolBackwardCall, device: DeviceProperties) -> list[Part | PoolPlan]:
    """The plans of the launches, in their order, of a call with at least one segment, query, row and column."""
    pool, hidden = call.pool, call.pool.hidden
    element_size, dim, width = hidden.element_size(), call.gradient.shape[-1], hidden.shape[-1]
    padded, cu, rows, batch = pool.padded, pool.cu_seqlens is not None, pool.rows, pool.batch
    mode, weights = MODES[pool.mode], per_token(pool)
    skew, mask_skew, weight_skew = (_skew(x, rows, padded) for x in (hidden.select(-1, 0), pool.mask, weights))
    several = not padded and not cu  # segments may hold a row
    shared = {
        "select": mode.select.value, "divisor": mode.divisor.value, "batch": batch, "rows": rows,
        "mask_skew": mask_skew, "weight_skew": weight_skew, "skew": None, "row_stride": None,
        "token_stride": 0 if pool.mask is None else pool.mask.stride(-1),
        "weight_stride": 0 if weights is None else weights.stride(-1),
        "WEIGHT": mode.weight.value, "PADDED": padded, "CU": cu,
    }  # fmt: skip
    read = vector(element_size, dim, hidden.stride(-2), skew, *query_strides(pool))
    of_rows = {"skew": skew // read, "row_stride": hidden.stride(-2) // read}
    reads = mode.takes_query  # even where a maximum or a weight does not
    dot = width if mode.takes_query else dim  # columns of the widest product

    def planned(kernel: Any, grid: tuple[int, int, int], threads: int, vector_width: int, **more: Any) -> Part:
        values = {**shared, **of_query(pool, vector_width), "dim": dim // vector_width, "VECTOR": vector_width, **more}
        if reads:
            values |= of_rows
        num_warps = threads // device.warp_size
        most = registers(num_warps, shared=False)
        if kernel is backward.scatter_gradient_kernel and not several and not mode.takes_query:
            many = mode.gradient_finds_maximum or values["COLUMNS"] * element_size <= LOAD_BYTES
            most = registers(num_warps) if many else config.SCATTER_REGISTERS
        names = tuple(name for name in kernel.arg_names if name in _BROUGHT)
        fixed = {name: values[name] for name in kernel.arg_names if name not in _BROUGHT}
        return Part(kernel, grid, names, fixed, options(num_warps, most))

    def over_chunks(kernel: Any, written: int, vector_width: int, strips: int | None = None, **more: Any) -> Part:
        columns, tile_rows = config.tile(written, element_size)
        if several:
            one_load = config.TILE_THREADS * LOAD_BYTES // (columns * element_size)
            tile_rows = min(tile_rows, max(config.SEVERAL_ROWS, one_load))
        if reads:
            tile_rows = 1  # as in config.one_row
        strips = strips or -(-written // columns)
        total = batch * rows if padded else rows
        each = config.chunk(total, strips, tile_rows, device.sm_count)
        threads = max(device.warp_size, min(config.TILE_THREADS, tile_rows * columns * element_size // LOAD_BYTES))
        return planned(
            kernel, (-(-total // each), strips, 1), threads, vector_width, width=written // vector_width,
            chunk=each, COLUMNS=columns, PIECES=pieces(dot, columns), TILE_ROWS=tile_rows, **more,
        )  # fmt: skip

    columns, tile_rows = config.tile(dot, element_size)
    # A segment's tokens are read where there is a query: as many side by side as elsewhere.
    size, threads = config.scan(0 if reads else rows if padded else -(-rows // batch), mode.weighted)
    leaves = min(size // LEAF, tile_rows) if reads else size // LEAF
    prologue = planned(
        backward.segment_prologue_kernel, (batch * pool.queries, 1, 1), threads, read if reads else 1,
        COLUMNS=columns, PIECES=pieces(dot, columns), LEAVES=leaves, SCAN=size,
    )  # fmt: skip
    if call.of == "query":
        whole = replace(pool, truncate_dim=None, normalize=False, out_dtype=call.gradient.dtype)
        return [prologue, make_pool_plan(whole, device, dim)]
    if call.of != "hidden":
        return [prologue, over_chunks(backward.scatter_weight_gradient_kernel, dim, read, 1, **of_rows)]
    parts: list[Part | PoolPlan] = [prologue]
    if mode.gradient_finds_maximum:
        parts.append(over_chunks(backward.first_maximum_kernel, dim, read, **of_rows))
    written = read if reads else vector(element_size, dim, width)
    return [*parts, over_chunks(backward.scatter_gradient_kernel, width, written)]


def launch_parts(parts: list[Part | PoolPlan], call: PoolBackwardCall) -> list[Launch]:
    """The launches planned for such a call, with memory for the result, the `out` of the last, and for what they leave
    each other."""
    pool, gradient = call.pool, call.gradient
    mode, batch, vectors = MODES[pool.mode], pool.batch, pool.batch * pool.queries
    starts = pool.starts if pool.cu_seqlens is None else pool.cu_seqlens
    finds_maxima = mode.gradient_finds_maximum
    multiplies = call.needs_result and not finds_maxima
    tensors: dict[str, Any] = {
        "gradient": gradient, "result": call.result, "hidden": pool.hidden,
        "out": None if call.of == "query" else call.output(),  # the last launch brings its own
        "mask": pool.mask, "weights": per_token(pool), "query": pool.query,
        "starts": None if starts is None else starts.contiguous(),
        "ends": None if pool.ends is None else pool.ends.contiguous(),
        "segments": gradient.new_empty(batch, 2, dtype=torch.int64), "divisors": gradient.new_empty(vectors),
        "products": gradient.new_empty(vectors) if multiplies else None,
        "exponents": gradient.new_empty(vectors) if mode.softmax else None,
        "maxima": gradient.new_full(gradient.shape, backward.NEVER.value, dtype=torch.int32) if finds_maxima else None,
        "scale": pool.scale,
    }  # fmt: skip
    hidden = {} if mode.takes_query else {"hidden": None}  # who does not read it must not be compiled for it
    absent: dict[Any, dict[str, None]] = {
        backward.segment_prologue_kernel: hidden if multiplies else {**hidden, "result": None},
        backward.scatter_gradient_kernel: hidden,
    }
    launches = []
    for part in parts:
        if isinstance(part, PoolPlan):
            launches.append(part.launch(pool, **{name: tensors[name] for name in _OF_SEGMENTS}))
        else:
            launches.append(part.launch(tensors | absent.get(part.kernel, {})))
    return launches


def plan_pool_backward(call: PoolBackwardCall, device: DeviceProperties) -> list[Launch]:
    """The launches, one after another, of a call with at least one segment, query, row and column. The last has the
    gradient as its `out`."""
    return launch_parts(make_pool_backward_plan(call, device), call)


def _skew(x: Tensor | None, rows: int, padded: bool) -> int:
    """What there is between sequences beside their rows."""
    return x.stride(0) - rows * x.stride(1) if x is not None and padded else 0
