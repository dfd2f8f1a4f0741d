"""One CUDA device as measurements see it: its clock, its caches, its memory, its graphs."""

import ctypes
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

Run = Callable[[], object]
_CUDA = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]  # torch does not export it by name
_KERNEL_OR_COPY = (0, 1, 2)  # kinds of a graph's nodes, in the driver's numbers: kernel, memcpy, memset


class Gpu:
    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._buffer = torch.randn(self.cache_bytes, device=self.device)  # four times the cache
        self._failed: list[Any] = []  # kept: torch may still ask a graph whose capture broke off about its memory
        self._prepare_captures()

    def _prepare_captures(self) -> None:
        # A stream and a memory pool for all graphs: they are replayed one at a time, and their results are not read.
        # torch takes no further graph for a pool once all that were captured into it are gone; so one stays.
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._stays = torch.cuda.CUDAGraph()
        self._capture(self._stays, [self.empty])

    def evict(self) -> None:
        """Reads through the cache. A read: lines left dirty by a write would be billed to the next in turn."""
        self._buffer.sum()

    def empty(self) -> None:
        """Launches a kernel that does nothing."""
        torch.cuda._sleep(0)

    def time(self, run: Run, cold: bool, ahead: bool) -> tuple[float, float]:
        """Seconds that `run` takes on the device, and on the host to issue it. `ahead`: the host may issue it while
        the device is still busy, so that the way to the device is not measured."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.evict()
        if ahead:
            torch.cuda._sleep(2_000_000)  # about a millisecond: time to issue the largest graph
        if not ahead:
            torch.cuda.synchronize()
        start.record()
        issued = time.perf_counter()
        run()
        issued = time.perf_counter() - issued
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, issued

    def capture(self, calls: Sequence[Run], keep: bool = False) -> Any:
        """A CUDA graph of the calls in order; its replay() runs them. `keep`: for `launches`, not to be replayed."""
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        try:
            self._capture(graph, calls)
        except BaseException:
            self._failed.append(graph)
            with suppress(RuntimeError), torch.cuda.stream(self._stream):
                graph.capture_end()
            self._prepare_captures()
            raise
        return graph

    def _capture(self, graph: Any, calls: Sequence[Run]) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            for call in calls:
                call()
            graph.capture_end()
        torch.cuda.synchronize()

    def launches(self, call: Run) -> int | None:
        """Kernels, copies and fills that a call puts on the device; None where this torch does not show its graphs."""
        try:
            graph = self.capture([call], keep=True)
            driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
        except (AttributeError, TypeError, OSError):
            return None
        count, kind = ctypes.c_size_t(), ctypes.c_int()
        driver.cuGraphGetNodes(handle, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count))
        found = 0
        for node in nodes:
            driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
            found += kind.value in _KERNEL_OR_COPY
        return found

    def launches_outside_graphs(self, call: Run) -> int | None:
        """Kernels, copies and fills that a call puts on the device where nothing is captured; None where torch's
        profiler sees nothing of the device."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == _CUDA for event in profile.events()) or None

    def synchronizes(self, call: Run) -> bool:
        """Whether a call waits for the device. Such a call cannot be captured."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            call()
        except RuntimeError as error:
            if "synchronizing" in str(error):
                return True
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def temporary_bytes(self, call: Run) -> int:
        """What a call holds at its peak, without what it returns."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return peak

    def free(self) -> None:
        """Gives back what is not in use, after a case."""
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
