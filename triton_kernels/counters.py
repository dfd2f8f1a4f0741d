"""Counters of the arrival tree that are zero when a launch begins, without a launch that clears them.

Each stream of a device has two buffers, used in turn: a launch counts in one and clears, in passing, what the launch
before it has counted in the other. Launches of a stream run one after another, so what one has cleared is clear for
the next, whatever the launch before left behind: a cu_seqlens that decreases leaves nodes whose children never all
come, which whoever arrives last could not clear. A captured graph may be replayed on any stream, beside others: it
gets memory of its own, and clears it.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

LEAST = 4096  # counters of a buffer
MOST_STREAMS = 256  # whose buffers are kept
PER_THREAD_STREAM = 2  # CUDA's handle for as many streams as there are threads

Launch = Callable[[Tensor, Tensor, int], Any]  # counters; stale ones, of which so many are to be cleared


class _Pair:
    """The buffers of a stream."""

    def __init__(self) -> None:
        # Choosing a buffer and launching are one step for every thread that uses the stream. A signal's handler may
        # come in between, in the same thread.
        self.lock = threading.RLock()
        self.launching = False
        self.forget()

    def forget(self) -> None:
        """For when nobody knows whether a launch went out: the next one begins with new buffers."""
        self.buffers: list[Tensor | None] = [None, None]
        self.used = [0, 0]
        self.turn = 0

    def run(self, device: torch.device, count: int, launch: Launch) -> None:
        if self.launching:
            return launch(*_own(device, count))
        self.launching = True
        try:
            mine, other = self.turn, 1 - self.turn
            counters = self.buffers[mine]
            if counters is None or counters.numel() < count:
                counters = self.buffers[mine] = _kept(device, max(LEAST, 1 << (count - 1).bit_length()))
            stale = self.buffers[other]
            launch(counters, counters if stale is None else stale, self.used[other])
            self.used[mine], self.used[other], self.turn = count, 0, other
        except BaseException:
            self.forget()
            raise
        finally:
            self.launching = False


_pairs: dict[tuple[torch.device, int], _Pair] = {}
os.register_at_fork(after_in_child=_pairs.clear)  # locks that threads of the parent hold


def _own(device: torch.device, count: int) -> tuple[Tensor, Tensor, int]:
    """Counters of one launch alone."""
    counters = torch.zeros(count, dtype=torch.int32, device=device)
    return counters, counters, 0


def _kept(device: torch.device, size: int) -> Tensor:
    """Counters that stay. Where a thread warms up or captures a graph, torch gives it memory of the graph's, which is
    given to others later: so another thread asks for these, and a stream that is not the graph's."""
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)

    def allocate() -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            return torch.empty(size, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as other:
        counters = other.submit(allocate).result()
    counters.record_stream(torch.cuda.current_stream(device))
    return counters.zero_()


def _stream(device: torch.device) -> int | None:
    """The current one's handle; None where counters cannot be kept for it."""
    if device.type != "cuda":
        return 0  # calls on a CPU run one after another, like those of one stream
    if torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device).cuda_stream
    return None if stream == PER_THREAD_STREAM else stream


def launch_with_counters(device: torch.device, count: int, launch: Launch) -> None:
    """Runs a launch that needs `count` counters, on the current stream of `device`, which must be the current one."""
    stream = _stream(device)
    if stream is None:
        return launch(*_own(device, count))
    pair = _pairs.get((device, stream))
    if pair is None:
        if len(_pairs) >= MOST_STREAMS:  # streams come and go; who still uses a pair keeps it
            _pairs.pop(next(iter(_pairs)), None)
        pair = _pairs.setdefault((device, stream), _Pair())
    with pair.lock:
        pair.run(device, count, launch)
