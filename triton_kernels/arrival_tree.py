"""The arrival tree: units of one segment, finished by programs in any order, merge in the canonical one.

Units are leaves of a tree with FAN children to a node. Whoever has finished a node leaves its state in the workspace
and counts itself at the parent; the last to arrive merges the children in their order and goes on upwards. No
program waits for another, and only integers are counted, so bits do not depend on the order of arrival.
"""

import triton
import triton.language as tl

from .state import counter, neutral, push

FAN = tl.constexpr(8)
CLEARED = tl.constexpr(128)  # counters that a program clears in one go
# Of a strip, behind the columns of each row of the workspace: its count, the sum of its weights, its exponent. Strips
# do not wait for each other, so each has its own; and rows stay aligned.
TOTALS = tl.constexpr(4)


@triton.jit
def clear(stale, count, program, programs):
    """Program `program` of `programs` clears its part of the first `count` counters in `stale`."""
    lane = tl.arange(0, CLEARED)
    for at in range(program * CLEARED, count, programs * CLEARED):
        tl.store(stale + at + lane, tl.zeros((CLEARED,), tl.int32), mask=at + lane < count)


@triton.jit
def as_bits(count, dtype: tl.constexpr):
    """An integer as the float of the same bits, for memory that holds only floats."""
    if dtype == tl.float64:
        return count.to(tl.int64).to(dtype, bitcast=True)
    else:
        return count.to(tl.int32).to(dtype, bitcast=True)


@triton.jit
def from_bits(x):
    """The integer whose bits `as_bits` has put into the float x."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def leave(states, totals, at, stride, width, columns, state, count):
    """Stores a node's state in row `at` of the workspace. Where its count is 0, columns are neither stored nor read."""
    tl.store(states + at * stride + columns, state[0], mask=(columns < width) & (count > 0))
    tl.store(totals + at * stride, as_bits(count, state[0].dtype))
    for i in tl.static_range(1, len(state)):
        tl.store(totals + at * stride + i, state[i])


@triton.jit
def child(states, totals, at, there, stride, width, columns, nothing, MERGE: tl.constexpr):
    """A child's state, and its count; `nothing` where it is not there. Past the L1 cache: another program has just
    written it."""
    count = from_bits(tl.load(totals + at * stride, mask=there, other=0.0, cache_modifier=".cg"))
    there &= count > 0
    x = tl.load(
        states + at * stride + columns, mask=(columns < width) & there, other=neutral(MERGE), cache_modifier=".cg"
    )
    state = (x,)
    for i in tl.static_range(1, len(nothing)):
        kept = tl.load(totals + at * stride + i, mask=there, other=0.0, cache_modifier=".cg")
        state = state + (tl.where(there, kept, nothing[i]),)
    return state, count


@triton.jit
def merge_children(states, totals, at, step, children, stride, width, columns, nothing, MERGE: tl.constexpr):
    """The states of a node's children, `step` rows of the workspace apart, merged in pairs, and pairs of them. 2^SOME
    of them are read together: eight wide ones would not fit the registers."""
    SOME: tl.constexpr = 2
    upper = counter(nothing, 4 - SOME)
    count = tl.zeros(totals.shape, tl.int64)
    for part in range(FAN >> SOME):
        lower = counter(nothing, SOME + 1)
        for i in tl.static_range(1 << SOME):
            which = (part << SOME) + i
            there = which < children
            state, n = child(states, totals, at + which * step, there, stride, width, columns, nothing, MERGE)
            lower = push(lower, state, i, MERGE)
            count += n
        upper = push(upper, lower[SOME], part, MERGE)
    return upper[3 - SOME], count


@triton.jit
def merge_last_block(
    states, totals, stride, arrivals, arrivals_stride, base, unit, units, width, columns, state, count, nothing,
    MERGE: tl.constexpr,
):  # fmt: skip
    """Brings unit `unit` of a segment with `units` of them, whose rows of the workspace, `stride` elements apart, begin
    at `base`. Returns the state of all of them and True to the last to arrive; to all others anything and False.
    `nothing`: the neutral state. Several states, of several queries, arrive as one: pointers and states then have
    a row for each, and columns are [1, N]."""
    node = unit
    nodes = units  # of this depth
    step = tl.full((), 1, tl.int64)  # units under a node
    depth = tl.full((), 1, tl.int64)
    last = units > 0
    while last & (nodes > 1):
        parent = node // FAN
        children = tl.minimum(nodes - parent * FAN, FAN)
        if children > 1:
            leave(states, totals, base + node * step, stride, width, columns, state, count)
            tl.debug_barrier()  # what every thread has stored, before one of them counts
            # No two nodes of a segment count at the same place: those of depth d at multiples of FAN^d, plus d, up to
            # FAN^FAN units.
            place = base + parent * step * FAN + depth
            last = tl.atomic_add(arrivals + place * arrivals_stride, 1, sem="acq_rel") == children - 1
            if last:
                tl.debug_barrier()
                state, count = merge_children(
                    states, totals, base + parent * FAN * step, step, children, stride, width, columns, nothing, MERGE
                )
                tl.debug_barrier()  # every thread has read, before this program leaves its next state in the same place
        node = parent
        nodes = tl.cdiv(nodes, FAN)
        step *= FAN
        depth += 1
    return state, count, last
