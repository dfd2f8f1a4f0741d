"""Memory that ends the process when somebody touches what is not his."""

import ctypes
import mmap
import os
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def forbid(address: int, bytes: int) -> None:
    """Nobody may touch these whole pages any more."""
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(bytes), 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def forbid_within(ranges: Iterable[tuple[int, int]]) -> None:
    """The pages that lie wholly within one of these ranges of addresses, in ascending order; ranges that touch are
    one."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    for start, end in joined:
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if first < last:
            forbid(first, last - first)


def at_the_edge(elements: int, dtype: torch.dtype, behind: bool) -> Tensor:
    """[elements], between two pages that nobody may touch: its last byte stands right before the second of them, or its
    first byte right behind the first one. Every bit is set: NaN, -1."""
    bytes = elements * dtype.itemsize
    room = -(-bytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole.fill_(255)
    forbid(whole.data_ptr(), PAGE)
    forbid(whole.data_ptr() + PAGE + room, PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements, offset=PAGE + (room - bytes if behind else 0))
