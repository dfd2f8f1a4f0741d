"""Which tokens: where each segment's real ones are, in both layouts, and which of them a mode looks at."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..calls import PoolCall, accumulator
from ..constants import LEAF
from ..modes import MODES, Select


@dataclass
class TokenIndex:
    """Where the real tokens are that a mode looks at, a leaf position at a time."""

    call: PoolCall

    @cached_property
    def columns(self) -> int:
        return self.call.hidden.shape[-1] if self.call.truncate_dim is None else self.call.truncate_dim

    def at(self, per_token: Tensor, index: Tensor) -> Tensor:
        """per_token[b, index[b]] of padded input, per_token[index[b]] of packed: all that tells the layouts apart."""
        if not self.call.padded:
            return per_token[index]
        batch = torch.arange(index.shape[0], device=index.device)
        return per_token[batch.view(-1, *[1] * (index.dim() - 1)), index]

    def _is_real(self, index: Tensor, ends: Tensor) -> Tensor:
        inside = index < ends.view(-1, *[1] * (index.dim() - 1))
        if self.call.mask is None or self.call.rows == 0:
            return inside
        return inside & (self.at(self.call.mask, index.clamp(max=self.call.rows - 1)) != 0)

    @cached_property
    def first_and_last_real(self) -> tuple[Tensor, Tensor]:
        """The first real token of each segment and the last one; first > last where there is none. [B] each."""
        starts, ends = self.call.bounds()
        longest = int((ends - starts).max()) if len(starts) else 0
        if longest <= 0:
            return starts, starts - 1
        index = starts[:, None] + torch.arange(longest, device=starts.device)
        real = self._is_real(index, ends)
        none = ~real.any(1)
        first = starts + real.int().argmax(1)
        last = starts + longest - 1 - real.flip(1).int().argmax(1)
        return first, torch.where(none, first - 1, last)

    @cached_property
    def first_and_last(self) -> tuple[Tensor, Tensor]:
        """The first token that the mode looks at, and the last one, likewise."""
        first, last = self.first_and_last_real
        there = first <= last
        select = MODES[self.call.mode].select
        if select is Select.FIRST:
            last = torch.where(there, first, last)
        elif select is Select.LAST:
            first = torch.where(there, last, first)
        return first, last

    @cached_property
    def index(self) -> Tensor:
        """Row numbers [B, leaves, LEAF], leaves a power of two."""
        first, last = self.first_and_last
        longest = int((last - first).max()) + 1 if len(first) else 0
        leaves = 1
        while leaves * LEAF < longest:
            leaves *= 2
        return first[:, None, None] + torch.arange(leaves * LEAF, device=first.device).view(1, leaves, LEAF)

    @cached_property
    def real(self) -> Tensor:
        """Which of `index` are real tokens."""
        return self._is_real(self.index, self.first_and_last[1] + 1)

    @cached_property
    def count(self) -> Tensor:
        """Real tokens, [B, 1], in the accumulator's dtype."""
        return self.real.sum((1, 2))[:, None].to(accumulator(self.call.hidden.dtype))

    def states(self, i: int, neutral: float) -> Tensor:
        """The token states at position `i` of each leaf, `neutral` where no real token is. [B, leaves, D]"""
        return self._states(self.call.hidden[..., : self.columns], i, neutral)

    def whole_states(self, i: int) -> Tensor:
        """With all columns, those that are cut off too. [B, leaves, H]"""
        return self._states(self.call.hidden, i, 0.0)

    def _states(self, hidden: Tensor, i: int, neutral: float) -> Tensor:
        dtype = accumulator(hidden.dtype)
        index = self.index[:, :, i]
        if self.call.rows == 0:
            return hidden.new_full((*index.shape, hidden.shape[-1]), neutral, dtype=dtype)
        safe = index.clamp(max=self.call.rows - 1)
        return torch.where(self.real[:, :, i, None], self.at(hidden, safe).to(dtype), neutral)
