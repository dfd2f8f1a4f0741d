"""Gradients of pooling: of hidden in two launches (max: four, to find first maxima), of weights or scores in two, and
of queries in two, of which the second is pool_kernel's.

`segment_prologue` finds each segment's bounds and, for each of its queries, divisor and exponent. What is written is
then cut into chunks of rows, whatever the layout: each program looks up which segments have tokens in its chunk and
gives every row their shares, in the order of segments. A row that two segments may hold (starts and ends) is added up
in registers; others are what one segment gives, once rounded where all tokens get the same, so that little but stores
is left.

Rows are counted through the whole of hidden, padded or packed alike. Where sequences lie apart in memory, what is
between them beside their rows is a skew: row r of segment b stands at b * skew + r * row_stride.
"""

import triton
import triton.language as tl

from .finish import counts_tokens, divisor_of, round_to
from .segment import bounds, count_real, is_real, load_segment, next_overlap, overlap_range, selected, trim
from .state import (
    LEAF,
    ONE,
    QUERY,
    SCALED,
    SCORE,
    SUM,
    counter,
    merge_rows,
    merging,
    neutral_state,
    push,
    sums_weights,
    total,
    widen,
)
from .weight import load_share, load_vector, product, score_of, softmax_weight, weight_gradient, weight_of

NEVER = tl.constexpr(2**31 - 1)  # where a maximum is that has not been found


@triton.constexpr_function
def steps_of(weight):
    """How many of a leaf's weights have their loads in flight together: fewer where powers take registers meanwhile;
    products take long to compile."""
    if weight == QUERY:
        return 1
    return 4 if weight == SCORE else 8


@triton.constexpr_function
def counters(leaves):
    """Levels for 2^31 tokens, with so many leaves side by side."""
    return (2**31 // (LEAF.value * leaves)).bit_length()


@triton.jit
def total_weight(
    hidden, mask, source, row_step, token_stride, first, last,
    WEIGHT: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """The state of the weights of the real tokens among [first, last): their sum, and the exponent of a softmax."""
    MERGE: tl.constexpr = merging(SUM, WEIGHT)
    steps: tl.constexpr = steps_of(WEIGHT)
    leaf = tl.arange(0, LEAVES)
    nothing = neutral_state((1,), (), MERGE, False, ACC)
    levels = counter(nothing, counters(LEAVES))
    groups = tl.cdiv(last - first, LEAF * LEAVES)
    for group in range(groups):
        state = neutral_state((LEAVES, 1), (LEAVES, 1), MERGE, False, ACC)
        for some in range(0, LEAF, steps):
            for one in tl.static_range(steps):
                token = (group * LEAVES + leaf) * LEAF + some + one
                real = token < last - first
                if mask is not None:
                    real = is_real(mask, first, token, token_stride, real)
                row = first + token
                at = hidden + row[:, None] * row_step if hidden is not None else None
                if MERGE == SCALED:
                    score = score_of(source, at, row, real, ACC, COLUMNS, PIECES)[:, None]
                    weight, of_sum, exponent = softmax_weight(score, state[1])
                    state = (state[0] * of_sum + weight, exponent)
                else:
                    weight = weight_of(source, None, at, row, first, real, WEIGHT, ACC, COLUMNS, PIECES)
                    state = (state[0] + weight[:, None],)
        levels = push(levels, merge_rows(state, MERGE), group, MERGE)
    state = total(levels, nothing, groups, MERGE)
    return (tl.sum(state[0], axis=0),) + state[1:]  # of one element


@triton.jit
def gradient_of(share, there, columns):
    """A segment's gradient over its divisor; 0 in columns that it does not have, and where it is not there."""
    return load_vector(share[0], share[2], columns, (columns < share[1]) & there, share[2].dtype)


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
_RUNTIME += ["weight_skew", "weight_stride", "query_batch_stride", "query_stride", "queries"]


@triton.jit(do_not_specialize=_RUNTIME)
def segment_prologue_kernel(
    gradient, result, hidden, mask, weights, query, starts, ends, segments, divisors, products, exponents,
    scale: tl.float64, select, divisor, rows, dim, skew, row_stride, mask_skew, token_stride, weight_skew,
    weight_stride, query_batch_stride, query_stride, width, queries,
    WEIGHT: tl.constexpr, PADDED: tl.constexpr, CU: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, LEAVES: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """A program a segment, or query of one: its bounds, its divisor and, of a softmax, its exponent; where products are
    wanted, that of the gradient and the result too."""
    ACC: tl.constexpr = divisors.dtype.element_ty
    vector = tl.program_id(0).to(tl.int64)
    segment = vector
    rows = rows.to(tl.int64)
    dim = dim.to(tl.int64) * VECTOR
    row_step = None
    if query is not None:
        segment = vector // queries
        query += (segment * query_batch_stride + vector % queries * query_stride) * VECTOR
        width = width.to(tl.int64) * VECTOR
        hidden += segment * (skew.to(tl.int64) * VECTOR)
        row_step = row_stride.to(tl.int64) * VECTOR
    first, last = bounds(starts, ends, segment, rows, CU)
    if PADDED:
        first += segment * rows
        last += segment * rows
    if mask is not None:
        mask += segment * mask_skew
        first, last = trim(mask, token_stride, first, last, SCAN)
    weight = tl.zeros((), ACC)
    count = last - first
    if sums_weights(WEIGHT):
        source = (weights, segment * weight_skew, weight_stride, query, width, tl.full((), scale, ACC))
        state = total_weight(
            hidden, mask, source, row_step, token_stride, first, last, WEIGHT, ACC, COLUMNS, PIECES, LEAVES
        )
        weight = state[0]
        if exponents is not None:
            tl.store(exponents + vector, state[1])
    elif mask is not None:  # noqa: SIM102  # this is decided by the compiler, what follows by the call
        if counts_tokens(divisor):
            count, _ = count_real(mask, token_stride, first, last, SCAN)
    value = divisor_of(count, weight, divisor, ACC)
    tl.store(divisors + vector, value)
    if products is not None:
        row = result + vector * dim + tl.zeros((1, 1), tl.int32)
        there = tl.full((1,), True, tl.int1)
        along = product(row, there, gradient + vector * dim, value, dim, ACC, COLUMNS, PIECES)
        tl.store(products + vector, tl.sum(along, axis=0))  # of one element
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
def token_gradient(x, maximum, source, share, row, first, real, maxima, WEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    """What each of the rows that are `real` gets of a segment's gradient x, which the divisor has divided already;
    [1, COLUMNS] where all get the same."""
    if WEIGHT != ONE:
        return weight_of(source, share, None, row, first, real, WEIGHT, x.dtype, COLUMNS, 0)[:, None] * x[None, :]
    elif maxima is not None:
        return tl.where((row - first).to(tl.int32)[:, None] == maximum[None, :], x[None, :], 0.0)
    else:
        return x[None, :]


@triton.jit
def add_queries(x, hidden, query, query_step, width, scale, shares, vector, queries, row, real, columns,
    COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """x after what rows, pointers `hidden` [N, 1], get from each query of a segment, the first of which is number
    `vector`: of its gradient, and of its product with the token."""
    for k in range(queries):
        source = (None, 0, 0, query + k * query_step, width, scale)
        share = load_share(shares, vector + k, True)
        weight = weight_of(source, share, hidden, row, 0, real, QUERY, x.dtype, COLUMNS, PIECES)
        of_product = (weight_gradient(share, hidden, real, x.dtype, COLUMNS, PIECES) * weight) * scale
        y = weight[:, None] * gradient_of(share, True, columns)[None, :]
        x += tl.where(real[:, None] & (columns < share[1])[None, :], y, 0.0)
        y = of_product[:, None] * load_vector(query + k * query_step, None, columns, columns < width, x.dtype)[None, :]
        x += tl.where(real[:, None], y, 0.0)
    return x


@triton.jit
def store_rows(out, row, end, columns, width, x):
    at = out + row[:, None] * width + columns[None, :]
    tl.store(at, x, mask=(row < end)[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=_RUNTIME)
def scatter_gradient_kernel(
    gradient, out, hidden, mask, weights, query, maxima, starts, segments, divisors, products, exponents,
    scale: tl.float64, batch, rows, dim, width, chunk, skew, row_stride, mask_skew, token_stride, weight_skew,
    weight_stride, query_batch_stride, query_stride, queries,
    WEIGHT: tl.constexpr, PADDED: tl.constexpr, CU: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a chunk and strip of `out`, which has `width` columns; 0 from `dim` on, but for what depends on a
    query. Both count VECTOR elements."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    begin, end, low, high = chunk_of(segments, starts, batch, rows, chunk, PADDED, CU)
    dim = dim.to(tl.int64) * VECTOR
    width = width.to(tl.int64) * VECTOR
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < dim)[None, :]
    shares = (gradient, dim, divisors, products, exponents)
    if WEIGHT == QUERY:
        scale = tl.full((), scale, ACC)
        row_step = row_stride.to(tl.int64) * VECTOR
        query_step = query_stride.to(tl.int64) * VECTOR
    if PADDED or CU:  # a row is of one segment, and of none those between one segment's last token and the next's first
        at = begin
        while at < end:
            segment = next_overlap(segments, low, high, at, end)
            there = segment < high
            first, last = load_segment(segments, segment, there)
            stop = tl.where(there, tl.minimum(last, end), end)
            if WEIGHT != QUERY:
                share = load_share(shares, segment, there)
                x = gradient_of(share, there, columns)
                maximum = maximum_of(maxima, segment, there, dim, columns)
                source = (weights, segment * weight_skew, weight_stride, None, None, None)
            for some in range(at, stop, TILE_ROWS):
                row = some + tl.arange(0, TILE_ROWS)
                real = real_tokens(mask, segment, mask_skew, token_stride, row, first, last)
                if WEIGHT == QUERY:
                    y = tl.zeros((TILE_ROWS, COLUMNS), ACC)
                    if there:
                        y = add_queries(
                            y, hidden + segment * (skew.to(tl.int64) * VECTOR) + row[:, None] * row_step,
                            query + segment * (query_batch_stride.to(tl.int64) * VECTOR), query_step, width, scale,
                            shares, segment * queries, queries, row, real, columns, COLUMNS, PIECES,
                        )  # fmt: skip
                    store_rows(out, row, stop, columns, width, round_to(y, out.dtype.element_ty))
                else:
                    y = token_gradient(x, maximum, source, share, row, first, real, maxima, WEIGHT, COLUMNS)
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
                real = real_tokens(mask, segment, mask_skew, token_stride, row, first, last)
                if WEIGHT == QUERY:
                    x = add_queries(
                        x, hidden + row[:, None] * row_step,
                        query + segment * (query_batch_stride.to(tl.int64) * VECTOR), query_step, width, scale,
                        shares, segment * queries, queries, row, real, columns, COLUMNS, PIECES,
                    )  # fmt: skip
                else:
                    share = load_share(shares, segment, True)
                    y = gradient_of(share, True, columns)
                    maximum = maximum_of(maxima, segment, True, dim, columns)
                    source = (weights, segment * weight_skew, weight_stride, None, None, None)
                    y = token_gradient(y, maximum, source, share, row, first, real, maxima, WEIGHT, COLUMNS)
                    x += tl.where(real[:, None] & inside, y, 0.0)
                segment = next_overlap(segments, segment + 1, high, at, stop)
            store_rows(out, row, stop, columns, width, round_to(x, out.dtype.element_ty))


@triton.jit(do_not_specialize=_RUNTIME)
def scatter_weight_gradient_kernel(
    gradient, hidden, out, mask, weights, starts, segments, divisors, products, exponents,
    batch, rows, dim, chunk, skew, row_stride, mask_skew, token_stride, weight_skew, weight_stride,
    WEIGHT: tl.constexpr, PADDED: tl.constexpr, CU: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a chunk of weights, or of scores. A weight gets its token times the segment's gradient, less their
    product; a score that times its weight."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    begin, end, low, high = chunk_of(segments, starts, batch, rows, chunk, PADDED, CU)
    shares = (gradient, dim.to(tl.int64) * VECTOR, divisors, products, exponents)
    row_step = row_stride.to(tl.int64) * VECTOR
    for at in range(begin, end, TILE_ROWS):
        row = at + tl.arange(0, TILE_ROWS)
        stop = tl.minimum(at + TILE_ROWS, end)
        x = tl.zeros((TILE_ROWS,), ACC)
        segment = next_overlap(segments, low, high, at, stop)
        while segment < high:
            first, last = load_segment(segments, segment, True)
            real = real_tokens(mask, segment, mask_skew, token_stride, row, first, last)
            states = hidden + segment * (skew.to(tl.int64) * VECTOR) + row[:, None] * row_step
            share = load_share(shares, segment, True)
            y = weight_gradient(share, states, real, ACC, COLUMNS, PIECES)
            if WEIGHT == SCORE:
                source = (weights, segment * weight_skew, weight_stride, None, None, None)
                y *= weight_of(source, share, None, row, first, real, WEIGHT, ACC, COLUMNS, PIECES)
            x += tl.where(real, y, 0.0)
            segment = next_overlap(segments, segment + 1, high, at, stop)
        tl.store(out + row, round_to(x, out.dtype.element_ty), mask=row < end)
