"""l2_normalize and its gradient: a program a row. Rows wider than a program's registers are walked tile by tile."""

import triton
import triton.language as tl

from .elementary import divide
from .finish import norm_divisor, norm_scale, normalize, round_to, scaled_norm, square_root
from .state import SUM, accumulator_of, add_columns, counter, push, total, widen


@triton.jit
def used_columns(truncate_dims, program, width):
    """How many columns of a program's row are used, within [0, width] whatever truncate_dims hold."""
    if truncate_dims is not None:
        return tl.minimum(tl.maximum(tl.load(truncate_dims + program).to(tl.int64), 0), width)
    else:
        return width


@triton.jit
def forget(x, columns, used, truncate_dims):
    """0 where columns are not used; without truncate_dims there are no such columns."""
    if truncate_dims is not None:
        return tl.where(columns < used, x, 0.0)
    else:
        return x


@triton.jit
def load_used(x, columns, used, truncate_dims, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """Columns of a row, 0 where they are not used. Loads stay whole, whatever truncate_dims hold; the rest is
    forgotten."""
    loaded = used
    if truncate_dims is not None:
        loaded = tl.cdiv(used, VECTOR) * VECTOR
    return forget(widen(tl.load(x + columns, mask=columns < loaded, other=0.0), ACC), columns, used, truncate_dims)


@triton.jit
def sum_of_squares(
    x, used, truncate_dims, scale, VECTOR: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr
):
    """The sum of the squares of a row, times `scale`, in the canonical order; the row has up to 2^LEVELS tiles."""
    nothing = (tl.zeros((), ACC),)
    levels = counter(nothing, LEVELS + 1)
    tiles = tl.cdiv(used, COLUMNS)
    for tile in range(tiles):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        part = load_used(x, columns, used, truncate_dims, VECTOR, ACC) * scale
        levels = push(levels, (add_columns(part * part),), tile, SUM)
    return total(levels, nothing, tiles, SUM)[0]


@triton.jit
def wide_norm(x, used, truncate_dims, eps, VECTOR: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """scaled_norm's divisor, whether it is the norm, and scale, tile by tile."""
    scale = tl.full((), 1.0, eps.dtype)
    squares = sum_of_squares(x, used, truncate_dims, scale, VECTOR, eps.dtype, COLUMNS, LEVELS)
    scale = norm_scale(squares, eps)
    norm = square_root(squares)
    if scale != 1:
        squares = sum_of_squares(x, used, truncate_dims, scale * scale, VECTOR, eps.dtype, COLUMNS, LEVELS)
        norm = divide(square_root(squares), scale)
    divisor, is_norm = norm_divisor(norm, scale, eps)
    return divisor, is_norm, scale


@triton.jit(do_not_specialize=["dim", "inner", "outer_stride", "inner_stride"])
def normalize_kernel(
    x, out, truncate_dims, eps: tl.float64, dim, inner, outer_stride, inner_stride,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """out [outer * inner, dim]; 0 from column truncate_dims[row] on, where there are any, [outer * inner]. `dim` and
    strides count VECTOR elements, as in pool_kernel."""
    ACC: tl.constexpr = accumulator_of(x.dtype.element_ty)
    program = tl.program_id(0).to(tl.int64)
    x += (program // inner * outer_stride + program % inner * inner_stride) * VECTOR
    width = dim.to(tl.int64) * VECTOR
    out += program * width
    used = used_columns(truncate_dims, program, width)
    eps = tl.full((), eps, ACC)
    columns = tl.arange(0, COLUMNS)
    if LEVELS == 0:
        row = normalize(load_used(x, columns, used, truncate_dims, VECTOR, ACC), eps)
        row = forget(row, columns, used, truncate_dims)
        tl.store(out + columns, round_to(row, out.dtype.element_ty), mask=columns < width)
    else:
        divisor, _, scale = wide_norm(x, used, truncate_dims, eps, VECTOR, COLUMNS, LEVELS)
        for tile in range(tl.cdiv(width, COLUMNS)):
            at = tile * COLUMNS + columns
            quotient = divide(load_used(x, at, used, truncate_dims, VECTOR, ACC) * scale, divisor)
            quotient = forget(quotient, at, used, truncate_dims)
            tl.store(out + at, round_to(quotient, out.dtype.element_ty), mask=at < width)


@triton.jit
def across(z, gradient, is_norm, along):
    """The part of a gradient that turns x; all of it where the norm is below eps. `along`: sum(z * gradient)."""
    return tl.where(is_norm, gradient - z * along, gradient)


@triton.jit(do_not_specialize=["dim", "width", "inner", "outer_stride", "inner_stride"])
def normalize_backward_kernel(
    gradient, x, out, truncate_dims, eps: tl.float64, dim, width, inner, outer_stride, inner_stride,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """out [outer * inner, width] from gradient [outer * inner, dim]; 0 from column `dim` on, or truncate_dims[row]. All
    count VECTOR elements."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    x += (program // inner * outer_stride + program % inner * inner_stride) * VECTOR
    dim = dim.to(tl.int64) * VECTOR
    width = width.to(tl.int64) * VECTOR
    gradient += program * dim
    out += program * width
    used = used_columns(truncate_dims, program, dim)
    eps = tl.full((), eps, ACC)
    columns = tl.arange(0, COLUMNS)
    if LEVELS == 0:
        inside = columns < used
        g = load_used(gradient, columns, used, truncate_dims, VECTOR, ACC)
        row, divisor, is_norm, scale = scaled_norm(load_used(x, columns, used, truncate_dims, VECTOR, ACC), eps)
        z = divide(row, divisor)
        along = add_columns(tl.where(inside, z * g, 0.0)) + 0.0  # never -0, as a total of tiles is not
        result = divide(across(z, g, is_norm, along) * scale, divisor)
        tl.store(out + columns, round_to(tl.where(inside, result, 0.0), out.dtype.element_ty), mask=columns < width)
    else:
        divisor, is_norm, scale = wide_norm(x, used, truncate_dims, eps, VECTOR, COLUMNS, LEVELS)
        nothing = (tl.zeros((), ACC),)
        levels = counter(nothing, LEVELS + 1)
        tiles = tl.cdiv(used, COLUMNS)
        for tile in range(tiles):
            at = tile * COLUMNS + columns
            g = load_used(gradient, at, used, truncate_dims, VECTOR, ACC)
            z = divide(load_used(x, at, used, truncate_dims, VECTOR, ACC) * scale, divisor)
            levels = push(levels, (add_columns(tl.where(at < used, z * g, 0.0)),), tile, SUM)
        along = total(levels, nothing, tiles, SUM)[0]
        for tile in range(tl.cdiv(width, COLUMNS)):
            at = tile * COLUMNS + columns
            g = load_used(gradient, at, used, truncate_dims, VECTOR, ACC)
            z = divide(load_used(x, at, used, truncate_dims, VECTOR, ACC) * scale, divisor)
            result = divide(across(z, g, is_norm, along) * scale, divisor)
            tl.store(out + at, round_to(tl.where(at < used, result, 0.0), out.dtype.element_ty), mask=at < width)
