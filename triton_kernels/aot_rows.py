"""What calls that take vectors, not texts, come to: part of aot.py's variants."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..calls import NormalizeBackwardCall, NormalizeCall, QuantizeCall, accumulator
from ..constants import NORM_EPS
from ..kinds import KINDS
from .launch import Launch
from .plan import DeviceProperties, plan_normalize, plan_normalize_backward
from .plan_quantize import plan_quantize

QUANTIZED = ("uint8", "ubinary", "int8_tanh")  # the other kinds' programs are the same


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row_launches(dtype: torch.dtype, dim: int, warp_size: int) -> Iterator[tuple[str, Launch]]:
    """What calls of this dtype and width come to, and from what."""
    x, one = empty(1, dim, dtype=dtype), DeviceProperties("aot", 1, warp_size)
    for given, cut in (("", None), ("(truncate_dims)", empty(1, dtype=torch.int32))):
        yield f"l2_normalize{given}", plan_normalize(x, NORM_EPS, x, one, cut)
        gradient_call = NormalizeBackwardCall(
            NormalizeCall(x, truncate_dims=cut), empty(1, dim, dtype=accumulator(dtype))
        )
        yield f"gradient of l2_normalize{given}", plan_normalize_backward(gradient_call, one)
    for kind in QUANTIZED:
        ranges = empty(2, dim, dtype=torch.float32) if kind == "uint8" else None
        yield f"quantize({kind})", plan_quantize(QuantizeCall(x, list(KINDS).index(kind), ranges), one)
