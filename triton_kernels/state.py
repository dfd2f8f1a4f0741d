"""How real tokens become one vector: what a state begins with, what one more token does, and the tree in which states
meet."""

import triton
import triton.language as tl

from ..constants import LEAF as _LEAF
from ..modes import Activation, Reduce, Weight
from .elementary import log1p, power_between

LEAF = tl.constexpr(_LEAF)  # tokens that are added one after another
SUM = tl.constexpr(Reduce.SUM.value)
MAX = tl.constexpr(Reduce.MAX.value)
SCALED = tl.constexpr(len(Reduce))  # a sum but for a power of two
ONE = tl.constexpr(Weight.ONE.value)
TOKEN = tl.constexpr(Weight.TOKEN.value)
SCORE = tl.constexpr(Weight.SCORE.value)
QUERY = tl.constexpr(Weight.QUERY.value)
LOG1P_RELU = tl.constexpr(Activation.LOG1P_RELU.value)
OF_QUERY = tl.constexpr(len(Weight))  # the gradient of a product with a query, as the sums of its own gradient have it

# A state is a tuple: a value for each column; the sum of weights, where a mode divides by it; and of a SCALED one, as
# last, the exponent: the sums before it are to be multiplied by 2 to its power. That is the largest exponent of a token
# so far, so that where it grows sums are scaled by powers of two, and have the bits that they would have if the largest
# were known from the start.


@triton.constexpr_function
def sums_weights(weight):
    """Whether a mode divides by the sum of its weights."""
    return weight in (TOKEN, SCORE, QUERY)


@triton.constexpr_function
def merging(reduce, weight):
    """How states merge: SUM, MAX or SCALED."""
    return SCALED if weight in (SCORE, QUERY) else reduce


@triton.constexpr_function
def neutral(merge):
    """What an absent token counts as. A sum starts from +0, so that no partial sum is ever -0."""
    return float("-inf") if merge == MAX else 0.0


@triton.constexpr_function
def of_each(shape, queries):
    """The shape of such a thing for each of a program's queries: as it is for one, else with a row for each."""
    return shape if queries == 1 else (queries, *(shape or (1,)))


@triton.jit
def neutral_state(shape, totals_shape, MERGE: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """Of no token. WEIGHTED: with a sum of weights."""
    state = (tl.full(shape, neutral(MERGE), ACC),)
    if WEIGHTED:
        state = state + (tl.zeros(totals_shape, ACC),)
    if MERGE == SCALED:
        state = state + (tl.full(totals_shape, float("-inf"), ACC),)
    return state


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
def activate(x, ACTIVATION: tl.constexpr):
    """ln(1 + max(x, 0)), and ln(1 + y) of that once more; 0 for -0, NaN for NaN."""
    y = log1p(tl.where(x <= 0, 0.0, x))
    return log1p(y) if ACTIVATION == LOG1P_RELU else y


@triton.jit
def relative(left, right):
    """The larger of two exponents, and what sums of either are multiplied by to be relative to it."""
    grows = left < right
    larger = tl.where(grows, right, left)
    power = power_between(tl.where(grows, left, right), larger)
    return larger, tl.where(grows, power, 1.0), tl.where(grows, 1.0, power)


@triton.jit
def merge_values(left, right, MERGE: tl.constexpr):
    """The first of equals stays, and the first NaN."""
    if MERGE == MAX:
        return tl.where((left == left) & ((right <= left) == 0), right, left)
    else:
        return left + right


@triton.jit
def merge(left, right, MERGE: tl.constexpr):
    """`left` stands before `right` in the sequence."""
    merged = ()
    if MERGE == SCALED:
        exponent, of_left, of_right = relative(left[-1], right[-1])
        for i in tl.static_range(len(left) - 1):
            merged = merged + (left[i] * of_left + right[i] * of_right,)
        merged = merged + (exponent,)
    else:
        for i in tl.static_range(len(left)):
            merged = merged + (merge_values(left[i], right[i], MERGE),)
    return merged


@triton.jit
def where(condition, one, other):
    """One state or another."""
    chosen = ()
    for i in tl.static_range(len(one)):
        chosen = chosen + (tl.where(condition, one[i], other[i]),)
    return chosen


@triton.jit
def merge_rows(state, MERGE: tl.constexpr):
    """Of [N, M], and [N, 1] of totals, N a power of two, to [M] and scalars: rows meet in an aligned binary tree,
    whatever threads hold them."""
    for _ in tl.static_range(16):
        if state[0].shape[0] > 1:
            left = ()
            right = ()
            for i in tl.static_range(len(state)):
                x = state[i]
                pairs = tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), (0, 2, 1))
                even, odd = tl.split(pairs)
                left = left + (even,)
                right = right + (odd,)
            state = merge(left, right, MERGE)
    merged = (tl.reshape(state[0], (state[0].shape[1],)),)
    for i in tl.static_range(1, len(state)):
        merged = merged + (tl.sum(tl.reshape(state[i], (1,)), axis=0),)  # of one element
    return merged


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


@triton.jit
def one_by_one(x):
    """x, [N], put together from numbers. What is made from rows and multiplies them would otherwise have the compiler
    move whole rows to where their numbers are."""
    which = tl.arange(0, x.shape[0])
    numbers = tl.zeros(x.shape, x.dtype)
    for i in tl.static_range(x.shape[0]):
        numbers = tl.where(which == i, tl.sum(tl.where(which == i, x, 0.0), axis=0), numbers)
    return numbers


# A binary counter of subtrees, as numbers are counted in binary: level k holds the state of 2^k groups, while bit k of
# their number is set. So a pairwise sum takes its terms one after another and keeps only log2 of their number;
# compare the pairwise algorithm of Chan, Golub and LeVeque (Stanford, CS-TR-79-773, 1979).


@triton.jit
def counter(nothing, COUNT: tl.constexpr):
    """A binary counter of COUNT levels, which hold `nothing`, the neutral state."""
    levels = ()
    for _ in tl.static_range(COUNT):
        levels = levels + (nothing,)
    return levels


@triton.jit
def push(levels, state, index, MERGE: tl.constexpr):
    """The counter after group `index`, whose state this is."""
    grown = ()
    carrying = True
    for k in tl.static_range(len(levels)):
        taken = ((index >> k) & 1) != 0
        grown = grown + (where(carrying & (taken == 0), state, levels[k]),)
        state = where(carrying & taken, merge(levels[k], state, MERGE), state)
        carrying = carrying & taken
    return grown


@triton.jit
def total(levels, nothing, count, MERGE: tl.constexpr):
    """The state of all `count` groups, smallest subtree first: missing right siblings (`nothing`) change nothing."""
    state = nothing
    for k in tl.static_range(len(levels)):
        state = where(((count >> k) & 1) != 0, merge(levels[k], state, MERGE), state)
    return state
