"""The kinds of quantised embeddings: one table. Ops take a kind's place in it (csrc/quantize.h has the same), since
torch's stable ABI leaks strings that C++ hands on to Python."""

from dataclasses import dataclass
from enum import Enum

import torch


class How(Enum):
    """How a value becomes a byte, or a bit of one."""

    BUCKETS = 0  # which of 256 equal steps between a column's minimum and maximum
    TANH = 1  # 127 tanh(x), to the nearest whole number and in ties to the even one
    BITS = 2  # its sign, eight columns to a byte, the first one in the highest bit


@dataclass(frozen=True)
class Kind:
    """`flip`: the byte is exclusive-ored with it, which in two's complement subtracts 128."""

    name: str
    how: How
    dtype: torch.dtype
    flip: int

    def out_columns(self, values: int) -> int:
        """Bytes of a vector of so many values."""
        return -(-values // 8) if self.how is How.BITS else values


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("int8", How.BUCKETS, torch.int8, 128),
        Kind("uint8", How.BUCKETS, torch.uint8, 0),
        Kind("binary", How.BITS, torch.int8, 128),
        Kind("ubinary", How.BITS, torch.uint8, 0),
        Kind("int8_tanh", How.TANH, torch.int8, 0),
    )
}
