"""What each token is multiplied by."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..calls import accumulator
from ..constants import LEAF
from ..modes import MODES
from .elementary import exponential, times_power_of_two
from .segment import TokenIndex
from .tree import add_columns


def weights(tokens: TokenIndex, i: int) -> Tensor:
    """The weights, [B, leaves, 1], of the tokens at position `i` of each leaf: what the call's `weights` hold, or else
    the position counted from 1 at the segment's first real token; 0 where no real token is."""
    call, index = tokens.call, tokens.index[:, :, i]
    if call.weights is None:
        weights = (index - tokens.first_and_last_real[0][:, None] + 1).to(accumulator(call.hidden.dtype))
    else:
        weights = _values(tokens, call.weights, i)
    return torch.where(tokens.real[:, :, i], weights, 0)[..., None]


def _values(tokens: TokenIndex, per_token: Tensor, i: int) -> Tensor:
    """What `per_token` holds for the tokens at position `i` of each leaf, in the accumulator's dtype; anything where no
    token is. [B, leaves]"""
    call, index = tokens.call, tokens.index[:, :, i]
    if call.rows == 0:
        return torch.zeros(index.shape, dtype=accumulator(call.hidden.dtype), device=index.device)
    return tokens.at(per_token, index.clamp(max=call.rows - 1)).to(accumulator(call.hidden.dtype))


def scores(tokens: TokenIndex, i: int) -> Tensor:
    """The scores, [B, leaves, 1], of the tokens at position `i` of each leaf: what the call's `scores` hold, or else
    their product with its query, of all columns; -inf where no real token is."""
    call = tokens.call
    if call.scores is not None:
        scores = _values(tokens, call.scores, i)[..., None]
    else:
        assert call.query is not None
        query = call.query.to(accumulator(call.hidden.dtype))  # one alone: [H], or [B, 1, H]
        scores = call.scale * add_columns(tokens.whole_states(i) * query)
    return torch.where(tokens.real[:, :, i, None], scores, float("-inf"))


def power(smaller: Tensor, larger: Tensor) -> Tensor:
    """2^(smaller - larger), for integers of any size or -inf; 1 where they are equal."""
    equal = smaller == larger
    return times_power_of_two(torch.ones_like(larger), torch.where(equal, 0, smaller - torch.where(equal, 0, larger)))


def softmax_weights(tokens: TokenIndex) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each position of a leaf: what the tokens there are multiplied by, what the sum of those before them is, and
    the exponent that both are relative to, the largest so far. [B, leaves, 1] each. A sum is scaled by powers of two
    alone, so it has the bits that it would have if the largest were known from the start."""
    largest: Tensor | None = None
    for i in range(LEAF):
        p, n = exponential(scores(tokens, i))
        before = torch.full_like(n, float("-inf")) if largest is None else largest
        largest = torch.maximum(before, n)
        yield p * power(n, largest), power(before, largest), largest


def all_weights(tokens: TokenIndex) -> Tensor:
    """What each token is multiplied by in the end. [B, leaves, LEAF]"""
    if not MODES[tokens.call.mode].softmax:
        return torch.cat([weights(tokens, i) for i in range(LEAF)], dim=2)
    p, n = exponential(torch.cat([scores(tokens, i) for i in range(LEAF)], dim=2))
    return p * power(n, n.amax((1, 2), keepdim=True).expand_as(n))
