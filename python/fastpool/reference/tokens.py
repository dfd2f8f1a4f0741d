"""The real tokens themselves, packed, and their gradient."""

import torch
from torch import Tensor

from ..calls import OfSegments, TokensBackwardCall, TokensCall, accumulator
from ..constants import NORM_EPS
from .finish import normalize, round_once


def real_tokens(call: OfSegments) -> tuple[Tensor, Tensor, Tensor]:
    """In the order of segments, and within each of rows: the segment of every real token, [N], its row, [N]; and where
    each segment begins among them, and behind the last one ends, [B + 1]."""
    starts, ends = call.bounds()
    longest = int((ends - starts).max()) if len(starts) else 0
    index = starts[:, None] + torch.arange(max(longest, 0), device=starts.device)
    real = index < ends[:, None]
    if call.mask is not None and call.rows > 0:
        row, of_rows = index.clamp(max=call.rows - 1), call.mask != 0
        real &= of_rows.gather(1, row) if call.padded else of_rows[row]
    segment, place = real.nonzero(as_tuple=True)
    return segment, index[segment, place], torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0))


def tokens(call: TokensCall) -> tuple[Tensor, Tensor]:
    """values [N or total, D], +0 behind the last token, and cu_seqlens [B + 1]."""
    segment, row, cu_seqlens = real_tokens(call)
    states = call.hidden[..., : call.columns]
    x = states[segment, row] if call.padded else states[row]
    size = len(x) if call.total is None else call.total
    x = x[:size]
    if call.normalize:
        x = normalize(x.to(accumulator(x.dtype)), NORM_EPS)
    values = round_once(x, call.out_dtype or call.hidden.dtype)
    return torch.nn.functional.pad(values, (0, 0, 0, size - len(x))), cu_seqlens.clamp(max=size)


def tokens_backward(call: TokensBackwardCall) -> Tensor:
    """The gradient of hidden: +0, then that of each segment's tokens, in the order of segments; rounded once. What
    belongs to no segment, is not real, or was cut off is 0."""
    tokens = call.tokens
    total = torch.zeros(tokens.hidden.shape, dtype=call.gradient.dtype, device=call.gradient.device)
    _, rows, cu_seqlens = real_tokens(tokens)
    offsets = cu_seqlens.clamp(max=len(call.gradient)).tolist()
    for b in range(tokens.batch):
        of_segment = slice(offsets[b], offsets[b + 1])
        into = total[b] if tokens.padded else total
        into[rows[of_segment], : tokens.columns] += call.gradient[of_segment]
    return round_once(total, tokens.hidden.dtype)
