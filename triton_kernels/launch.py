"""A launch of a kernel: its arguments, and the way past Triton's own look-up once a program is compiled."""

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .counters import launch_with_counters


def options(warps: int, registers: int) -> dict[str, Any]:
    """No contraction: a fused multiply-add rounds once where the canonical order rounds twice."""
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if torch.version.hip is None:
        chosen["maxnreg"] = registers
    return chosen


# Each calls what stands in those before it.
_MODULES = (
    "elementary",
    "state",
    "finish",
    "weight",
    "segment",
    "arrival_tree",
    "normalize",
    "quantize",
    "pool",
    "backward",
)


@cache
def settle_cache_keys() -> None:
    """Asks every kernel and function for Triton's key of it, those that are called before those that call them. Triton
    puts the constants of a function's callees into its key only where they have theirs already, so that what a process
    called first would decide under which key it looks for all its programs, and whether it finds them on disk. To be
    called before anything is compiled."""
    for name in _MODULES:
        for function in vars(import_module(f"{__package__}.{name}")).values():
            getattr(function, "cache_key", None)  # what is interpreted has none


@dataclass
class Launch:
    """The kernel's arguments, in its order: what a call brings, and what follows from its shapes, of which those in
    capitals are compiled in."""

    kernel: Any
    grid: tuple[int, int, int]
    brought: dict[str, Any]
    fixed: dict[str, Any]
    options: dict[str, Any]
    counters: int = 0  # that units count their arrival in
    # The compiled program by device, for launches that are planned once and known to be compiled alike.
    programs: dict[torch.device, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.brought, **self.fixed}

    def run(self) -> None:
        """On the current stream of the tensors' device."""
        device = next(iter(self.brought.values())).device  # the first is a tensor in every kernel
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(device)
        else:
            self._run(device)

    def _run(self, device: torch.device) -> None:
        if self.counters == 0:
            self._launch(device)
        else:
            launch_with_counters(device, self.counters, self._launch_counting)

    def _launch_counting(self, arrivals: Tensor, stale: Tensor, stale_count: int) -> None:
        brought = self.brought
        brought["arrivals"], brought["stale"], brought["stale_count"] = arrivals, stale, stale_count
        self._launch(arrivals.device)

    def _launch(self, device: torch.device) -> None:
        arguments = (*self.brought.values(), *self.fixed.values())
        if not knows_programs(device):
            settle_cache_keys()
            self.kernel[self.grid](*arguments, **self.options)
            return
        compiled = self.programs.get(device)
        if compiled is None:
            settle_cache_keys()  # before the look-up: Triton's key is a kernel's hash too
            key = (self.kernel, device.index, *self.options.values(), *self._compiled_for())
            compiled = self.programs[device] = _compiled.get(key)
            if compiled is None:
                compiled = self.kernel[self.grid](*arguments, **self.options)
                self.programs[device] = _compiled[key] = compiled
                return
        compiled[self.grid](*arguments)

    def _compiled_for(self) -> list[Any]:
        """All that Triton looks at in arguments: types, alignment, whether an integer needs 64 bits. (That it is 1 or
        a multiple of 16 is nothing that our kernels are compiled for.)"""
        seen: list[Any] = []
        for name, value in self.arguments.items():
            if name.isupper() or value is None:
                seen.append(value)
            elif isinstance(value, Tensor):
                seen.append((value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, int):
                seen.append(-(2**31) <= value < 2**31)
        return seen


_compiled: dict[tuple[Any, ...], Any] = {}


def knows_programs(device: torch.device) -> bool:
    """Whether a program that is known by what it was compiled for is launched at once: Triton's own look-up costs 10 us
    and more. The interpreter has no programs, and for AMD Triton also looks at the size of a tensor's memory."""
    return device.type == "cuda" and torch.version.hip is None
