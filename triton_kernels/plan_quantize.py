"""From a call of quantize to its launch."""

import torch

from ..calls import QuantizeCall
from .config import registers, row_columns, warps
from .launch import Launch, options
from .plan import DeviceProperties, Part, leading, two_strides, vector
from .quantize import quantize_kernel


def make_quantize_plan(call: QuantizeCall, device: DeviceProperties) -> Part:
    """The plan of a call whose x is not empty."""
    x, width, row = call.x, call.columns, call.row
    outer_stride, inner_stride, inner = two_strides(x)
    columns = row_columns(width, x.element_size(), device.warp_size)
    vector_width = vector(x.element_size(), width, outer_stride, inner_stride)
    fixed = {
        "zero_bit": int(call.zero_bit), "flip": row.flip, "dim": width // vector_width, "inner": inner,
        "outer_stride": outer_stride // vector_width, "inner_stride": inner_stride // vector_width,
        "ranges_stride": 0 if call.ranges is None else call.ranges.stride(0),
        "HOW": row.how.value, "VECTOR": vector_width, "COLUMNS": columns,
    }  # fmt: skip
    num_warps = warps(1, columns, x.element_size(), device.warp_size)
    grid = (x.shape[:-1].numel(), 1, 1)
    return Part(quantize_kernel, grid, ("x", "out", "ranges"), fixed, options(num_warps, registers(num_warps)))


def launch_quantize(part: Part, call: QuantizeCall, out: torch.Tensor) -> Launch:
    """x is copied where its rows have more strides than a kernel takes."""
    x = call.x.contiguous() if len(leading(call.x)) > 2 else call.x
    return part.launch({"x": x, "out": out.view(torch.uint8), "ranges": call.ranges})


def plan_quantize(call: QuantizeCall, device: DeviceProperties) -> Launch:
    """The launch of a call whose x is not empty."""
    return launch_quantize(make_quantize_plan(call, device), call, call.output())
