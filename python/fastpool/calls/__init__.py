"""Calls: an op's arguments as one object, which every backend gets; the checks of them, and what is wrong in words."""

from .common import accumulator, why_no_memory
from .normalize import NormalizeBackwardCall, NormalizeCall
from .pool import PoolBackwardCall, PoolCall

Call = PoolCall | PoolBackwardCall | NormalizeCall | NormalizeBackwardCall

__all__ = [
    "Call",
    "NormalizeBackwardCall",
    "NormalizeCall",
    "PoolBackwardCall",
    "PoolCall",
    "accumulator",
    "why_no_memory",
]
