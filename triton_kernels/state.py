"""How real tokens become one vector: what a state begins with, what one more token does, and the tree in which states
meet."""

import triton
import triton.language as tl

from ..constants import LEAF as _LEAF
from ..modes import Reduce

LEAF = tl.constexpr(_LEAF)  # tokens that are added one after another
SUM = tl.constexpr(Reduce.SUM.value)
MAX = tl.constexpr(Reduce.MAX.value)


@triton.constexpr_function
def neutral(reduce):
    """What an absent token counts as. A sum starts from +0, so that no partial sum is ever -0."""
    return float("-inf") if reduce == MAX else 0.0


@triton.constexpr_function
def accumulator_of(dtype):
    """What sums, divisions and norms happen in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x in the accumulator's dtype. bfloat16 by its bits: arithmetic on it, subnormals above all, is not the
    interpreter's strength, and the machine code is the same."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def merge(left, right, REDUCE: tl.constexpr):
    """`left` stands before `right` in the sequence. The first of equals stays, and the first NaN."""
    if REDUCE == MAX:
        return tl.where((left == left) & ((right <= left) == 0), right, left)
    else:
        return left + right


@triton.jit
def merge_rows(x, REDUCE: tl.constexpr):
    """[N, M] -> [M], N a power of two: rows meet in an aligned binary tree, whatever threads hold them."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            pairs = tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), (0, 2, 1))
            left, right = tl.split(pairs)
            x = merge(left, right, REDUCE)
    return tl.reshape(x, (x.shape[1],))


@triton.constexpr_function
def halved(shape):
    """The last dimension in pairs."""
    return [*shape[:-1], shape[-1] // 2, 2]


@triton.jit
def add_columns(x):
    """[..., M] -> sums of M elements, a power of two: neighbours meet first, in an aligned binary tree. A sum of two
    has one order only, so that it can be left to the compiler."""
    for _ in tl.static_range(16):
        if x.shape[-1] > 1:
            x = tl.sum(tl.reshape(x, halved(x.shape)), axis=len(x.shape))
    return tl.sum(x, axis=len(x.shape) - 1)  # of one element


# A binary counter of subtrees, as numbers are counted in binary: level k holds the state of 2^k groups, while bit k of
# their number is set. So a pairwise sum takes its terms one after another and keeps only log2 of their number;
# compare the pairwise algorithm of Chan, Golub and LeVeque (Stanford, CS-TR-79-773, 1979).


@triton.jit
def empty_counters(columns, COUNT: tl.constexpr, REDUCE: tl.constexpr, ACC: tl.constexpr):
    """Two binary counters of COUNT levels each: one of states, one of sums of weights."""
    states = ()
    for _ in tl.static_range(COUNT):
        states = states + (tl.full((columns.shape[0],), neutral(REDUCE), ACC),)
    return states, empty_scalars(COUNT, ACC)


@triton.jit
def empty_scalars(COUNT: tl.constexpr, ACC: tl.constexpr):
    """A binary counter of COUNT levels, of sums."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((), ACC),)
    return sums


@triton.jit
def push(levels, x, index, REDUCE: tl.constexpr):
    """The counter after group `index`, whose state is `x`."""
    grown = ()
    carrying = True
    for k in tl.static_range(len(levels)):
        taken = ((index >> k) & 1) != 0
        grown = grown + (tl.where(carrying & (taken == 0), x, levels[k]),)
        x = tl.where(carrying & taken, merge(levels[k], x, REDUCE), x)
        carrying = carrying & taken
    return grown


@triton.jit
def total(levels, x, count, REDUCE: tl.constexpr):
    """The state of all `count` groups, smallest subtree first: missing right siblings (`x`: neutral) change nothing."""
    for k in tl.static_range(len(levels)):
        x = tl.where(((count >> k) & 1) != 0, merge(levels[k], x, REDUCE), x)
    return x
