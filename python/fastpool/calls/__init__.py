"""Calls: an op's arguments as one object, which every backend gets; the checks of them, and what is wrong in words."""

from torch import Tensor

from .common import accumulator, why_no_memory
from .normalize import NormalizeBackwardCall, NormalizeCall
from .pool import PoolBackwardCall, PoolCall
from .segments import OfSegments
from .tokens import TokensBackwardCall, TokensCall

Call = PoolCall | PoolBackwardCall | NormalizeCall | NormalizeBackwardCall | TokensCall | TokensBackwardCall
Result = Tensor | tuple[Tensor, Tensor]  # of an op

__all__ = [
    "Call",
    "NormalizeBackwardCall",
    "NormalizeCall",
    "OfSegments",
    "PoolBackwardCall",
    "PoolCall",
    "Result",
    "TokensBackwardCall",
    "TokensCall",
    "accumulator",
    "why_no_memory",
]
