"""What a real token is multiplied by: a given weight, or else its position; e to the power of its score, which is given
or its product with a query; and gradients that are products of tokens with the gradient of a result.

Where weights come from is a tuple, `source`: given values, where a segment's begin, and their stride; the query, its
width, and the scale of its products. What a segment's gradient shares out depends on another, `share`: the gradient and
its columns, its divisor, its product with the result, the exponent of the softmax."""

import triton
import triton.language as tl

from .elementary import exponential
from .finish import quotient
from .state import OF_QUERY, SUM, TOKEN, add_columns, counter, one_by_one, push, relative, total, widen


@triton.jit
def load_vector(vector, divisor, columns, inside, ACC: tl.constexpr):
    """Columns of a vector, over its divisor, where it has one; 0 in those that are not `inside`."""
    x = widen(tl.load(vector + columns, mask=inside, other=0.0), ACC)
    if divisor is not None:
        x = tl.where(inside, quotient(x, divisor), 0.0)
    return x


@triton.jit
def product(rows, there, vector, divisor, width, ACC: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The products of rows, [N, 1] pointers, with a vector over its divisor, or of one row with N vectors, also such
    pointers: sums over `width` columns, up to 2^PIECES pieces of COLUMNS, in the canonical order. [N]; 0 for rows that
    are not `there`."""
    several: tl.constexpr = len(vector.shape) > 0
    nothing = (tl.zeros((vector.shape[0] if several else rows.shape[0],), ACC),)
    levels = counter(nothing, PIECES + 1)
    pieces = tl.cdiv(width, COLUMNS) if PIECES > 0 else 1
    for piece in range(pieces):
        columns = piece * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        if several:
            y = load_vector(vector, divisor, columns[None, :], inside[None, :], ACC)
        else:
            y = load_vector(vector, divisor, columns, inside, ACC)
        x = widen(tl.load(rows + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0), ACC)
        levels = push(levels, (add_columns((y if several else y[None, :]) * x),), piece, SUM)
    sums = total(levels, nothing, pieces, SUM)[0]
    if sums.shape[0] == 1:  # a number, or the compiler would have each thread hold whole rows that it multiplies
        sums = tl.full((1,), tl.sum(sums, axis=0), ACC)
    elif several:
        sums = one_by_one(sums)
    return sums


@triton.jit
def value_of(source, row, real, ACC: tl.constexpr):
    return widen(tl.load(source[0] + source[1] + row * source[2], mask=real, other=0.0), ACC)


@triton.jit
def score_of(source, rows, row, real, ACC: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The scores of tokens; -inf for those that are not real."""
    _, _, _, query, width, scale = source
    if query is None:
        score = value_of(source, row, real, ACC)
    else:
        score = scale * product(rows, real, query, None, width, ACC, COLUMNS, PIECES)
    return tl.where(real, score, float("-inf"))


@triton.jit
def softmax_weight(score, exponent):
    """What a token with this score is multiplied by, what sums before it are, which are relative to `exponent`, and the
    exponent that both are relative to then."""
    p, n = exponential(score)
    larger, of_sums, of_token = relative(exponent, n)
    return p * of_token, of_sums, larger


@triton.jit
def number_of(values, vector, there):
    """One of `values`, 0 where it is not there or there are none. (Functions of older Tritons cannot return None.)"""
    if values is not None:
        return tl.load(values + vector, mask=there, other=0.0)
    else:
        return 0.0


@triton.jit
def load_share(shares, vector, there):
    """The `share` of gradient number `vector`, 0 where it is not there; `shares` has pointers to the first one's."""
    gradient, dim, divisors, products, exponents = shares
    return (
        gradient + vector * dim,
        dim,
        number_of(divisors, vector, there),
        number_of(products, vector, there),
        number_of(exponents, vector, there),
    )


@triton.jit
def weight_gradient(share, rows, real, ACC: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The gradients of tokens' weights."""
    gradient, dim, divisor, along, _ = share
    return product(rows, real, gradient, divisor, dim, ACC, COLUMNS, PIECES) - along


@triton.jit
def weight_of(
    source, share, rows, row, first, real, WEIGHT: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """The weights of tokens of a segment whose first real token is `first`: those given, or the position, counted from
    1; those of a softmax whose exponent is known; gradients of products with a query. 0 for tokens that are not
    real."""
    if WEIGHT == TOKEN:
        if source[0] is not None:
            return value_of(source, row, real, ACC)
        else:
            return tl.where(real, (row - first).to(tl.int32) + 1, 0).to(ACC)  # a narrow one takes fewer registers
    else:
        weight, _, _ = softmax_weight(score_of(source, rows, row, real, ACC, COLUMNS, PIECES), share[4])
        if WEIGHT == OF_QUERY:
            weight = (weight_gradient(share, rows, real, ACC, COLUMNS, PIECES) * weight) * source[5]
        return tl.where(real, weight, 0.0)
