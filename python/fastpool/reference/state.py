"""How tokens become one vector: a state per column that begins neutral, takes tokens one after another within a leaf,
and meets the states of other leaves in a tree."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..constants import LEAF
from ..modes import MODES, Reduce, Weight
from .segment import TokenIndex
from .weight import weights


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


def tree(leaves: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """N states into one, [B, N, ...] -> [B, ...], N a power of two: neighbours are merged first."""
    while leaves.shape[1] > 1:
        leaves = merge(leaves[:, 0::2], leaves[:, 1::2])
    return leaves[:, 0]


def reduce(tokens: TokenIndex) -> Tensor:
    """The state, [B, D], of the tokens that the call's mode looks at; 0 where there are none."""
    mode = MODES[tokens.call.mode]
    state = STATES[mode.reduce]
    leaves: Tensor | None = None
    for i in range(LEAF):
        token = tokens.states(i, state.neutral)
        if mode.weight is Weight.TOKEN:
            token = token * weights(tokens, i)
        leaves = state.merge(torch.full_like(token, state.neutral) if leaves is None else leaves, token)
    assert leaves is not None
    return torch.where(tokens.count > 0, tree(leaves, state.merge), 0)


def total_weight(tokens: TokenIndex) -> Tensor:
    """The sum of weights, [B, 1], in the canonical order."""
    leaves = torch.zeros_like(weights(tokens, 0))
    for i in range(LEAF):
        leaves = leaves + weights(tokens, i)
    return tree(leaves, torch.add)
