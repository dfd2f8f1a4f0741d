"""Calls: an op's arguments as one object, which every backend gets; the checks of them, and what is wrong in words."""

from torch import Tensor

from .common import accumulator, why_no_memory
from .normalize import NormalizeBackwardCall, NormalizeCall
from .pool import PoolBackwardCall, PoolCall
from .quantize import QuantizeCall
from .segments import OfSegments
from .tokens import TokensBackwardCall, TokensCall

_OfTokens = PoolCall | PoolBackwardCall | TokensCall | TokensBackwardCall
Call = _OfTokens | NormalizeCall | NormalizeBackwardCall | QuantizeCall
Result = Tensor | tuple[Tensor, Tensor]  # of an op

__all__ = [
    "Call",
    "NormalizeBackwardCall",
    "NormalizeCall",
    "OfSegments",
    "PoolBackwardCall",
    "PoolCall",
    "QuantizeCall",
    "Result",
    "TokensBackwardCall",
    "TokensCall",
    "accumulator",
    "why_no_memory",
]
