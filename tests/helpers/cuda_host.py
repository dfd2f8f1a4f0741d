"""The CUDA kernels as tests/cpp/cuda_host compiles them for a CPU, and what the tests that run them share."""

import ctypes
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpool.arguments import OPS, POOL_TENSORS, codes, given, schema
from fastpool.calls import Call
from fastpool.testing import own_arguments
from helpers import cmake

NATIVE = torch.ops.fastpool
NEVER = 2**62  # bytes
DEVICES = 128  # as in csrc/native.h


def build(name: str, *options: str) -> Path:
    """The library, in a build folder of this name."""
    folder = cmake.build(name, "-DFASTPOOL_CUDA_HOST=ON", f"-DTORCH_DIR={Path(torch.__file__).parent}", *options)
    return folder / "tests" / "cpp" / "cuda_host" / "libfastpool_cuda_host.so"


class Control(ctypes.Structure):
    """What a test reads and sets, as tests/cpp/cuda_host/cuda_runtime.h has it."""

    _fields_ = (
        ("launches", ctypes.c_int64),
        ("memsets", ctypes.c_int64),
        ("allocated", ctypes.c_int64),
        ("arrived", ctypes.c_void_p),
        ("stale", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("capturing", ctypes.c_bool),
        ("fail_next", ctypes.c_bool),
        ("watched", ctypes.c_void_p),
        ("watched_end", ctypes.c_void_p),
        ("loaded", ctypes.c_int64),
        ("waits", ctypes.c_int64),
    )


class Host:
    """The ops, and how they are run: any tuning must give the same bits."""

    def __init__(self, library: Path) -> None:
        self.schemas = torch.library.Library("fastpool_cuda_host", "DEF")  # the ops live as long as this does
        for op in OPS:
            self.schemas.define(op + schema(op))
        torch.ops.load_library(str(library))
        self.ops = torch.ops.fastpool_cuda_host
        self.c = ctypes.CDLL(str(library))
        self.c.cuda_host_seed.argtypes = [ctypes.c_uint64]
        self.c.cuda_host_tune.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3, ctypes.c_int]
        self.c.cuda_host_control.restype = ctypes.POINTER(Control)
        self.control: Control = self.c.cuda_host_control().contents
        # By their names in C++: this library has its own copy of csrc/native.cpp.
        self.override_process = self.c._ZN8fastpool6native16override_processEi
        self.override_thread = self.c._ZN8fastpool6native15override_threadEi
        self.set_direct = self.c._ZN8fastpool6native10set_directEb
        self.set_python_first = self.c._ZN8fastpool6native16set_python_firstEb
        self.set_python = self.c._ZN8fastpool6native10set_pythonEb
        self.set_python(True)
        self.set_python_from = self.c._ZN8fastpool6native15set_python_fromEil
        self.set_python_from.argtypes = [ctypes.c_int, ctypes.c_int64]
        for device in range(DEVICES):
            self.set_python_from(device, NEVER)  # every call is to run here
        self.seed = 0

    def reset(self) -> None:
        """Everything as usual again, whatever a test has set."""
        self.tune()
        self.control.stream, self.control.device = None, 0
        self.control.capturing = self.control.fail_next = False
        self.control.watched = self.control.watched_end = None

    def tune(self, split: int = 0, threads: int = 0, strip: int = 0, partial: int = 0, tile: int = 0) -> None:
        """Tokens of a unit, threads of a block, bytes of a strip of columns and of all partial states, rows of a
        gradient's tile; 0: as usual."""
        self.seed += 1
        self.c.cuda_host_seed(self.seed)  # another order of blocks and threads
        self.c.cuda_host_tune(threads, split, strip, partial, tile)

    def __call__(self, mode: str, arguments: dict[str, Any], **more: Any) -> Tensor:
        result: Tensor = getattr(self.ops, mode)(**raw(arguments), **more)
        return result

    def backward(
        self,
        mode: str,
        arguments: dict[str, Any],
        gradient: Tensor,
        result: Tensor | None = None,
        of: str = "hidden",
    ) -> Tensor:
        return backward(self.ops, mode, arguments, gradient, result, of)


@cache
def shared() -> Host:
    """One for a process: its ops can be defined only once."""
    return Host(build("cuda_host"))


class Backend:
    """The ops as a backend of fastpool's dispatch: to be put in the place of another one."""

    def __init__(self, host: Host) -> None:
        self.host, self.ops = host, host.ops

    def supports(self, call: Call) -> str | None:
        return None

    def _run(self, call: Call) -> Tensor:
        by_place, by_name = given(call.op_name, call.values())
        result: Tensor = getattr(self.ops, call.op_name)(*by_place, **by_name)
        return result

    pool = pool_backward = l2_normalize = l2_normalize_backward = quantize = tokens = tokens_backward = _run


def backward(
    ops: Any, mode: str, arguments: dict[str, Any], gradient: Tensor, result: Tensor | None, of: str
) -> Tensor:
    """The gradient of an argument, by such ops as autograd calls."""
    code, of_code = codes(mode, of)
    none = dict.fromkeys(argument.name for argument in POOL_TENSORS)
    values = {**none, "scale": 1.0, **raw(arguments), "mode": code, "of": of_code}
    made: Tensor = ops._pool_backward(*given("_pool_backward", {**values, "gradient": gradient, "result": result})[0])
    return made


def own(given: str | None, hidden: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What a mode gets by itself, for these tokens."""
    weights = torch.rand(hidden.shape[:-1], generator=torch.Generator().manual_seed(seed))
    return own_arguments(given, weights, hidden.shape[-1])


def raw(arguments: dict[str, Any]) -> dict[str, Any]:
    """A function's arguments as the op has them."""
    arguments = dict(arguments)
    if "lengths" in arguments:
        arguments["ends"] = arguments.pop("lengths")
    if arguments["hidden"].is_nested:
        nested = arguments["hidden"]
        arguments |= {"hidden": nested.values(), "cu_seqlens": nested.offsets()}
    return arguments


def native(mode: str, arguments: dict[str, Any], **more: Any) -> Tensor:
    result: Tensor = getattr(NATIVE, mode)(**raw(arguments), **more)
    return result


HOSTILE = [-(2**63), 2**63 - 1, -(2**31), 2**31 - 1, 2**62, -1, 0, 1, 31, 32, 99, 100, 101, 250, 300, 301]


def hostile_calls(count: int, seed: int = 0) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Arguments with bounds that lie outside, and the same ones clamped; None where results may be anything.

    Rows and masks stand amid others whose values would show.
    """
    chosen = random.Random(seed)
    around = torch.full((900, 2, 24), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    around[300:600] = torch.randn(300, 2, 24, generator=generator)
    mask = torch.ones(900, dtype=torch.bool)
    mask[300:600] = torch.rand(300, generator=generator) > 0.2
    packed, padded = around[300:600, 0, :16], around[300:600, 0, :16].view(3, 100, 16)
    for _ in range(count):
        int32 = chosen.random() < 0.5
        values = [v for v in HOSTILE if not int32 or -(2**31) <= v < 2**31]

        def index(n: int, int32: bool = int32, values: list[int] = values) -> Tensor:
            return torch.tensor([chosen.choice(values) for _ in range(n)], dtype=torch.int32 if int32 else torch.int64)

        arguments: dict[str, Any]
        kind = chosen.randrange(4)
        if kind == 0:
            arguments = {"hidden": padded, "starts": index(3), "ends": index(3), "mask": mask[300:600].view(3, 100)}
        elif kind == 1:
            arguments = {"hidden": packed, "starts": index(9), "ends": index(9), "mask": mask[300:600]}
        else:
            cu = index(9)
            arguments = {"hidden": packed, "cu_seqlens": cu.sort().values if kind == 2 else cu}
        clamped = {**arguments}
        rows = 100 if kind == 0 else 300
        for name in {"starts", "ends", "cu_seqlens"} & arguments.keys():
            clamped[name] = arguments[name].clamp(0, rows)
        if kind < 2:
            clamped["ends"] = torch.maximum(clamped["starts"], clamped["ends"])
        yield arguments, clamped if kind != 3 else None
