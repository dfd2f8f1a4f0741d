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

from .segments import NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall, accumulator

LEAF = 32  # tokens; as in csrc/pool.h
NORM_EPS = 1e-12  # F.normalize's default


@dataclass
class Tokens:
    """The real tokens of every segment, a leaf position at a time."""

    call: PoolCall

    @cached_property
    def columns(self) -> int:
        return self.call.hidden.shape[-1] if self.call.truncate_dim is None else self.call.truncate_dim

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
            index = self.index[:, :, i]
            if self.call.rows == 0:
                states = hidden.new_full((*index.shape, self.columns), neutral, dtype=dtype)
            else:
                safe = index.clamp(max=self.call.rows - 1)
                states = torch.where(self.real[:, :, i, None], self._at(hidden, safe).to(dtype), neutral)
            yield states, self.weights(i)

    @cached_property
    def all_weights(self) -> Tensor:
        """[B, leaves, LEAF]"""
        return torch.cat([self.weights(i) for i in range(LEAF)], dim=2)

    def weights(self, i: int) -> Tensor:
        """Of the tokens at position `i` of each leaf, 0 where they are not real. [B, leaves, 1]"""
        index = self.index[:, :, i]
        if self.call.weights is None:
            weights = index - self._first_and_last[0][:, None] + 1
        elif self.call.rows == 0:
            weights = torch.zeros_like(index)
        else:
            weights = self._at(self.call.weights, index.clamp(max=self.call.rows - 1))
        weights = weights.to(accumulator(self.call.hidden.dtype))
        return torch.where(self.real[:, :, i], weights, 0)[..., None]

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


def _weighted_sum(tokens: Tokens) -> Tensor:
    leaves: Tensor | float = 0.0
    for states, weights in tokens.steps(neutral=0.0):
        leaves = leaves + states * weights
    assert isinstance(leaves, Tensor)
    return _tree(leaves, torch.add)


def _total_weight(tokens: Tokens) -> Tensor:
    leaves: Tensor | float = 0.0
    for i in range(LEAF):
        leaves = leaves + tokens.weights(i)
    assert isinstance(leaves, Tensor)
    return _tree(leaves, torch.add)


def _later_if_greater(left: Tensor, right: Tensor) -> Tensor:
    """The maximum; the first of equals stays, and the first NaN."""
    return torch.where((left == left) & ~(right <= left), right, left)


def _max(tokens: Tokens) -> Tensor:
    leaves = None
    for states, _ in tokens.steps(neutral=float("-inf")):
        leaves = states if leaves is None else _later_if_greater(leaves, states)
    assert leaves is not None
    return torch.where(tokens.count > 0, _tree(leaves, _later_if_greater), 0)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt is on a GPU but not on a CPU (it is a vector library's there)."""
    return x.sqrt() if x.device.type != "cpu" else x.double().apply_(math.sqrt).to(x.dtype)


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by; 0 where `by` is 0: no real token, or weights that add up to nothing."""
    return torch.where(by == 0, 0, x / by)


# What a segment's gradient [D], already divided, becomes at each of its real tokens: [n, D].
Shares = Callable[["Segment"], Tensor]


@dataclass
class Segment:
    """One segment of a PoolBackwardCall: its gradient over its divisor, and what its shares depend on."""

    gradient: Tensor  # [D]
    weights: Tensor  # [n, 1], of its real tokens
    states: Callable[[], Tensor]  # [n, D], of its real tokens, in the accumulator's dtype
    result: Tensor | None  # [D]


def _all_alike(segment: Segment) -> Tensor:
    return segment.gradient.expand(len(segment.weights), -1)


def _by_weight(segment: Segment) -> Tensor:
    return segment.gradient * segment.weights


def _first_maximum(segment: Segment) -> Tensor:
    assert segment.result is not None
    states = segment.states()
    equal = (states == segment.result) | (states.isnan() & segment.result.isnan())
    token = torch.arange(len(states), device=states.device)[:, None]
    return torch.where(equal.int().argmax(0) == token, segment.gradient, 0)


def _only(which: int) -> Shares:
    def share(segment: Segment) -> Tensor:
        shares = segment.gradient.new_zeros(len(segment.weights), len(segment.gradient))
        shares[which] = segment.gradient
        return shares

    return share


@dataclass(frozen=True)
class Body:
    """A mode: what real tokens come to [B, D], what that is divided by [B, 1], if anything, and how a gradient is
    shared among them."""

    reduce: Callable[[Tokens], Tensor]
    divisor: Callable[[Tokens], Tensor] | None
    share: Shares


BODIES: dict[str, Body] = {
    "mean": Body(_sum, lambda tokens: tokens.count, _all_alike),
    "mean_sqrt_len": Body(_sum, lambda tokens: _sqrt(tokens.count), _all_alike),
    "sum": Body(_sum, None, _all_alike),
    "max": Body(_max, None, _first_maximum),
    "cls": Body(lambda tokens: tokens.one(0), None, _only(0)),
    "last": Body(lambda tokens: tokens.one(1), None, _only(-1)),
    "weighted_mean": Body(_weighted_sum, _total_weight, _by_weight),
}


def _quotient(tokens: Tokens, x: Tensor) -> Tensor:
    """x [B, D] over its mode's divisor."""
    divisor = BODIES[tokens.call.mode].divisor
    return x if divisor is None else _divide(x, divisor(tokens))


def _add_columns(x: Tensor) -> Tensor:
    """[..., 1]: x over its columns, neighbours first, in the same aligned binary tree as leaves; never -0."""
    columns = 1
    while columns < x.shape[-1]:
        columns *= 2
    x = torch.nn.functional.pad(x, (0, columns - x.shape[-1]))
    return _tree(x.movedim(-1, 1) if x.dim() > 1 else x[None], torch.add).reshape(*x.shape[:-1], 1) + 0.0


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x * scale, max(norm, eps) * scale, whether it is the norm, and scale: 1, or a power of two where the square of
    the norm overflows. [..., columns] and three of [..., 1]"""
    squares = _add_columns(x * x)
    small = 2.0**-600 if x.dtype == torch.float64 else 2.0**-100
    scale = torch.where(squares == float("inf"), small, torch.ones_like(squares))
    norm = _sqrt(_add_columns((x * scale) * (x * scale)))
    least = eps * scale
    return x * scale, torch.where((norm > least) | norm.isnan(), norm, least), ~(norm < least), scale


def _l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(norm, eps)."""
    if x.shape[-1] == 0:
        return x
    scaled, divisor, _, _ = _norm(x, eps)
    return scaled / divisor


def _l2_normalize_backward(
    gradient: Tensor, x: Tensor, eps: float, used: Callable[[Tensor], Tensor] = lambda z: z
) -> Tensor:
    """(g - z sum(z g)) / norm, z = x / norm; g / eps where the norm is below eps. `used` puts 0 for what is not summed,
    which a norm of 0 would turn into NaN."""
    if x.shape[-1] == 0:
        return gradient
    scaled, divisor, is_norm, scale = _norm(x, eps)
    z = used(scaled / divisor)
    across = torch.where(is_norm, gradient - z * _add_columns(z * gradient), gradient)
    return (across * scale) / divisor


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
    """One vector per segment, [B, truncate_dim or H]."""
    tokens = Tokens(call)
    x = _quotient(tokens, BODIES[call.mode].reduce(tokens))
    if call.normalize:
        x = _l2_normalize(x, NORM_EPS)
    return _round_once(x, call.out_dtype or call.hidden.dtype)


def pool_backward(call: PoolBackwardCall) -> Tensor:
    """The gradient of hidden, or of weights: +0, then what each segment shares out, in the order of segments; rounded
    once. What belongs to no segment, or is not real, is 0."""
    pool, dtype = call.pool, call.gradient.dtype
    share = _share_of_weights if call.of_weights else BODIES[pool.mode].share
    tokens = Tokens(pool)
    gradients = _quotient(tokens, call.gradient)
    of = pool.weights if call.of_weights else pool.hidden
    assert of is not None
    total = of.new_zeros(of.shape, dtype=dtype)
    into = total if call.of_weights else total[..., : tokens.columns]
    for b in range(pool.batch if pool.rows > 0 else 0):
        rows = tokens.index[b][tokens.real[b]]
        if len(rows) == 0:
            continue
        hidden = (pool.hidden[b] if pool.padded else pool.hidden)[..., : tokens.columns]
        segment = Segment(
            gradients[b],
            tokens.all_weights[b][tokens.real[b]][:, None],
            lambda hidden=hidden, rows=rows: hidden[rows].to(dtype),  # type: ignore[misc]  # bound now
            None if call.result is None else call.result[b],
        )
        (into[b] if pool.padded else into)[rows] += share(segment)
    return _round_once(total, of.dtype)


def _share_of_weights(segment: Segment) -> Tensor:
    """sum(g x) - sum(g y) over columns, for the weight of a token x of a segment with result y and gradient g. [n]"""
    assert segment.result is not None
    products = _add_columns(segment.gradient * segment.states())
    return (products - _add_columns(segment.gradient * segment.result))[:, 0]


def l2_normalize(call: NormalizeCall) -> Tensor:
    """x / max(norm(x), eps) over the last dimension; 0 in the columns that truncate_dims leave out."""
    x, eps = _columns_of(call)
    result = _round_once(_used(call, _l2_normalize(x, eps)), call.out_dtype or call.x.dtype)
    return result.clone(memory_format=torch.contiguous_format)  # a new tensor, as the op's schema says


def l2_normalize_backward(call: NormalizeBackwardCall) -> Tensor:
    """The gradient of x; 0 in the columns that were not used."""
    x, eps = _columns_of(call.normalize)

    def used(columns: Tensor) -> Tensor:
        return _used(call.normalize, columns)

    gradient = torch.zeros_like(call.normalize.x, dtype=x.dtype, memory_format=torch.contiguous_format)
    gradient[..., : x.shape[-1]] = used(_l2_normalize_backward(used(call.gradient), x, eps, used))
    return _round_once(gradient, call.normalize.x.dtype)


def _columns_of(call: NormalizeCall) -> tuple[Tensor, float]:
    """The columns that are used, 0 where truncate_dims leave them out, and eps, in the accumulator's dtype, as kernels
    have them."""
    x = call.x[..., : call.columns]
    dtype = accumulator(x.dtype)
    return _used(call, x.to(dtype)), float(torch.tensor(call.eps, dtype=dtype))


def _used(call: NormalizeCall, x: Tensor) -> Tensor:
    """x with +0 in the columns that truncate_dims leave out: more of them change no sum of columns."""
    if call.truncate_dims is None:
        return x
    return torch.where(torch.arange(x.shape[-1], device=x.device) < call.truncate_dims[..., None], x, 0.0)
