"""Counters of the arrival tree that are zero when a launch begins, without a launch that clears them.

Each stream of a device has two buffers, used in turn: a launch counts in one and clears, in passing, what the launch
before it has counted in the other. Launches of a stream run one after another, so what one has cleared is clear for
the next, whatever the launch before left behind: a cu_seqlens that decreases leaves nodes whose children never all
come, which whoever arrives last could not clear. A captured graph may be replayed on any stream, beside others: it
gets memory of its own, and clears it. So does whoever finds a stream's buffers taken by another thread.
"""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

LEAST = 4096  # counters of a buffer
MOST_STREAMS = 256  # that have buffers; others clear memory of their own
PER_THREAD_STREAM = 2  # CUDA's handle for as many streams as there are threads

Counting = Callable[[Tensor, Tensor, int], Any]  # counters of a launch; stale ones, of which so many are to be cleared


class _Pair:
    """The buffers of a stream."""

    def __init__(self) -> None:
        self.lock = Lock()  # held from the choice of a buffer until its launch is on the stream
        self.forget()

    def forget(self) -> None:
        """To be called where it is not known whether a launch went out: the next one begins with new buffers."""
        self.buffers: list[Tensor | None] = [None, None]
        self.used = [0, 0]
        self.turn = 0

    def run(self, device: torch.device, count: int, launch: Counting) -> None:
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


_pairs: dict[tuple[torch.device, int], _Pair] = {}


def launch_with_counters(device: torch.device, count: int, launch: Counting) -> None:
    """Runs a launch that needs `count` counters, on the current stream of `device`, which must be the current one."""
    pair = _pair(device)
    # Taken by another thread, by this one, which a signal has interrupted, or before a fork.
    if pair is None or not pair.lock.acquire(blocking=False):
        counters = torch.zeros(count, dtype=torch.int32, device=device)
        launch(counters, counters, 0)
        return
    try:
        pair.run(device, count, launch)
    finally:
        pair.lock.release()


def _pair(device: torch.device) -> _Pair | None:
    """The buffers of the current stream; None where none can be kept for it."""
    stream = _stream(device)
    if stream is None:
        return None
    pair = _pairs.get((device, stream))
    if pair is None and len(_pairs) < MOST_STREAMS:
        pair = _pairs.setdefault((device, stream), _Pair())
    return pair


def _stream(device: torch.device) -> int | None:
    """The current one's handle; None where counters cannot be kept for it."""
    if device.type != "cuda":
        return 0  # calls on a CPU run one after another, like those of one stream
    if torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device).cuda_stream
    return None if stream == PER_THREAD_STREAM else stream


def _kept(device: torch.device, size: int) -> Tensor:
    """Counters that stay. To a thread that warms up or captures a graph, torch gives memory of the graph's, which is
    given to others later: so another thread asks for these, on a stream that is not the graph's."""
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    future: Future[Tensor] = Future()

    def allocate() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                future.set_result(torch.empty(size, dtype=torch.int32, device=device))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=allocate).start()
    counters = future.result()
    current.wait_stream(stream)  # whatever had the memory before, or has filled it
    counters.record_stream(current)
    return counters.zero_()
