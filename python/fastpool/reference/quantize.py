"""quantize: embeddings to bytes."""

import torch
from torch import Tensor

from ..calls import QuantizeCall, accumulator
from ..kinds import How
from .elementary import tanh


def quantize(call: QuantizeCall) -> Tensor:
    """Whole numbers, or bits, of each column that is used; in the accumulator's dtype until they are."""
    x = call.x[..., : call.columns]
    x = x.to(accumulator(x.dtype))
    flip = call.row.flip
    if call.row.how is How.BUCKETS:
        assert call.ranges is not None
        low, step = low_and_step(call.ranges[:, : call.columns])
        bucket = ((x - low) / step).floor().clamp(0, 255)
        whole = torch.where(bucket.isnan(), flip, bucket)  # so that its byte is 0
    elif call.row.how is How.TANH:
        whole = (tanh(x) * 127).round().nan_to_num(0.0)
    else:
        whole = _packed(x >= 0 if call.zero_bit else x > 0)
    return (whole.to(torch.int32) & 255 ^ flip).to(torch.uint8).view(call.row.dtype)


def low_and_step(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's minimum, and the width of a bucket: 1 where all values are the same."""
    low, high = ranges
    step = (high - low) / torch.full_like(low, 255)  # a plain 255 may become a product with its inverse
    return low, torch.where(step == 0, 1.0, step)


def _packed(bits: Tensor) -> Tensor:
    """Eight to a byte, the first one highest; the last byte is filled up with 0."""
    whole = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.int32)
    packed: Tensor = (whole << torch.arange(7, -1, -1, device=bits.device)).sum(-1)
    return packed
