"""Gradients of pooling: of hidden in two launches (max: four, to find first maxima), and of weights, in two.

`segment_prologue` finds each segment's bounds and divisor. What is written is then cut into chunks of rows, whatever
the layout: each program looks up which segments have tokens in its chunk and gives every row their shares, in the
order of segments. A row that two segments may hold (starts and ends) is added up in registers; others are what one
segment gives, once rounded where all tokens get the same, so that little but stores is left.

Rows are counted through the whole of hidden, padded or packed alike. Where sequences lie apart in memory, what is
between them beside their rows is a skew: row r of segment b stands at b * skew + r * row_stride.
"""

import triton
import triton.language as tl

from .finish import counts_tokens, divisor_of, quotient, round_to
from .segment import bounds, count_real, is_real, load_segment, next_overlap, overlap_range, selected, trim
from .state import LEAF, SUM, add_columns, empty_counters, empty_scalars, push, total, widen
from .weight import weight_of

COUNTERS = tl.constexpr(22)  # levels for 2^31 tokens, with 32 leaves side by side
STEPS = tl.constexpr(8)  # weights of a leaf whose loads are in flight together
NEVER = tl.constexpr(2**31 - 1)  # where a maximum is that has not been found


@triton.jit
def total_weight(mask, weights, token_stride, weight_stride, first, last, ACC: tl.constexpr, LEAVES: tl.constexpr):
    """The sum of the weights of the real tokens among [first, last), in the canonical order."""
    leaf = tl.arange(0, LEAVES)
    levels = empty_scalars(COUNTERS, ACC)
    groups = tl.cdiv(last - first, LEAF * LEAVES)
    for group in range(groups):
        weight = tl.zeros((LEAVES,), ACC)
        for some in range(0, LEAF, STEPS):
            for one in tl.static_range(STEPS):
                token = (group * LEAVES + leaf) * LEAF + some + one
                real = token < last - first
                if mask is not None:
                    real = is_real(mask, first, token, token_stride, real)
                weight += weight_of(weights, first + token, weight_stride, first, real, ACC)
        levels = push(levels, add_columns(weight), group, SUM)
    return total(levels, tl.zeros((), ACC), groups, SUM)


@triton.jit
def gradient_of(gradient, segment, there, divisor, dim, columns):
    """A segment's gradient over its divisor; 0 in columns from `dim` on, and where the segment is not there."""
    inside = (columns < dim) & there
    x = tl.load(gradient + segment * dim + columns, mask=inside, other=0.0)
    return tl.where(inside, quotient(x, divisor), 0.0)


@triton.jit
def product_of(gradient, result, segment, divisor, dim, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """The sum over columns of a segment's gradient, divided, times its result."""
    levels = empty_scalars(LEVELS + 1, divisor.dtype)
    pieces = tl.cdiv(dim, COLUMNS)
    for piece in range(pieces):
        columns = piece * COLUMNS + tl.arange(0, COLUMNS)
        x = gradient_of(gradient, segment, True, divisor, dim, columns)
        y = tl.load(result + segment * dim + columns, mask=columns < dim, other=0.0)
        levels = push(levels, add_columns(x * y), piece, SUM)
    return total(levels, tl.zeros((), divisor.dtype), pieces, SUM)


# Nothing is compiled anew for a batch's numbers, not even for a 1 or a multiple of 16.
_RUNTIME = [
    "select",
    "divisor",
    "batch",
    "rows",
    "dim",
    "width",
    "chunk",
    "skew",
    "row_stride",
    "mask_skew",
    "token_stride",
]
_RUNTIME += ["weight_skew", "weight_stride"]


@triton.jit(do_not_specialize=_RUNTIME)
def segment_prologue_kernel(
    gradient, result, mask, weights, starts, ends, segments, divisors, products,
    select, divisor, rows, dim, mask_skew, token_stride, weight_skew, weight_stride,
    WEIGHTED: tl.constexpr, PADDED: tl.constexpr, CU: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """A program a segment: its bounds and its divisor; where a result is given, their product too."""
    ACC: tl.constexpr = divisors.dtype.element_ty
    segment = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    first, last = bounds(starts, ends, segment, rows, CU)
    if PADDED:
        first += segment * rows
        last += segment * rows
    if mask is not None:
        mask += segment * mask_skew
        first, last = trim(mask, token_stride, first, last, SCAN)
    weight = tl.zeros((), ACC)
    count = last - first
    if WEIGHTED:
        if weights is not None:
            weights += segment * weight_skew
        weight = total_weight(mask, weights, token_stride, weight_stride, first, last, ACC, SCAN // LEAF)
    elif mask is not None:  # noqa: SIM102  # this is decided by the compiler, what follows by the call
        if counts_tokens(divisor):
            count, _ = count_real(mask, token_stride, first, last, SCAN)
    value = divisor_of(count, weight, divisor, ACC)
    tl.store(divisors + segment, value)
    if result is not None:
        product = product_of(gradient, result, segment, value, dim.to(tl.int64), COLUMNS, LEVELS)
        tl.store(products + segment, product)
    first, last = selected(first, last, select)
    tl.store(segments + segment * 2, first)
    tl.store(segments + segment * 2 + 1, last)


@triton.jit
def chunk_of(segments, starts, batch, rows, chunk, PADDED: tl.constexpr, CU: tl.constexpr):
    """This program's rows, [begin, end), and the segments that may have tokens there, [low, high)."""
    rows = rows.to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, batch * rows if PADDED else rows)
    low, high = overlap_range(segments, starts, begin, end, batch, rows, PADDED, CU)
    return begin, end, low, high


@triton.jit
def real_tokens(mask, segment, mask_skew, token_stride, row, first, last):
    """Which of the rows are real tokens of a segment that spans [first, last)."""
    real = (row >= first) & (row < last)
    if mask is not None:
        real = is_real(mask + segment * mask_skew, row, 0, token_stride, real)
    return real


@triton.jit(do_not_specialize=_RUNTIME)
def first_maximum_kernel(
    hidden, result, maxima, mask, starts, segments,
    batch, rows, dim, chunk, skew, row_stride, mask_skew, token_stride,
    PADDED: tl.constexpr, CU: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a chunk and strip: brings maxima [batch, dim] down to where the first maximum of each column is,
    counted from the segment's first real token. Whoever comes first: they are integers."""
    begin, end, low, high = chunk_of(segments, starts, batch, rows, chunk, PADDED, CU)
    dim = dim.to(tl.int64) * VECTOR
    row_step = row_stride.to(tl.int64) * VECTOR
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    segment = next_overlap(segments, low, high, begin, end)
    while segment < high:
        first, last = load_segment(segments, segment, True)
        y = tl.load(result + segment * dim + columns, mask=inside, other=0.0)[None, :]
        states = hidden + segment * (skew.to(tl.int64) * VECTOR) + columns[None, :]
        found = tl.full((TILE_ROWS, COLUMNS), NEVER, tl.int32)
        for at in range(tl.maximum(first, begin), tl.minimum(last, end), TILE_ROWS):
            row = at + tl.arange(0, TILE_ROWS)
            real = real_tokens(mask, segment, mask_skew, token_stride, row, first, tl.minimum(last, end))
            there = real[:, None] & inside[None, :]
            x = widen(tl.load(states + row[:, None] * row_step, mask=there, other=0.0), y.dtype)
            equal = there & ((x == y) | ((x != x) & (y != y)))
            found = tl.minimum(found, tl.where(equal, (row - first).to(tl.int32)[:, None], NEVER))
        first_found = tl.min(found, axis=0)
        tl.atomic_min(maxima + segment * dim + columns, first_found, mask=first_found < NEVER, sem="relaxed")
        segment = next_overlap(segments, segment + 1, high, begin, end)


@triton.jit
def maximum_of(maxima, segment, there, dim, columns):
    """Where the maxima of a segment are, if a gradient depends on them. A result that no token equals counts as the
    first one's."""
    if maxima is not None:
        found = tl.load(maxima + segment * dim + columns, mask=(columns < dim) & there, other=NEVER)
        return tl.where(found == NEVER, 0, found)
    else:
        return columns


@triton.jit
def token_gradient(
    x, maximum, weights, segment, weight_skew, weight_stride, row, first, real, maxima, WEIGHTED: tl.constexpr
):
    """What each of the rows that are `real` gets of a segment's gradient x, which the divisor has divided already;
    [1, COLUMNS] where all get the same."""
    if WEIGHTED:
        if weights is not None:
            weights += segment * weight_skew
        return weight_of(weights, row, weight_stride, first, real, x.dtype)[:, None] * x[None, :]
    elif maxima is not None:
        return tl.where((row - first).to(tl.int32)[:, None] == maximum[None, :], x[None, :], 0.0)
    else:
        return x[None, :]


@triton.jit
def store_rows(out, row, end, columns, width, x):
    at = out + row[:, None] * width + columns[None, :]
    tl.store(at, x, mask=(row < end)[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=_RUNTIME)
def scatter_gradient_kernel(
    gradient, out, mask, weights, maxima, starts, segments, divisors,
    batch, rows, dim, width, chunk, mask_skew, token_stride, weight_skew, weight_stride,
    WEIGHTED: tl.constexpr, PADDED: tl.constexpr, CU: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a chunk and strip of `out`, which has `width` columns: 0 from `dim` on. Both count VECTOR elements."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    begin, end, low, high = chunk_of(segments, starts, batch, rows, chunk, PADDED, CU)
    dim = dim.to(tl.int64) * VECTOR
    width = width.to(tl.int64) * VECTOR
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < dim)[None, :]
    if PADDED or CU:  # a row is of one segment, and of none those between one segment's last token and the next's first
        at = begin
        while at < end:
            segment = next_overlap(segments, low, high, at, end)
            there = segment < high
            first, last = load_segment(segments, segment, there)
            stop = tl.where(there, tl.minimum(last, end), end)
            divisor = tl.load(divisors + segment, mask=there, other=0.0)
            x = gradient_of(gradient, segment, there, divisor, dim, columns)
            maximum = maximum_of(maxima, segment, there, dim, columns)
            for some in range(at, stop, TILE_ROWS):
                row = some + tl.arange(0, TILE_ROWS)
                real = real_tokens(mask, segment, mask_skew, token_stride, row, first, last)
                y = token_gradient(
                    x, maximum, weights, segment, weight_skew, weight_stride, row, first, real, maxima, WEIGHTED
                )
                y = round_to(y + 0.0, out.dtype.element_ty)  # never -0, as if added to +0
                store_rows(out, row, stop, columns, width, tl.where(real[:, None] & inside, y, 0.0))
            at = stop
            low = segment + 1
    else:
        for at in range(begin, end, TILE_ROWS):
            row = at + tl.arange(0, TILE_ROWS)
            stop = tl.minimum(at + TILE_ROWS, end)
            x = tl.zeros((TILE_ROWS, COLUMNS), ACC)
            segment = next_overlap(segments, low, high, at, stop)
            while segment < high:
                first, last = load_segment(segments, segment, True)
                divisor = tl.load(divisors + segment)
                y = gradient_of(gradient, segment, True, divisor, dim, columns)
                maximum = maximum_of(maxima, segment, True, dim, columns)
                real = real_tokens(mask, segment, mask_skew, token_stride, row, first, last)
                y = token_gradient(
                    y, maximum, weights, segment, weight_skew, weight_stride, row, first, real, maxima, WEIGHTED
                )
                x += tl.where(real[:, None] & inside, y, 0.0)
                segment = next_overlap(segments, segment + 1, high, at, stop)
            store_rows(out, row, stop, columns, width, round_to(x, out.dtype.element_ty))


@triton.jit(do_not_specialize=_RUNTIME)
def scatter_weight_gradient_kernel(
    gradient, hidden, out, mask, starts, segments, divisors, products,
    batch, rows, dim, chunk, skew, row_stride, mask_skew, token_stride,
    PADDED: tl.constexpr, CU: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a chunk of weights, each of which gets its token times the segment's gradient, less their product."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    begin, end, low, high = chunk_of(segments, starts, batch, rows, chunk, PADDED, CU)
    dim = dim.to(tl.int64) * VECTOR
    row_step = row_stride.to(tl.int64) * VECTOR
    pieces = tl.cdiv(dim, COLUMNS)
    for at in range(begin, end, TILE_ROWS):
        row = at + tl.arange(0, TILE_ROWS)
        stop = tl.minimum(at + TILE_ROWS, end)
        x = tl.zeros((TILE_ROWS,), ACC)
        segment = next_overlap(segments, low, high, at, stop)
        while segment < high:
            first, last = load_segment(segments, segment, True)
            divisor = tl.load(divisors + segment)
            real = real_tokens(mask, segment, mask_skew, token_stride, row, first, last)
            states = hidden + segment * (skew.to(tl.int64) * VECTOR) + row[:, None] * row_step
            levels, _ = empty_counters(row, LEVELS + 1, SUM, ACC)
            for piece in range(pieces):
                columns = piece * COLUMNS + tl.arange(0, COLUMNS)
                y = gradient_of(gradient, segment, True, divisor, dim, columns)
                there = real[:, None] & (columns < dim)[None, :]
                state = widen(tl.load(states + columns[None, :], mask=there, other=0.0), ACC)
                levels = push(levels, add_columns(y[None, :] * state), piece, SUM)
            product = total(levels, tl.zeros((TILE_ROWS,), ACC), pieces, SUM)
            x += tl.where(real, product - tl.load(products + segment), 0.0)
            segment = next_overlap(segments, segment + 1, high, at, stop)
        tl.store(out + row, round_to(x, out.dtype.element_ty), mask=row < end)
