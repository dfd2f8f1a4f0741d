"""Two ways of pooling the same token states: do they agree, how long do they take, how much memory."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .model import TokenStates

Pooling = Callable[[Tensor, Tensor], Tensor]

_RUNS = 7


def seconds(calls: list[Callable[[], object]]) -> list[float]:
    """The time of each call's fastest run: whatever else the machine does only adds. The calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # the first one pays for cold caches
    for _ in range(_RUNS):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that PyTorch's CPU allocator had handed out at one time during the call, its result included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # some builds of the profiler announce themselves on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@dataclass
class Comparison:
    """What was measured for fastpool and for the model's own modules, on the same token states."""

    fastpool: Pooling
    own: Pooling
    texts: int = 0
    batches: int = 0
    real_tokens: int = 0
    state_bytes: int = 0
    differences: list[Tensor] = field(default_factory=list)  # one for each batch
    cosines: list[Tensor] = field(default_factory=list)  # one for each text
    # fastpool's, the own modules'
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    largest: TokenStates | None = None  # the batch that peak() looks at

    def add(self, states: TokenStates) -> None:
        """Pools one more batch in both ways."""
        hidden, mask = states.hidden, states.mask
        both = (self.fastpool, self.own)
        vectors = [pool(hidden, mask) for pool in both]
        self._compare(*vectors)
        times = seconds([lambda pool=pool: pool(hidden, mask) for pool in both])  # type: ignore[misc]  # mypy's own limit
        self.seconds = [total + taken for total, taken in zip(self.seconds, times, strict=True)]
        self.texts += len(states.indices)
        self.batches += 1
        self.real_tokens += int(mask.sum())
        self.state_bytes += hidden.nbytes
        if self.largest is None or hidden.nbytes > self.largest.hidden.nbytes:
            self.largest = states

    def _compare(self, ours: Tensor, own: Tensor) -> None:
        ours, own = ours.double(), own.double()
        self.differences.append((ours - own).abs().max().view(1))
        self.cosines.append(torch.cosine_similarity(ours, own))

    # torch's max and min, as Python's own would lose a NaN.
    @property
    def max_difference(self) -> float:
        return torch.cat(self.differences).max().item()

    @property
    def min_cosine(self) -> float:
        return torch.cat(self.cosines).min().item()

    @property
    def agree(self) -> bool:
        return self.min_cosine >= 0.99999

    def peak(self) -> list[int]:
        """Bytes at the peak of pooling the largest batch: fastpool's, the own modules'."""
        assert self.largest is not None
        hidden, mask = self.largest.hidden, self.largest.mask
        return [peak_bytes(lambda: self.fastpool(hidden, mask)), peak_bytes(lambda: self.own(hidden, mask))]
