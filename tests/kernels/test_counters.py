"""Counters of the arrival tree are zero when a launch begins, whatever the launches before it did. Launches are
stand-ins here that leave anything behind; a CPU counts as one stream."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels import counters  # after the skip

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_streams_yet() -> Iterator[None]:
    counters._pairs.clear()
    yield
    counters._pairs.clear()


def launch(count: int, seen: list[int] | None = None) -> None:
    """Finds zeros, clears what it is told to, and leaves garbage in all that it may count in."""

    def kernel(arrivals: Tensor, stale: Tensor, stale_count: int) -> None:
        assert not arrivals[:count].any()
        stale[:stale_count] = 0
        arrivals[:count] = 7
        if seen is not None:
            seen.append(arrivals.data_ptr())

    counters.launch_with_counters(CPU, count, kernel)


@pytest.fixture
def zeros(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what had to be cleared by a launch of its own."""
    made: list[int] = []
    make = torch.zeros

    def spy(size: int, **more: object) -> Tensor:
        made.append(size)
        return make(size, **more)

    monkeypatch.setattr(counters.torch, "zeros", spy)
    return made


def test_zero_whatever_is_left(zeros: list[int]) -> None:
    for count in (5, 4000, 1, 3, 4096, 2, 2, 17):
        launch(count)
    assert zeros == [counters.LEAST] * 2


def test_they_grow(zeros: list[int]) -> None:
    for count in (10, 5000, 5000, 70_000, 3, 70_000, 70_000, 5):
        launch(count)
    assert zeros == [4096, 8192, 8192, 131_072, 131_072]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("launched", [False, True])
def test_after_an_exception(launched: bool, error: type[BaseException]) -> None:
    """Whether it came before the kernel went out or after."""

    def breaks(arrivals: Tensor, stale: Tensor, stale_count: int) -> None:
        if launched:
            stale[:stale_count] = 0
            arrivals[:50] = 7
        raise error

    for before in range(3):
        for _ in range(before):
            launch(60)
        with pytest.raises(error):
            counters.launch_with_counters(CPU, 50, breaks)
        for _ in range(3):
            launch(60)


def test_a_signal_in_between() -> None:
    """Its handler may pool too, in the same thread."""
    launch(9)
    seen: list[int] = []

    def interrupted(arrivals: Tensor, stale: Tensor, stale_count: int) -> None:
        launch(9, seen)
        assert not arrivals[:9].any()
        stale[:stale_count] = 0
        arrivals[:9] = 7
        seen.append(arrivals.data_ptr())

    counters.launch_with_counters(CPU, 9, interrupted)
    assert seen[0] != seen[1]
    for _ in range(3):
        launch(9)


def test_threads_on_one_stream() -> None:
    """While one is between its choice of a buffer and its launch, another has counters of its own."""
    launch(9)
    chosen, over = threading.Event(), threading.Event()
    seen: list[int] = []

    def slow(arrivals: Tensor, stale: Tensor, stale_count: int) -> None:
        chosen.set()
        assert over.wait(60)
        assert not arrivals[:9].any()
        stale[:stale_count] = 0
        arrivals[:9] = 7
        seen.append(arrivals.data_ptr())

    thread = threading.Thread(target=counters.launch_with_counters, args=(CPU, 9, slow))
    thread.start()
    assert chosen.wait(60)
    for _ in range(3):
        launch(9, seen)
    kept = {buffer.data_ptr() for pair in counters._pairs.values() for buffer in pair.buffers if buffer is not None}
    over.set()
    thread.join()
    *others, mine = seen
    assert len(others) == 3
    assert mine in kept
    assert not kept & set(others)
    for _ in range(3):
        launch(9)


def test_each_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [0, 1, 0, 1, 1, 0]
    monkeypatch.setattr(counters, "_stream", lambda device: streams.pop(0))
    seen: list[int] = []
    for _ in range(6):
        launch(9, seen)
    assert len({seen[0], seen[2]} | {seen[1], seen[3]}) == 4
    assert seen[5] == seen[0]
    assert seen[4] == seen[1]


def test_a_capture_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch, zeros: list[int]) -> None:
    """It is replayed later, on any stream, and clears what it counts in each time."""
    launch(9)
    launch(9)
    kept = [buffer for pair in counters._pairs.values() for buffer in pair.buffers]
    monkeypatch.setattr(counters, "_stream", lambda device: None)
    seen: list[int] = []
    launch(9, seen)
    assert zeros[2:] == [9]
    assert seen[0] not in [buffer.data_ptr() for buffer in kept if buffer is not None]
    monkeypatch.undo()
    launch(9)


def test_which_streams_keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for capturing, handle, kept in ((False, 0, 0), (False, 77, 77), (True, 77, None), (False, 2, None)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        stream = type("Stream", (), {"cuda_stream": handle})
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        assert counters._stream(device) == kept


def test_each_device_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default streams of all devices have the same handle."""
    monkeypatch.setattr(counters, "_stream", lambda device: 0)
    made: list[torch.device] = []
    monkeypatch.setattr(counters, "_kept", lambda device, size: made.append(device) or torch.zeros(size).int())
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    for device in devices * 3:
        counters.launch_with_counters(device, 9, lambda arrivals, stale, stale_count: None)
    assert made == [*devices, *devices]


def test_kept_memory_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from another thread and another stream: on the device that is meant, and the current stream waits for
    whatever that stream still does with it."""
    said: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            said.append(f"{self.name} in {'another' if threading.current_thread() is not main else 'this'} thread")

        def __exit__(self, *_: object) -> None:
            said.append(f"left {self.name}")

        def wait_stream(self, other: "Named") -> None:
            said.append(f"{self.name} waits for {other.name}")

    class Memory:
        def record_stream(self, stream: Named) -> None:
            said.append(f"used by {stream.name}")

        def zero_(self) -> str:
            said.append("cleared")
            return "counters"

    main = threading.current_thread()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Named("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Named("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: Named(str(device)))
    monkeypatch.setattr(counters.torch, "empty", lambda size, **more: Memory())
    assert counters._kept(torch.device("cuda", 1), 9) == "counters"
    assert said == [
        "cuda:1 in another thread",
        "side in another thread",
        "left side",
        "left cuda:1",
        "current waits for side",
        "used by current",
        "cleared",
    ]
    said.clear()

    def fails(size: int, **more: object) -> Memory:
        raise MemoryError

    monkeypatch.setattr(counters.torch, "empty", fails)
    with pytest.raises(MemoryError):
        counters._kept(torch.device("cuda", 1), 9)


def test_only_so_many_streams_have_buffers(monkeypatch: pytest.MonkeyPatch, zeros: list[int]) -> None:
    monkeypatch.setattr(counters, "MOST_STREAMS", 3)
    for stream in (0, 1, 2, 3, 4, 3, 0):
        monkeypatch.setattr(counters, "_stream", lambda device, stream=stream: stream)
        launch(2)
    assert len(counters._pairs) == 3
    assert zeros == [counters.LEAST] * 3 + [2] * 3 + [counters.LEAST]
