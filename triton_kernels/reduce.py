"""How real tokens become one vector: the modes and their families, what one more token does, and the tree in which
sums meet."""

import triton
import triton.language as tl

# As in fastpool.modes; a test holds the two together.
MEAN = tl.constexpr(0)
MEAN_SQRT_LEN = tl.constexpr(1)
CLS = tl.constexpr(4)
LAST = tl.constexpr(5)
WEIGHTED_MEAN = tl.constexpr(6)

# Modes of a family are one machine program: they differ in a divisor or a bound. cls and last are the maximum of one
# token.
SUM = tl.constexpr(0)
WEIGHTED = tl.constexpr(1)
MAX = tl.constexpr(2)
FAMILIES = {
    "mean": SUM,
    "mean_sqrt_len": SUM,
    "sum": SUM,
    "max": MAX,
    "cls": MAX,
    "last": MAX,
    "weighted_mean": WEIGHTED,
}

ONE_TOKEN = ("cls", "last")  # modes that read one token of a segment

LEAF = tl.constexpr(32)  # tokens that are added one after another; as in fastpool.reference


@triton.constexpr_function
def neutral(family):
    """What an absent token counts as. A sum starts from +0, so that no partial sum is ever -0."""
    return float("-inf") if family == MAX else 0.0


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x in the accumulator's dtype. bfloat16 by its bits: arithmetic on it, subnormals above all, is not the
    interpreter's strength, and the machine code is the same."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def weight_of(weights, row, stride, first, real, ACC: tl.constexpr):
    """Of tokens of a segment whose first real token is `first`, 0 for those that are not real: given ones, or the
    position, counted from 1."""
    if weights is not None:
        return widen(tl.load(weights + row * stride, mask=real, other=0.0), ACC)
    else:
        return tl.where(real, (row - first).to(tl.int32) + 1, 0).to(ACC)  # a narrow one takes fewer registers


@triton.jit
def merge(left, right, FAMILY: tl.constexpr):
    """`left` stands before `right` in the sequence. The first of equals stays, and the first NaN."""
    if FAMILY == MAX:
        return tl.where((left == left) & ((right <= left) == 0), right, left)
    else:
        return left + right


@triton.jit
def merge_rows(x, FAMILY: tl.constexpr):
    """[N, M] -> [M], N a power of two: rows meet in an aligned binary tree, whatever threads hold them."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            pairs = tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), (0, 2, 1))
            left, right = tl.split(pairs)
            x = merge(left, right, FAMILY)
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


# A binary counter of subtrees: level k holds the state of 2^k groups, while bit k of their number is set.


@triton.jit
def empty_counters(columns, COUNT: tl.constexpr, FAMILY: tl.constexpr, ACC: tl.constexpr):
    """Of COUNT levels: one of states, one of sums of weights."""
    states = ()
    for _ in tl.static_range(COUNT):
        states = states + (tl.full((columns.shape[0],), neutral(FAMILY), ACC),)
    return states, empty_scalars(COUNT, ACC)


@triton.jit
def empty_scalars(COUNT: tl.constexpr, ACC: tl.constexpr):
    """Of COUNT levels: one of sums."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((), ACC),)
    return sums


@triton.jit
def push(levels, x, index, FAMILY: tl.constexpr):
    """The counter after group `index`, whose state is `x`."""
    grown = ()
    carrying = True
    for k in tl.static_range(len(levels)):
        taken = ((index >> k) & 1) != 0
        grown = grown + (tl.where(carrying & (taken == 0), x, levels[k]),)
        x = tl.where(carrying & taken, merge(levels[k], x, FAMILY), x)
        carrying = carrying & taken
    return grown


@triton.jit
def total(levels, x, count, FAMILY: tl.constexpr):
    """The state of all `count` groups, smallest subtree first: missing right siblings (`x`: neutral) change nothing."""
    for k in tl.static_range(len(levels)):
        x = tl.where(((count >> k) & 1) != 0, merge(levels[k], x, FAMILY), x)
    return x
