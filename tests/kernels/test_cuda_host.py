"""The CUDA kernels, compiled for a CPU (tests/cpp/cuda_host), against the CPU library, bit for bit.

Their logic runs here: bounds, padding, leaves, groups, the arrival tree in many orders of arrival, the epilogue. Memory
ordering, races between blocks and nvcc's own code need a GPU.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cmake import ROOT
from helpers.cuda_host import DEVICES, HOSTILE, NATIVE, NEVER, Host, hostile_calls, native, own
from torch import Tensor

import fastpool
from fastpool import dispatch
from fastpool.backends.native import LIBRARY
from fastpool.testing import DTYPES, LAYOUTS, same_bits, sequences, special_values, variants

LENGTHS = [1, 40, 0, 33, 300, 64, 31]

SPLITS = (0, 32, 64, 128, 256, 512, 1024)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_layouts(host: Host, mode: str, given: str | None, dtype: torch.dtype) -> None:
    chosen = random.Random(f"{mode} {given} {dtype}")
    for holes in (False, True):
        for width in (chosen.choice((72, 136)), chosen.choice((77, 203))):  # rows of whole 16-byte pieces, and not
            batch = sequences(LENGTHS, width, dtype, holes=holes)
            for name, layout in LAYOUTS.items():
                if holes and not layout.holes:
                    continue
                arguments = layout.make(batch, given)
                more = {
                    "normalize": chosen.random() < 0.5,
                    "truncate_dim": chosen.choice((None, 1, 8, 50, width)),
                    "out_dtype": chosen.choice((None, *DTYPES)),
                }
                expected = native(mode, arguments, **more)
                tuning = chosen.choice(SPLITS), chosen.choice((0, 0, 64, 32)), chosen.choice((0, 0, 0, 128))
                host.tune(*tuning)
                assert same_bits(host(mode, arguments, **more), expected), (name, width, more, tuning)


@pytest.mark.parametrize(
    ("mode", "given"),
    [("mean", None), ("max", None), ("weighted_mean", None), ("softmax_mean", "scores"), ("attention", "query")],
)
def test_arrival_in_any_order(host: Host, mode: str, given: str | None) -> None:
    """Three levels, nodes of one child, of some and of all eight; blocks come in another order each time."""
    for units in (2, 8, 9, 17, 64, 65, 73, 130):
        hidden = torch.randn(2, units * 32 - 5, 8)
        mask = torch.rand(hidden.shape[:2]) > 0.3
        mask[:, 100:300] = False  # units without any real token
        mask[1, :40] = False  # units are counted from the first real one
        padded = {"hidden": hidden, "mask": mask, **own(given, hidden)}
        expected = native(mode, padded)
        packed = {name: value if name == "query" else value.flatten(0, 1) for name, value in padded.items()}
        packed["cu_seqlens"] = torch.tensor([0, hidden.shape[1], 2 * hidden.shape[1]])
        for _ in range(4):
            host.tune(split=32)
            assert same_bits(host(mode, padded), expected), units
            assert same_bits(host(mode, packed), expected), units


@pytest.mark.parametrize(("mode", "given"), variants())
def test_special_values(host: Host, mode: str, given: str | None) -> None:
    hidden = special_values(6, 200, 72)
    of_mode = own(given, hidden)
    for dtype in DTYPES:
        for normalize in (False, True):
            for out_dtype in (None, torch.float16, torch.bfloat16):
                more = {"normalize": normalize, "out_dtype": out_dtype}
                arguments = {"hidden": hidden.to(dtype), **of_mode}
                expected = native(mode, arguments, **more)
                host.tune(split=32)
                assert same_bits(host(mode, arguments, **more), expected), (dtype, more)


def test_16_bits(host: Host) -> None:
    """Every 16-bit pattern in; out, float64 values beside and on the middle between two 16-bit numbers."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(4, 1, -1)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        host.tune()
        assert same_bits(host("cls", {"hidden": x}, out_dtype=torch.float32), x[:, 0].float())
        wide = x.double()
        step = torch.nextafter(x.float(), torch.tensor(torch.inf)).double() - wide
        for hidden in (wide + step * 2.0**15, wide + step * 2.0**15 * (1 + 2.0**-30), wide * 4, wide * 2.0**-1040):
            for source in (hidden, hidden.float()):
                expected = native("cls", {"hidden": source}, out_dtype=dtype)
                assert same_bits(host("cls", {"hidden": source}, out_dtype=dtype), expected)


@pytest.mark.parametrize(("mode", "given"), variants())
def test_empty(host: Host, mode: str, given: str | None) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    cases: tuple[dict[str, Any], ...] = (
        {"hidden": torch.ones(0, 5, 8)},
        {"hidden": torch.ones(3, 0, 8)},
        {"hidden": torch.ones(3, 5, 0)},
        {"hidden": torch.ones(3, 5, 8), "mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"hidden": torch.ones(0, 8), "cu_seqlens": torch.tensor([0])},
        {"hidden": torch.ones(100, 8), "cu_seqlens": torch.tensor([7])},
        {"hidden": torch.ones(0, 8), "cu_seqlens": torch.tensor([0, 0, 0])},
        {"hidden": torch.ones(9, 8), "starts": none, "ends": none},
    )
    for arguments in cases:
        arguments |= own(given, arguments["hidden"])
        for split in (0, 32):
            host.tune(split)
            assert same_bits(host(mode, arguments, normalize=True), native(mode, arguments, normalize=True))


@pytest.mark.parametrize(("mode", "given"), variants())
def test_overlapping_segments(host: Host, mode: str, given: str | None) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(700, 40, generator=generator)
    starts = torch.randint(0, 600, (25,), generator=generator)
    ends = (starts + torch.randint(0, 400, (25,), generator=generator)).clamp(max=700)
    arguments: dict[str, Any] = {"hidden": hidden, "starts": starts.int(), "ends": ends}
    arguments |= own(given, hidden)
    expected = native(mode, arguments)
    # The last: slots for 25 x 22 units are too many, so units grow.
    for split, partial in ((0, 0), (32, 0), (128, 0), (32, 40 * 4 * 60)):
        host.tune(split, partial=partial)
        assert same_bits(host(mode, arguments), expected), (split, partial)


def test_hostile_bounds(host: Host) -> None:
    for i, (arguments, clamped) in enumerate(hostile_calls(300)):
        mode, given = variants()[i % len(variants())]
        host.tune(split=(32, 64, 0)[i % 3])
        of_mode = own(given, arguments["hidden"])
        arguments |= of_mode
        result = host(mode, arguments)
        if clamped is not None:
            assert same_bits(result, native(mode, clamped | of_mode)), (mode, arguments)
        else:  # nothing is promised, but memory that nobody wrote is not handed out
            assert not result.isnan().any(), (mode, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(host: Host, dtype: torch.dtype) -> None:
    """Pointers, row and batch strides that allow loads of 16 bytes, and each of them one value off."""
    memory = torch.randn(40_000, dtype=torch.float64).to(dtype)
    for offset, row, batch in ((0, 64, 6400), (1, 64, 6400), (0, 65, 6400), (0, 64, 6401), (8, 72, 7200)):
        hidden = memory[offset:].as_strided((3, 100, 64), (batch, row, 1))
        for mode in ("mean", "max", "last"):
            expected = native(mode, {"hidden": hidden}, normalize=True)
            host.tune(split=32)
            assert same_bits(host(mode, {"hidden": hidden}, normalize=True), expected), (offset, row, batch)
            assert same_bits(
                host(mode, {"hidden": hidden}, truncate_dim=33), native(mode, {"hidden": hidden}, truncate_dim=33)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["mean", "cls", "weighted_mean"])
def test_wide(host: Host, mode: str, dtype: torch.dtype) -> None:
    """More columns than a block has threads for, than it can own, than meet in one step of the norm's tree."""
    for width in (3000, 8192, 8193 if dtype == torch.float32 else 8200, 20_000):
        hidden = torch.randn(2, 70, width, dtype=torch.float64).to(dtype)
        for normalize in (False, True):
            expected = native(mode, {"hidden": hidden}, normalize=normalize)
            for split in (0, 32):
                host.tune(split)
                assert same_bits(host(mode, {"hidden": hidden}, normalize=normalize), expected), (width, split)


def test_long_segment_in_one_block(host: Host) -> None:
    """A binary counter of many levels."""
    hidden = torch.randn(1, 40_000, 8)
    for mode in ("mean", "weighted_mean"):
        expected = native(mode, {"hidden": hidden})
        for split, threads in ((1 << 16, 32), (1 << 14, 0), (1 << 11, 64)):
            host.tune(split, threads)
            assert same_bits(host(mode, {"hidden": hidden}), expected), split


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(host: Host, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 11, 4, 130, dtype=torch.float64) * 3).to(dtype)
    wide = torch.randn(2, 40_001, dtype=torch.float64).to(dtype)
    huge = (wide[:, :300].double() * torch.finfo(dtype).max / 8).to(dtype)
    one_huge = torch.randn(40, 1024, dtype=torch.float64).to(dtype)
    one_huge[:, 5] = torch.finfo(dtype).max
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (one_huge, {}),
        (x.transpose(0, 1), {}),
        (x.transpose(0, 2), {"truncate_dim": 77, "eps": 20.0}),
        (x[..., 1:], {"out_dtype": torch.float64}),
        (x[0, 0, 0], {"truncate_dim": 1}),
        (x[:0], {}),
        (x[..., :0], {}),
        (wide, {}),
        (wide[:, :8192], {"out_dtype": torch.float16}),
        (wide[:, :24_576], {}),
        (huge, {}),
        (torch.cat([huge, wide], 1), {}),
        (torch.full((3, 40), float("nan"), dtype=dtype), {}),
        (torch.full((3, 40), torch.inf, dtype=dtype), {}),
        (torch.zeros(3, 40, dtype=dtype), {"eps": 0.0}),
    ]
    for y, more in cases:
        host.tune()
        assert same_bits(host.ops.l2_normalize(y, **more), NATIVE.l2_normalize(y, **more)), (y.shape, more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize_dims(host: Host, dtype: torch.dtype) -> None:
    """Of any stride, and what nobody may look at behind them; sizes around those of quads, warps and blocks."""
    generator = torch.Generator().manual_seed(1)
    for width, sizes in ((130, (0, 1, 3, 4, 5, 127, 128, 129, 130)), (9001, (0, 2, 8191, 8192, 8193, 9000))):
        x = torch.randn(4, 3, width, dtype=torch.float64, generator=generator).to(dtype)
        x[0, 0], x[1, 1] = torch.finfo(dtype).max / 8, 0.0
        for columns in (width, width - 2):
            known = torch.tensor([size for size in sizes if size <= columns])
            cuts = known[torch.randint(0, len(known), (3, 4), generator=generator)].T
            poisoned = torch.where(torch.arange(width) < cuts[..., None], x, torch.nan)
            cases = ((poisoned, cuts.int()), (poisoned.transpose(0, 1), cuts.T), (poisoned[0, 0], cuts[0, 0]))
            for view, index in (*cases, (poisoned[:, 0], cuts[:, 0]), (poisoned[:0], cuts[:0])):
                for more in ({}, {"eps": 0.0, "out_dtype": torch.bfloat16}):
                    host.tune()
                    found = host.ops.l2_normalize(view, truncate_dim=columns, truncate_dims=index, **more)
                    assert same_bits(
                        found, NATIVE.l2_normalize(view, truncate_dim=columns, truncate_dims=index, **more)
                    ), (width, more)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_dims_are_clamped(host: Host, index: torch.dtype) -> None:
    """Nobody has checked them here."""
    hostile = [value for value in HOSTILE if index == torch.int64 or -(2**31) <= value < 2**31]
    cuts = torch.tensor(hostile, dtype=index)
    around = torch.full((len(cuts) + 2, 40), torch.nan)
    x = around[1:-1, :34]
    x[:, :32] = torch.arange(1.0, 33.0)
    expected = NATIVE.l2_normalize(x, truncate_dim=32, truncate_dims=cuts.clamp(0, 32))
    assert same_bits(host.ops.l2_normalize(x, truncate_dim=32, truncate_dims=cuts), expected)
    gradient = torch.randn(len(cuts), 32)
    expected = NATIVE._l2_normalize_backward(gradient, x, 1e-12, cuts.clamp(0, 32))
    assert same_bits(host.ops._l2_normalize_backward(gradient, x, 1e-12, cuts), expected)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_norm_overflows(host: Host, mode: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        hidden = (torch.randn(2, 50, 9000, dtype=torch.float64) * torch.finfo(dtype).max / 1e6).to(dtype)
        for width in (64, 9000):
            arguments = {"hidden": hidden[..., :width]}
            host.tune(split=32)
            assert same_bits(host(mode, arguments, normalize=True), native(mode, arguments, normalize=True))


def test_who_turns_to_python(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requested backend, validation and size decide, as csrc/native.h has them, unless Python decided already."""
    inherit, own, other, automatic = -1, 0, 1, 2
    hidden = torch.ones(1, 4, 8)  # 128 bytes
    asked: list[str] = []

    def run(call: Any) -> Tensor:
        asked.append(call.op)
        return torch.zeros(1, 8)

    monkeypatch.setattr(dispatch, "run", run)
    device = host.control.device = 7
    for of_process, of_thread, python_first, python_from, turns in (
        (automatic, inherit, False, NEVER, False),
        (automatic, inherit, False, 128, True),
        (automatic, inherit, False, 129, False),
        (own, inherit, False, 128, False),
        (own, inherit, True, NEVER, True),
        (other, inherit, False, NEVER, True),
        (other, own, False, 128, False),
        (other, automatic, False, 128, True),
        (own, other, False, NEVER, True),
    ):
        host.override_process(of_process)
        host.override_thread(of_thread)
        host.set_python_first(python_first)
        host.set_python_from(device, python_from)
        for is_direct in (False, True):
            host.set_direct(is_direct)
            host("mean", {"hidden": hidden})
            host.ops.l2_normalize(hidden)
            small = torch.ones(1, 8)  # what decides is hidden's size, not the gradient's
            host.backward("mean", {"hidden": hidden}, small)
            host.ops._l2_normalize_backward(torch.ones(1, 4, 8), hidden, 1e-12)
            expected = ["fastpool.mean", "fastpool.l2_normalize"] * 2 if turns and not is_direct else []
            assert asked == expected, (of_process, of_thread, python_first, python_from, is_direct)
            asked.clear()
    host.override_process(automatic)
    host.override_thread(inherit)
    host.set_python_first(False)
    host.set_direct(False)
    host.set_python_from(device, NEVER)


def test_every_gpu_has_its_own_size(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """From which on its calls turn to Python."""
    asked: list[str] = []
    monkeypatch.setattr(dispatch, "run", lambda call: asked.append(call.op) or torch.zeros(1, 8))
    for of_first, of_last in ((128, 129), (129, 128), (0, NEVER)):
        host.set_python_from(0, of_first)
        host.set_python_from(DEVICES - 1, of_last)
        for device, size in ((0, of_first), (DEVICES - 1, of_last)):
            host.control.device = device
            asked.clear()
            host("mean", {"hidden": torch.ones(1, 4, 8)})
            assert bool(asked) == (size <= 128), (device, size)
    for device in (0, DEVICES - 1):
        host.set_python_from(device, NEVER)


def test_python_is_asked_where_it_is() -> None:
    """By the first call on each GPU, so that it can say from which size on; a program without it has nothing to turn
    to."""
    code = """
import ctypes, sys, torch
goes_through_python = ctypes.CDLL(sys.argv[1])._ZN8fastpool6native19goes_through_pythonEil
goes_through_python.argtypes, goes_through_python.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_bool
print([goes_through_python(device, 2**40) for device in (-1, 0, 1, 127)])
import fastpool
print([goes_through_python(device, 0) for device in (-1, 0, 1, 127)])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTPOOL_")}
    done = subprocess.run([sys.executable, "-c", code, str(LIBRARY)], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["[False, False, False, False]", "[False, True, True, True]"], done.stderr


def test_is_not_installed() -> None:
    assert not list(Path(fastpool.__file__).parent.rglob("*cuda_host*"))
    assert "cuda_host" not in (ROOT / "setup.py").read_text() + (ROOT / "MANIFEST.in").read_text()
