"""The pooling kernel: every mode, both layouts, the whole epilogue.

A segment is cut, from its first real token on, into units of SPLIT tokens. A program owns all columns of a unit: it
adds LEAVES leaves side by side, merges them into a group, and groups by a binary counter. Whole segments are finished
at once; the others meet in the arrival tree. SPLIT is a power of two of leaves, so every unit is a subtree of the
canonical order (fastpool.reference) and no choice of it changes a bit.
"""

import triton
import triton.language as tl

from ..constants import NORM_EPS as _NORM_EPS
from .arrival_tree import TOTALS_BYTES, clear, merge_last_block
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
from .state import LEAF, MAX, SUM, accumulator_of, empty_counters, merge, merge_rows, neutral, push, total, widen
from .weight import weight_of

NORM_EPS = tl.constexpr(_NORM_EPS)


@triton.jit
def add_tokens(
    hidden, mask, weights, row_stride, token_stride, weight_stride, first, begin, tokens, columns, inside,
    ACC: tl.constexpr, REDUCE: tl.constexpr, WEIGHTED: tl.constexpr, LEAVES: tl.constexpr, LEVELS: tl.constexpr,
    LOADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state of `tokens` rows from `begin` on, whose segment's first real token is `first`, and the sum of their
    weights. LOADS loads of a thread are in flight together; with STAGES > 1 those of the next steps too, on their way
    through shared memory."""
    leaf = tl.arange(0, LEAVES)
    steps = tl.minimum(tokens, LEAF)
    groups = tl.cdiv(tokens, LEAF * LEAVES)
    levels, weight_levels = empty_counters(columns, LEVELS + 1, REDUCE, ACC)
    for group in range(groups):
        x = tl.full((LEAVES, columns.shape[0]), neutral(REDUCE), ACC)
        weight = tl.zeros((LEAVES, 1), ACC)
        for some in tl.range(0, steps, LOADS, num_stages=STAGES):
            for one in tl.static_range(LOADS):
                token = (group * LEAVES + leaf) * LEAF + some + one
                real = token < tokens
                if mask is not None:
                    real = is_real(mask, begin, token, token_stride, real)
                row = begin + token
                at = hidden + row[:, None] * row_stride + columns[None, :]
                state = widen(tl.load(at, mask=real[:, None] & inside[None, :], other=neutral(REDUCE)), ACC)
                if WEIGHTED:
                    w = weight_of(weights, row, weight_stride, first, real, ACC)
                    x += state * w[:, None]
                    weight += w[:, None]
                else:
                    x = merge(x, state, REDUCE)
        levels = push(levels, merge_rows(x, REDUCE), group, REDUCE)
        if WEIGHTED:
            weight_levels = push(weight_levels, tl.sum(merge_rows(weight, SUM), axis=0), group, SUM)
    nothing = tl.full((columns.shape[0],), neutral(REDUCE), ACC)
    return total(levels, nothing, groups, REDUCE), total(weight_levels, tl.zeros((), ACC), groups, SUM)


@triton.jit
def reduce_unit(
    hidden, mask, weights, row_stride, token_stride, weight_stride, first, begin, end, columns, inside,
    ACC: tl.constexpr, REDUCE: tl.constexpr, WEIGHTED: tl.constexpr, LEAVES: tl.constexpr, LEVELS: tl.constexpr,
    LOADS: tl.constexpr, STAGES: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """The state of the tokens [begin, end), the number of real ones, the sum of their weights. Pointers are those of
    the sequence."""
    count = end - begin
    tokens = count.to(tl.int32)
    if mask is not None:  # padding behind the last real token is no hole
        count, end = count_real(mask, token_stride, begin, end, SCAN)
        tokens = (end - begin).to(tl.int32)
    if mask is None or count == tokens:
        x, weight = add_tokens(
            hidden, None, weights, row_stride, token_stride, weight_stride, first, begin, tokens, columns, inside,
            ACC, REDUCE, WEIGHTED, LEAVES, LEVELS, LOADS, STAGES,
        )  # fmt: skip
    else:
        x, weight = add_tokens(
            hidden, mask, weights, row_stride, token_stride, weight_stride, first, begin, tokens, columns, inside,
            ACC, REDUCE, WEIGHTED, LEAVES, LEVELS, LOADS, 1,
        )  # fmt: skip
    return x, count, weight


# Nothing is compiled anew for a batch's numbers, not even for a 1 or a multiple of 16.
_RUNTIME = ["stale_count", "select", "divisor", "batch", "rows", "dim", "programs", "batch_stride", "row_stride"]
_RUNTIME += ["mask_batch_stride", "token_stride", "weight_batch_stride", "weight_stride"]


@triton.jit(do_not_specialize=_RUNTIME)
def pool_kernel(
    hidden, out, mask, weights, starts, ends, states, arrivals, stale,
    stale_count, select, divisor, batch, rows, dim, programs, batch_stride, row_stride,
    mask_batch_stride, token_stride, weight_batch_stride, weight_stride,
    REDUCE: tl.constexpr, WEIGHTED: tl.constexpr,
    NORMALIZE: tl.constexpr, CU: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr, LEAVES: tl.constexpr, LEVELS: tl.constexpr, LOADS: tl.constexpr, STAGES: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """out [batch, dim]. `dim` and hidden's strides count VECTOR elements, which is how the compiler learns that rows
    are aligned. `programs`: of each segment, where they cannot be found by number (CU). WHOLE: every segment is one
    unit. Else units meet in `arrivals`, whose counters are zero; those of `stale` are cleared for the next launch."""
    SPLIT: tl.constexpr = LEAF * LEAVES * (1 << LEVELS)
    ACC: tl.constexpr = accumulator_of(hidden.dtype.element_ty)
    rows = rows.to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    strip = tl.program_id(1)
    strips = tl.num_programs(1)
    width = dim.to(tl.int64) * VECTOR
    columns = strip * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width

    if not WHOLE:
        TOTALS: tl.constexpr = TOTALS_BYTES * 8 // ACC.primitive_bitwidth
        stride = width + strips * TOTALS
        totals = states + width + strip * TOTALS
        clear(stale, stale_count, program * strips + strip, tl.num_programs(0).to(tl.int64) * strips)
    if CU and not WHOLE:
        if decreases(starts, program, batch, rows):
            # Some segment may be found by no program. Its result is zeros then, not what the memory held before.
            begin, end = around(starts, program, batch, rows)
            for row in range(begin, end):
                tl.store(out + row * width + columns, tl.zeros((COLUMNS,), out.dtype.element_ty), mask=inside)
        segment = find(starts, program, batch, rows, SPLIT)
        base = first_slot(starts, segment, rows, SPLIT)
        unit = program - base
    else:
        segment = program // programs
        base = segment * tl.cdiv(rows, SPLIT)
        unit = program % programs
    hidden += segment * (batch_stride.to(tl.int64) * VECTOR)
    row_step = row_stride.to(tl.int64) * VECTOR
    first, last = bounds(starts, ends, segment, rows, CU)
    if mask is not None:
        mask += segment * mask_batch_stride
        first = first_real(mask, token_stride, first, last, SCAN)
    if weights is not None:
        weights += segment * weight_batch_stride
    if REDUCE == MAX:  # modes of one token are of this kind
        if mask is not None:  # noqa: SIM102  # this is decided by the compiler, what follows by the call
            if select == LAST:
                last = behind_last_real(mask, token_stride, first, last, SCAN)
        first, last = selected(first, last, select)
    out += segment * width

    x = tl.full((COLUMNS,), neutral(REDUCE), ACC)
    weight = tl.zeros((), ACC)
    count = tl.zeros((), tl.int64)
    complete = unit >= 0
    if WHOLE:
        x, count, weight = reduce_unit(
            hidden, mask, weights, row_step, token_stride, weight_stride, first, first, last, columns, inside,
            ACC, REDUCE, WEIGHTED, LEAVES, LEVELS, LOADS, STAGES, SCAN,
        )  # fmt: skip
    else:
        units = tl.maximum(tl.cdiv(last - first, SPLIT), 1)  # a segment without tokens has one too, to write zeros
        complete = unit < 0
        if complete:  # a slot before the first segment's: nothing to do
            unit = units
            complete = units < 0
        while unit < units:
            begin = first + unit * SPLIT
            x, count, weight = reduce_unit(
                hidden, mask, weights, row_step, token_stride, weight_stride,
                first, begin, tl.minimum(begin + SPLIT, last), columns, inside,
                ACC, REDUCE, WEIGHTED, LEAVES, LEVELS, LOADS, STAGES, SCAN,
            )  # fmt: skip
            x, count, weight, complete = merge_last_block(
                states, totals, stride, arrivals + strip, strips, base, unit, units, width, columns, x, count, weight,
                REDUCE,
            )  # fmt: skip
            unit += units if CU else programs
    # Behind the loop, since a segment is complete with a program's last unit: little is alive across the divisions.
    if complete:
        x = quotient(x, divisor_of(count, weight, divisor, ACC))
        if NORMALIZE:
            x = normalize(tl.where(inside, x, 0.0), tl.full((), NORM_EPS, ACC))
        tl.store(out + columns, round_to(x, out.dtype.element_ty), mask=inside)
