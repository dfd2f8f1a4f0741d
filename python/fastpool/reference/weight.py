"""What each token is multiplied by."""

import torch
from torch import Tensor

from ..calls import accumulator
from ..constants import LEAF
from .segment import TokenIndex


def weights(tokens: TokenIndex, i: int) -> Tensor:
    """The weights, [B, leaves, 1], of the tokens at position `i` of each leaf: what the call's `weights` hold, or else
    the position counted from 1 at the segment's first real token; 0 where no real token is."""
    call, index = tokens.call, tokens.index[:, :, i]
    if call.weights is None:
        weights = index - tokens.first_and_last_real[0][:, None] + 1
    elif call.rows == 0:
        weights = torch.zeros_like(index)
    else:
        weights = tokens.at(call.weights, index.clamp(max=call.rows - 1))
    weights = weights.to(accumulator(call.hidden.dtype))
    return torch.where(tokens.real[:, :, i], weights, 0)[..., None]


def all_weights(tokens: TokenIndex) -> Tensor:
    """[B, leaves, LEAF]"""
    return torch.cat([weights(tokens, i) for i in range(LEAF)], dim=2)
