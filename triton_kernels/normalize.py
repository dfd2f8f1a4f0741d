"""l2_normalize: a program a row. Rows wider than a program's registers are walked tile by tile."""

import triton
import triton.language as tl

from .epilogue import divide, norm_divisor, norm_scale, normalize, round_to
from .reduce import SUM, add_columns, push, total, widen


@triton.jit
def sum_of_squares(x, width, scale, ACC: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """Of a row of up to 2^LEVELS tiles, times `scale`."""
    levels = ()
    for _ in tl.static_range(LEVELS + 1):
        levels = levels + (tl.zeros((), ACC),)
    tiles = tl.cdiv(width, COLUMNS)
    for tile in range(tiles):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        part = widen(tl.load(x + columns, mask=columns < width, other=0.0), ACC) * scale
        levels = push(levels, add_columns(part * part), tile, SUM)
    return total(levels, tl.zeros((), ACC), tiles, SUM)


@triton.jit(do_not_specialize=["dim", "inner", "outer_stride", "inner_stride"])
def normalize_kernel(
    x, out, eps: tl.float64, dim, inner, outer_stride, inner_stride,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """out [outer * inner, dim]. `dim` and strides count VECTOR elements, as in pool_kernel."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    x += (program // inner * outer_stride + program % inner * inner_stride) * VECTOR
    width = dim.to(tl.int64) * VECTOR
    out += program * width
    eps = tl.full((), eps, ACC)
    columns = tl.arange(0, COLUMNS)
    if LEVELS == 0:
        inside = columns < width
        row = widen(tl.load(x + columns, mask=inside, other=0.0), ACC)
        tl.store(out + columns, round_to(normalize(row, eps), out.dtype.element_ty), mask=inside)
    else:
        scale = tl.full((), 1.0, ACC)
        squares = sum_of_squares(x, width, scale, ACC, COLUMNS, LEVELS)
        scale = norm_scale(squares)
        if scale != 1:
            squares = sum_of_squares(x, width, scale, ACC, COLUMNS, LEVELS)
        divisor = norm_divisor(squares, scale, eps)
        for tile in range(tl.cdiv(width, COLUMNS)):
            at = tile * COLUMNS + columns
            part = widen(tl.load(x + at, mask=at < width, other=0.0), ACC) * scale
            quotient = divide(part, divisor)
            tl.store(out + at, round_to(quotient, out.dtype.element_ty), mask=at < width)
