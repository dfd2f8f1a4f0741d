"""The measured floor: one plain sequential read of bytes, as fast as this CPU does it from C."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_WIDTHS = {"16-byte": 16, "AVX2": 32, "AVX-512": 64}


@dataclass(frozen=True)
class Floor:
    """Ways to read a tensor's bytes once, by name. Each returns the thread's CPU time in seconds."""

    readers: dict[str, Callable[[Tensor], float]]
    note: str
    bare: ctypes.CDLL | None = None  # holds bare_mean

    def read(self, tensor: Tensor) -> None:
        """With the widest vectors; for its effect on the caches."""
        self.readers[list(self.readers)[-1]](tensor)


@cache
def build_floor() -> Floor:
    """Compiles bandwidth_cpu.c into a folder that is gone afterwards; without a compiler, torch.sum has to serve."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth_cpu.so"
        command = [*compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_suffix(".c"))]
        try:
            subprocess.run(command, check=True, capture_output=True)
            loaded = ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:
            return _torch_floor(f"bandwidth_cpu.c did not compile: {type(error).__name__}")
    loaded.timed_read.restype = ctypes.c_double
    loaded.timed_read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]

    def reader(width: int) -> Callable[[Tensor], float]:
        return lambda tensor: loaded.timed_read(width, tensor.data_ptr(), tensor.numel() * tensor.element_size())

    readers = {name: reader(width) for name, width in _WIDTHS.items() if loaded.can_read(width)}
    return Floor(readers, f"a sequential read in C, the best of {', '.join(readers)} vectors", loaded)


def _torch_floor(why: str) -> Floor:
    def read(tensor: Tensor) -> float:
        words = tensor.view(-1).view(torch.int64)
        start = time.thread_time()
        words.sum()
        return time.thread_time() - start

    return Floor({"torch.sum": read}, f"torch.sum over int64, slower than a plain read ({why})")
