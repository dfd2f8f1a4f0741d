"""How tokens become one vector: a state per column that begins neutral, takes tokens one after another within a leaf,
and meets the states of other leaves in a tree."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..constants import LEAF
from ..modes import MODES, Activation, Reduce, Weight
from .activation import activate
from .segment import TokenIndex
from .tree import tree
from .weight import power, softmax_weights, weights


def _later_if_greater(left: Tensor, right: Tensor) -> Tensor:
    """The maximum; the first of equals stays, and the first NaN."""
    return torch.where((left == left) & ~(right <= left), right, left)


@dataclass(frozen=True)
class State:
    """Two states, or a state and a token, become one by `merge`; `left` stands before `right` in the sequence."""

    neutral: float
    merge: Callable[[Tensor, Tensor], Tensor]


STATES: dict[Reduce, State] = {
    Reduce.SUM: State(0.0, torch.add),
    Reduce.MAX: State(float("-inf"), _later_if_greater),
}


def _with_ones(token: Tensor) -> Tensor:
    """A column of ones behind the others, which becomes the sum of weights."""
    return torch.cat([token, token.new_ones(*token.shape[:-1], 1)], dim=-1)


def reduce(tokens: TokenIndex) -> tuple[Tensor, Tensor]:
    """The state, [B, D], of the tokens that the call's mode looks at, and the sum of their weights, [B, 1]; 0 where
    there are none."""
    mode = MODES[tokens.call.mode]
    if mode.softmax:
        both = _softmax(tokens)
    elif mode.weight is Weight.TOKEN:
        both = _sum(tokens, lambda i: _with_ones(tokens.states(i, 0.0)) * weights(tokens, i), STATES[mode.reduce])
    else:
        state, before = STATES[mode.reduce], mode.activation if mode.activates_tokens else Activation.NONE
        both = _with_ones(_sum(tokens, lambda i: activate(tokens.states(i, state.neutral), before), state))
    both = torch.where(tokens.count > 0, both, 0)
    return both[:, :-1], both[:, -1:]


def _sum(tokens: TokenIndex, token: Callable[[int], Tensor], state: State) -> Tensor:
    leaves: Tensor | None = None
    for i in range(LEAF):
        one = token(i)
        leaves = state.merge(torch.full_like(one, state.neutral) if leaves is None else leaves, one)
    assert leaves is not None
    return tree(leaves, state.merge)


def _softmax(tokens: TokenIndex) -> Tensor:
    """Sums of tokens times e^score, and of the latter, but for a power of two that both have."""
    states: Tensor | None = None
    for i, (weight, scale, largest) in enumerate(softmax_weights(tokens)):
        token = _with_ones(tokens.states(i, 0.0)) * weight
        states = token + 0.0 if states is None else states * scale + token
        exponents = largest
    assert states is not None
    while states.shape[1] > 1:
        left, right = exponents[:, 0::2], exponents[:, 1::2]
        exponents = torch.maximum(left, right)
        states = states[:, 0::2] * power(left, exponents) + states[:, 1::2] * power(right, exponents)
    return states[:, 0] + 0.0  # of a sum that underflows -0 may be left


def total_weight(tokens: TokenIndex) -> Tensor:
    """The sum of weights, [B, 1], in the canonical order."""
    return reduce(replace(tokens, call=replace(tokens.call, truncate_dim=0)))[1]
