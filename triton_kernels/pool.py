"""The pooling kernel: every mode, both layouts, the whole epilogue.

A segment is cut, from its first real token on, into units of SPLIT tokens. A program owns all columns of a unit: it
adds LEAVES leaves side by side, merges them into a group, and groups by a binary counter. Whole segments are finished
at once; the others meet in the arrival tree. SPLIT is a power of two of leaves, so every unit is a subtree of the
canonical order (fastpool.reference) and no choice of it changes a bit.
"""

import triton
import triton.language as tl

from ..constants import NORM_EPS as _NORM_EPS
from .arrival_tree import TOTALS, clear, merge_last_block
from .finish import divisor_of, normalize, quotient, round_to
from .segment import (
    LAST,
    around,
    behind_last_real,
    bounds,
    count_real,
    decreases,
    find,
    first_real,
    first_slot,
    is_real,
    selected,
)
from .state import (
    LEAF,
    MAX,
    ONE,
    SCALED,
    SUM,
    accumulator_of,
    activate,
    counter,
    merge,
    merge_rows,
    merging,
    neutral,
    neutral_state,
    of_each,
    push,
    sums_weights,
    total,
    widen,
)
from .weight import load_share, score_of, softmax_weight, weight_of

NORM_EPS = tl.constexpr(_NORM_EPS)


@triton.jit
def add_tokens(
    hidden, mask, source, share, row_stride, token_stride, first, begin, tokens, columns, inside,
    ACC: tl.constexpr, MERGE: tl.constexpr, WEIGHT: tl.constexpr, LEAVES: tl.constexpr, LEVELS: tl.constexpr,
    PIECES: tl.constexpr, LOADS: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The state of `tokens` rows from `begin` on, whose segment's first real token is `first`. LOADS loads of a thread
    are in flight together; with STAGES > 1 those of the next steps too, on their way through shared memory. With
    several QUERIES there is one leaf, and the state has a row for each query."""
    COLUMNS: tl.constexpr = columns.shape[0]
    ROWS: tl.constexpr = LEAVES * QUERIES
    leaf = tl.arange(0, LEAVES)
    steps = tl.minimum(tokens, LEAF)
    groups = tl.cdiv(tokens, LEAF * LEAVES)
    nothing = neutral_state(of_each((COLUMNS,), QUERIES), of_each((), QUERIES), MERGE, sums_weights(WEIGHT), ACC)
    levels = counter(nothing, LEVELS + 1)
    for group in range(groups):
        state = neutral_state((ROWS, COLUMNS), (ROWS, 1), MERGE, sums_weights(WEIGHT), ACC)
        for some in tl.range(0, steps, LOADS, num_stages=STAGES):
            for one in tl.static_range(LOADS):
                token = (group * LEAVES + leaf) * LEAF + some + one
                real = token < tokens
                if mask is not None:
                    real = is_real(mask, begin, token, token_stride, real)
                row = begin + token
                at = hidden + row[:, None] * row_stride
                there = real[:, None] & inside[None, :]
                x = widen(tl.load(at + columns[None, :], mask=there, other=neutral(MERGE)), ACC)
                if ACTIVATION and MERGE == SUM:
                    x = activate(x, ACTIVATION)
                if WEIGHT == ONE:
                    state = merge(state, (x,), MERGE)
                elif MERGE == SCALED:
                    score = score_of(source, at, row, real, ACC, COLUMNS, PIECES)[:, None]
                    w, of_sums, exponent = softmax_weight(score, state[2])
                    state = (state[0] * of_sums + x * w, state[1] * of_sums + w, exponent)
                else:
                    w = weight_of(source, share, at, row, first, real, WEIGHT, ACC, COLUMNS, PIECES)[:, None]
                    weighted = (x * w, w)
                    state = merge(state, weighted[: len(state)], MERGE)
        if QUERIES == 1:
            state = merge_rows(state, MERGE)
        levels = push(levels, state, group, MERGE)
    return total(levels, nothing, groups, MERGE)


@triton.jit
def reduce_unit(
    hidden, mask, source, share, row_stride, token_stride, first, begin, end, columns, inside,
    ACC: tl.constexpr, MERGE: tl.constexpr, WEIGHT: tl.constexpr, LEAVES: tl.constexpr, LEVELS: tl.constexpr,
    PIECES: tl.constexpr, LOADS: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr, SCAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The state of the tokens [begin, end), and the number of real ones. Pointers are those of the sequence."""
    count = end - begin
    tokens = count.to(tl.int32)
    if mask is not None:  # padding behind the last real token is no hole
        count, end = count_real(mask, token_stride, begin, end, SCAN)
        tokens = (end - begin).to(tl.int32)
    if mask is None or count == tokens:
        state = add_tokens(
            hidden, None, source, share, row_stride, token_stride, first, begin, tokens, columns, inside,
            ACC, MERGE, WEIGHT, LEAVES, LEVELS, PIECES, LOADS, STAGES, QUERIES, ACTIVATION,
        )  # fmt: skip
    else:
        state = add_tokens(
            hidden, mask, source, share, row_stride, token_stride, first, begin, tokens, columns, inside,
            ACC, MERGE, WEIGHT, LEAVES, LEVELS, PIECES, LOADS, 1, QUERIES, ACTIVATION,
        )  # fmt: skip
    return state, tl.full(of_each((), QUERIES), count, tl.int64)


# Nothing is compiled anew for a batch's numbers, not even for a 1 or a multiple of 16.
_RUNTIME = ["stale_count", "select", "divisor", "batch", "rows", "dim", "programs", "batch_stride", "row_stride"]
_RUNTIME += ["mask_batch_stride", "token_stride", "weight_batch_stride", "weight_stride"]
_RUNTIME += ["width", "queries", "query_batch_stride", "query_stride", "gradient_dim"]


@triton.jit(do_not_specialize=_RUNTIME)
def pool_kernel(
    hidden, out, mask, weights, query, starts, ends, gradient, divisors, products, exponents, states, arrivals, stale,
    stale_count, scale: tl.float64, select, divisor, batch, rows, dim, programs, batch_stride, row_stride,
    mask_batch_stride, token_stride, weight_batch_stride, weight_stride,
    query_batch_stride, query_stride, width, queries, gradient_dim,
    REDUCE: tl.constexpr, WEIGHT: tl.constexpr, ACTIVATION: tl.constexpr,
    NORMALIZE: tl.constexpr, CU: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr, LEAVES: tl.constexpr, LEVELS: tl.constexpr, PIECES: tl.constexpr, LOADS: tl.constexpr,
    STAGES: tl.constexpr, QUERIES: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """out [batch, dim], or [batch, queries, dim] where there is a query, as wide as hidden, `width`: programs of the
    same tokens, with QUERIES queries each, stand side by side. `weights` are scores where the mode takes those. dim,
    width and strides of hidden and of queries count VECTOR elements, which is how the compiler learns that rows are
    aligned. `programs`: of each segment, where they cannot be found by number (CU). WHOLE: every segment is one unit.
    Else units meet in `arrivals`, whose counters are zero; those of `stale` are cleared for the next launch. With a
    gradient, which one query has: tokens are multiplied by that of their product with the query, and the rest is as
    backward.py has it."""
    SPLIT: tl.constexpr = LEAF * LEAVES * (1 << LEVELS)
    ACC: tl.constexpr = accumulator_of(hidden.dtype.element_ty)
    MERGE: tl.constexpr = merging(REDUCE, WEIGHT)
    rows = rows.to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    strip = tl.program_id(1)
    strips = tl.num_programs(1)
    dim = dim.to(tl.int64) * VECTOR
    columns = strip * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    if not WHOLE:
        clear(stale, stale_count, program * strips + strip, tl.num_programs(0).to(tl.int64) * strips)
    k = 0  # which query, or several
    each = 1  # vectors of a segment
    group = 0  # of queries
    groups = 1
    place = columns  # in a result; [1, COLUMNS] beside the numbers of several queries, [QUERIES, 1]
    there = inside
    if query is not None:
        each = queries.to(tl.int64)
        groups = tl.cdiv(each, QUERIES)
        group = program % groups
        program = program // groups
        k = group * QUERIES
        if QUERIES > 1:  # for those that there are not the last stands in: the same bits in the same place
            k = tl.minimum(k + tl.arange(0, QUERIES), each - 1)[:, None]
            place = columns[None, :]
            there = inside[None, :]
        query += k * (query_stride.to(tl.int64) * VECTOR)
        width = width.to(tl.int64) * VECTOR
    if not WHOLE:
        stride = dim + strips * TOTALS
        states += k * stride
        totals = states + dim + strip * TOTALS
        stride = stride * each
        arrivals += group * strips + strip
    if CU and not WHOLE:
        if decreases(starts, program, batch, rows):
            # Some segment may be found by no program. Its result is zeros then, not what the memory held before.
            begin, end = around(starts, program, batch, rows)
            for row in range(begin, end):
                at = out + (row * each + k) * dim + place
                tl.store(at, tl.zeros(at.shape, at.dtype.element_ty), mask=there)
        segment = find(starts, program, batch, rows, SPLIT)
        base = first_slot(starts, segment, rows, SPLIT)
        unit = program - base
    else:
        segment = program // programs
        base = segment * tl.cdiv(rows, SPLIT)
        unit = program % programs
    vector = segment * each + k
    hidden += segment * (batch_stride.to(tl.int64) * VECTOR)
    row_step = row_stride.to(tl.int64) * VECTOR
    first, last = bounds(starts, ends, segment, rows, CU)
    if mask is not None:
        mask += segment * mask_batch_stride
        first = first_real(mask, token_stride, first, last, SCAN)
    if query is not None:
        query += segment * (query_batch_stride.to(tl.int64) * VECTOR)
    share = None
    if gradient is not None:
        shares = (gradient, gradient_dim.to(tl.int64) * VECTOR, divisors, products, exponents)
        share = load_share(shares, vector, True)
    source = (weights, segment * weight_batch_stride, weight_stride, query, width, tl.full((), scale, ACC))
    if MERGE == MAX:  # modes of one token are of this kind
        if mask is not None:  # noqa: SIM102  # this is decided by the compiler, what follows by the call
            if select == LAST:
                last = behind_last_real(mask, token_stride, first, last, SCAN)
        first, last = selected(first, last, select)
    out += vector * dim

    nothing = neutral_state(of_each((COLUMNS,), QUERIES), of_each((), QUERIES), MERGE, sums_weights(WEIGHT), ACC)
    state = nothing
    count = tl.zeros(of_each((), QUERIES), tl.int64)
    complete = unit >= 0
    if WHOLE:
        state, count = reduce_unit(
            hidden, mask, source, share, row_step, token_stride, first, first, last, columns, inside,
            ACC, MERGE, WEIGHT, LEAVES, LEVELS, PIECES, LOADS, STAGES, QUERIES, SCAN, ACTIVATION,
        )  # fmt: skip
    else:
        units = tl.maximum(tl.cdiv(last - first, SPLIT), 1)  # a segment without tokens has one too, to write zeros
        complete = unit < 0
        if complete:  # a slot before the first segment's: nothing to do
            unit = units
            complete = units < 0
        while unit < units:
            begin = first + unit * SPLIT
            state, count = reduce_unit(
                hidden, mask, source, share, row_step, token_stride,
                first, begin, tl.minimum(begin + SPLIT, last), columns, inside,
                ACC, MERGE, WEIGHT, LEAVES, LEVELS, PIECES, LOADS, STAGES, QUERIES, SCAN, ACTIVATION,
            )  # fmt: skip
            state, count, complete = merge_last_block(
                states, totals, stride, arrivals, strips * groups, base, unit, units, dim, place, state, count, nothing,
                MERGE,
            )  # fmt: skip
            unit += units if CU else programs
    # Behind the loop, since a segment is complete with a program's last unit: little is alive across the divisions.
    if complete:
        x = state[0]
        if MERGE == SCALED:
            x = x + 0.0  # of a sum that underflows -0 may be left
        weight = state[1] if len(state) > 1 else tl.zeros(count.shape, ACC)
        x = quotient(x, divisor_of(count, weight, divisor, ACC))
        if ACTIVATION and MERGE == MAX:
            x = activate(x, ACTIVATION)
        if NORMALIZE:
            x = normalize(tl.where(there, x, 0.0), tl.full(count.shape, NORM_EPS, ACC))
        tl.store(out + place, round_to(x, out.dtype.element_ty), mask=there)
