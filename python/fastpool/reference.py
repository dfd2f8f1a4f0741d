"""The definition of right: every mode in plain PyTorch, on any device, in the canonical order of additions.

The order: tokens are numbered from their segment's first real token. A leaf is LEAF consecutive tokens, added one
after another from +0; holes add nothing. Leaves meet in an aligned binary tree: 0 with 1, 2 with 3, then those pairs,
and so on to the top; a missing right sibling adds nothing. So the order depends on a token's distance from its
segment's first real token alone, any aligned power of two of leaves is a subtree that may be summed anywhere, and the
error of a sum is at most (LEAF + log2(n / LEAF)) 2^-24 sum|x| (2^-53 in float64), however long the sequence. All of
it, weights and divisions included, is IEEE arithmetic in the accumulator's dtype without contraction, and the result
is rounded once at the end. Every backend gives these bits.

Not fast, and it synchronises with a GPU: use it to check and to understand.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .segments import NormalizeCall, PoolCall, accumulator

LEAF = 32  # tokens; as in csrc/pool.h
NORM_EPS = 1e-12  # F.normalize's default


@dataclass
class Tokens:
    """The real tokens of every segment, a leaf position at a time."""

    call: PoolCall

    @cached_property
    def columns(self) -> int:
        return self.call.hidden.shape[-1] if self.call.dim is None else self.call.dim

    def _at(self, per_token: Tensor, index: Tensor) -> Tensor:
        """per_token[b, index[b]] of padded input, per_token[index[b]] of packed: all that tells the layouts apart."""
        if not self.call.padded:
            return per_token[index]
        batch = torch.arange(index.shape[0], device=index.device)
        return per_token[batch.view(-1, *[1] * (index.dim() - 1)), index]

    def _is_real(self, index: Tensor, ends: Tensor) -> Tensor:
        inside = index < ends.view(-1, *[1] * (index.dim() - 1))
        if self.call.mask is None or self.call.rows == 0:
            return inside
        return inside & (self._at(self.call.mask, index.clamp(max=self.call.rows - 1)) != 0)

    @cached_property
    def _first_and_last(self) -> tuple[Tensor, Tensor]:
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
    def index(self) -> Tensor:
        """Row numbers [B, leaves, LEAF], leaves a power of two."""
        first, last = self._first_and_last
        longest = int((last - first).max()) + 1 if len(first) else 0
        leaves = 1
        while leaves * LEAF < longest:
            leaves *= 2
        return first[:, None, None] + torch.arange(leaves * LEAF, device=first.device).view(1, leaves, LEAF)

    @cached_property
    def real(self) -> Tensor:
        """Which of `index` are real tokens."""
        return self._is_real(self.index, self._first_and_last[1] + 1)

    @cached_property
    def count(self) -> Tensor:
        """Real tokens, [B, 1], in the accumulator's dtype."""
        return self.real.sum((1, 2))[:, None].to(accumulator(self.call.hidden.dtype))

    def steps(self, neutral: float) -> Iterator[tuple[Tensor, Tensor]]:
        """For each position in a leaf: token states [B, leaves, H], `neutral` where no real token is, and weights
        [B, leaves, 1], 0 there."""
        hidden = self.call.hidden[..., : self.columns]
        dtype = accumulator(hidden.dtype)
        for i in range(LEAF):
            real = self.real[:, :, i, None]
            index = self.index[:, :, i]
            if self.call.rows == 0:
                states = hidden.new_full((*index.shape, self.columns), neutral, dtype=dtype)
                yield states, torch.zeros_like(real, dtype=dtype)
                continue
            safe = index.clamp(max=self.call.rows - 1)
            states = torch.where(real, self._at(hidden, safe).to(dtype), neutral)
            if self.call.weights is not None:
                weights = self._at(self.call.weights, safe).to(dtype)
            else:
                weights = (index - self._first_and_last[0][:, None] + 1).to(dtype)
            yield states, torch.where(real, weights[..., None], 0)

    def one(self, which: int) -> Tensor:
        """The first (0) or last (1) real token, [B, H]; 0 where there is none."""
        first, last = self._first_and_last
        hidden = self.call.hidden[..., : self.columns]
        dtype = accumulator(hidden.dtype)
        if self.call.rows == 0:
            return hidden.new_zeros((len(first), self.columns), dtype=dtype)
        index = (first, last)[which].clamp(0, self.call.rows - 1)
        return torch.where((first <= last)[:, None], self._at(hidden, index).to(dtype), 0)


def _tree(leaves: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    while leaves.shape[1] > 1:
        leaves = merge(leaves[:, 0::2], leaves[:, 1::2])
    return leaves[:, 0]


def _sum(tokens: Tokens) -> Tensor:
    leaves: Tensor | float = 0.0
    for states, _ in tokens.steps(neutral=0.0):
        leaves = leaves + states
    assert isinstance(leaves, Tensor)
    return _tree(leaves, torch.add)


def _mean(tokens: Tokens) -> Tensor:
    return _divide(_sum(tokens), tokens.count)


def _mean_sqrt_len(tokens: Tokens) -> Tensor:
    return _divide(_sum(tokens), _sqrt(tokens.count))


def _weighted_mean(tokens: Tokens) -> Tensor:
    sums: Tensor | float = 0.0
    totals: Tensor | float = 0.0
    for states, weights in tokens.steps(neutral=0.0):
        sums = sums + states * weights
        totals = totals + weights
    assert isinstance(sums, Tensor)
    assert isinstance(totals, Tensor)
    return _divide(_tree(sums, torch.add), _tree(totals, torch.add))


def _later_if_greater(left: Tensor, right: Tensor) -> Tensor:
    """The maximum; the first of equals stays, and the first NaN."""
    return torch.where((left == left) & ~(right <= left), right, left)


def _max(tokens: Tokens) -> Tensor:
    leaves = None
    for states, _ in tokens.steps(neutral=float("-inf")):
        leaves = states if leaves is None else _later_if_greater(leaves, states)
    assert leaves is not None
    return torch.where(tokens.count > 0, _tree(leaves, _later_if_greater), 0)


def _cls(tokens: Tokens) -> Tensor:
    return tokens.one(0)


def _last(tokens: Tokens) -> Tensor:
    return tokens.one(1)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt is on a GPU but not on a CPU (it is a vector library's there)."""
    return x.sqrt() if x.device.type != "cpu" else x.double().apply_(math.sqrt).to(x.dtype)


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by; 0 where `by` is 0: no real token, or weights that add up to nothing."""
    return torch.where(by == 0, 0, x / by)


BODIES: dict[str, Callable[[Tokens], Tensor]] = {
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "sum": _sum,
    "max": _max,
    "cls": _cls,
    "last": _last,
    "weighted_mean": _weighted_mean,
}


def _sum_of_squares(x: Tensor) -> Tensor:
    """[..., 1]: neighbours meet first, in the same aligned binary tree as leaves."""
    columns = 1
    while columns < x.shape[-1]:
        columns *= 2
    squares = torch.nn.functional.pad(x * x, (0, columns - x.shape[-1]))
    return _tree(squares.movedim(-1, 1) if x.dim() > 1 else squares[None], torch.add).reshape(*x.shape[:-1], 1)


def _l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(norm, eps). Where the square of the norm overflows, x is first scaled by a power of two."""
    if x.shape[-1] == 0:
        return x
    squares = _sum_of_squares(x)
    small = 2.0**-600 if x.dtype == torch.float64 else 2.0**-100
    scale = torch.where(squares == float("inf"), small, torch.ones_like(squares))
    norm = _sqrt(_sum_of_squares(x * scale))
    least = eps * scale
    return (x * scale) / torch.where((norm > least) | norm.isnan(), norm, least)


def _round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which for float64 to 16 bits would round twice (torch goes through float32): round to odd first."""
    if x.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    nearest = x.float()
    bits = nearest.view(torch.int32)
    inexact = (nearest.double() != x) & ~x.isnan() & (bits % 2 == 0)
    beyond = nearest.double().abs() > x.abs()
    odd = torch.where(beyond, bits - 1, bits + 1)
    smallest = torch.where(x < 0, torch.full_like(bits, -(2**31) + 1), torch.ones_like(bits))
    odd = torch.where(nearest == 0, smallest, odd)
    return torch.where(inexact, odd, bits).view(torch.float32).to(dtype)


def pool(call: PoolCall) -> Tensor:
    """One vector per segment, [B, dim or H]."""
    x = BODIES[call.mode](Tokens(call))
    if call.normalize:
        x = _l2_normalize(x, NORM_EPS)
    return _round_once(x, call.out_dtype or call.hidden.dtype)


def l2_normalize(call: NormalizeCall) -> Tensor:
    """x / max(norm(x), eps) over the last dimension."""
    x = call.x if call.dim is None else call.x[..., : call.dim]
    dtype = accumulator(x.dtype)
    # eps in the accumulator's precision, as the kernels have it.
    eps = float(torch.tensor(call.eps, dtype=dtype))
    result = _round_once(_l2_normalize(x.to(dtype), eps), call.out_dtype or call.x.dtype)
    return result.clone(memory_format=torch.contiguous_format)  # a new tensor, as the op's schema says
