"""The CUDA kernels, compiled for a CPU (tests/cpp/cuda_host), against the CPU library, bit for bit.

Their logic runs here: bounds, padding, leaves, groups, the arrival tree in many orders of arrival, the epilogue. Memory
ordering, races between blocks and nvcc's own code need a GPU.
"""

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import dispatch
from fastpool.modes import MODES
from fastpool.ops import NORMALIZE_SCHEMA, pool_schema
from fastpool.testing import DTYPES, SPELLINGS, same_bits, sequences, special_values, variants

ROOT = Path(__file__).parent.parent
LENGTHS = [1, 40, 0, 33, 300, 64, 31]
NATIVE = torch.ops.fastpool


def build(name: str, *options: str) -> Path:
    """The library, in build/, where what has not changed is not compiled again."""
    folder = ROOT / "build" / name
    torch_folder = Path(torch.__file__).parent
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DTORCH_DIR={torch_folder}"]
    configure += ["-DFASTPOOL_CUDA_HOST=ON", "-DFASTPOOL_WERROR=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "tests" / "cpp" / "cuda_host" / "libfastpool_cuda_host.so"


class Host:
    """The ops, and how they are run: any tuning must give the same bits."""

    def __init__(self, library: Path) -> None:
        self.schemas = torch.library.Library("fastpool_cuda_host", "DEF")  # the ops live as long as this does
        for mode in MODES.values():
            self.schemas.define(mode.name + pool_schema(mode.takes_weights))
        self.schemas.define("l2_normalize" + NORMALIZE_SCHEMA)
        torch.ops.load_library(str(library))
        self.ops = torch.ops.fastpool_cuda_host
        self.c = ctypes.CDLL(str(library))
        self.c.cuda_host_seed.argtypes = [ctypes.c_uint64]
        self.c.cuda_host_tune.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
        self.seed = 0

    def tune(self, split: int = 0, threads: int = 0, strip: int = 0, partial: int = 0) -> None:
        """Tokens of a unit, threads of a block, bytes of a strip of columns and of all partial states; 0: as usual."""
        self.seed += 1
        self.c.cuda_host_seed(self.seed)  # another order of blocks and threads
        self.c.cuda_host_tune(threads, split, strip, partial)

    def __call__(self, mode: str, arguments: dict[str, Any], **more: Any) -> Tensor:
        result: Tensor = getattr(self.ops, mode)(**raw(arguments), **more)
        return result


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


@pytest.fixture(scope="module")
def _host() -> Host:
    return Host(build("cuda_host"))


@pytest.fixture
def host(_host: Host) -> Iterator[Host]:
    """New memory is full of NaN and large numbers, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield _host
    torch.use_deterministic_algorithms(False)
    _host.tune()
    _host.c.cuda_host_check_zeros(1)


SPLITS = (0, 32, 64, 128, 256, 512, 1024)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "weighted"), variants())
def test_spellings(host: Host, mode: str, weighted: bool, dtype: torch.dtype) -> None:
    chosen = random.Random(f"{mode} {weighted} {dtype}")
    for holes in (False, True):
        for width in (chosen.choice((72, 136)), chosen.choice((77, 203))):  # rows of whole 16-byte pieces, and not
            batch = sequences(LENGTHS, width, dtype, holes=holes)
            for name, spelling in SPELLINGS.items():
                if holes and not spelling.holes:
                    continue
                arguments = spelling.make(batch, weighted)
                more = {
                    "normalize": chosen.random() < 0.5,
                    "dim": chosen.choice((None, 1, 8, 50, width)),
                    "out_dtype": chosen.choice((None, *DTYPES)),
                }
                expected = native(mode, arguments, **more)
                tuning = chosen.choice(SPLITS), chosen.choice((0, 0, 64, 32)), chosen.choice((0, 0, 0, 128))
                host.tune(*tuning)
                assert same_bits(host(mode, arguments, **more), expected), (name, width, more, tuning)


@pytest.mark.parametrize("mode", ["mean", "max", "weighted_mean"])
def test_arrival_in_any_order(host: Host, mode: str) -> None:
    """Three levels, nodes of one child, of some and of all eight; blocks come in another order each time."""
    for units in (2, 8, 9, 17, 64, 65, 73, 130):
        hidden = torch.randn(2, units * 32 - 5, 8)
        mask = torch.rand(hidden.shape[:2]) > 0.3
        mask[:, 100:300] = False  # units without any real token
        mask[1, :40] = False  # units are counted from the first real one
        expected = native(mode, {"hidden": hidden, "mask": mask})
        packed = {
            "hidden": hidden.flatten(0, 1),
            "mask": mask.flatten(),
            "cu_seqlens": torch.tensor([0, hidden.shape[1], 2 * hidden.shape[1]]),
        }
        for _ in range(4):
            host.tune(split=32)
            assert same_bits(host(mode, {"hidden": hidden, "mask": mask}), expected), units
            assert same_bits(host(mode, packed), expected), units


@pytest.mark.parametrize("mode", MODES)
def test_special_values(host: Host, mode: str) -> None:
    hidden = special_values(6, 200, 72)
    for dtype in DTYPES:
        for normalize in (False, True):
            for out_dtype in (None, torch.float16, torch.bfloat16):
                more = {"normalize": normalize, "out_dtype": out_dtype}
                expected = native(mode, {"hidden": hidden.to(dtype)}, **more)
                host.tune(split=32)
                assert same_bits(host(mode, {"hidden": hidden.to(dtype)}, **more), expected), (dtype, more)


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


@pytest.mark.parametrize("mode", MODES)
def test_empty(host: Host, mode: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for arguments in (
        {"hidden": torch.ones(0, 5, 8)},
        {"hidden": torch.ones(3, 0, 8)},
        {"hidden": torch.ones(3, 5, 0)},
        {"hidden": torch.ones(3, 5, 8), "mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"hidden": torch.ones(0, 8), "cu_seqlens": torch.tensor([0])},
        {"hidden": torch.ones(100, 8), "cu_seqlens": torch.tensor([7])},
        {"hidden": torch.ones(0, 8), "cu_seqlens": torch.tensor([0, 0, 0])},
        {"hidden": torch.ones(9, 8), "starts": none, "ends": none},
    ):
        for split in (0, 32):
            host.tune(split)
            assert same_bits(host(mode, arguments, normalize=True), native(mode, arguments, normalize=True))


@pytest.mark.parametrize(("mode", "weighted"), variants())
def test_overlapping_segments(host: Host, mode: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(700, 40, generator=generator)
    starts = torch.randint(0, 600, (25,), generator=generator)
    ends = (starts + torch.randint(0, 400, (25,), generator=generator)).clamp(max=700)
    arguments: dict[str, Any] = {"hidden": hidden, "starts": starts.int(), "ends": ends}
    if weighted:
        arguments["weights"] = torch.rand(700, generator=generator)
    expected = native(mode, arguments)
    # The last: slots for 25 x 22 units are too many, so units grow.
    for split, partial in ((0, 0), (32, 0), (128, 0), (32, 40 * 4 * 60)):
        host.tune(split, partial=partial)
        assert same_bits(host(mode, arguments), expected), (split, partial)


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


def test_hostile_bounds(host: Host) -> None:
    host.c.cuda_host_check_zeros(0)  # where cu_seqlens decrease, counters may be anything too
    for i, (arguments, clamped) in enumerate(hostile_calls(300)):
        mode = list(MODES)[i % len(MODES)]
        host.tune(split=(32, 64, 0)[i % 3])
        result = host(mode, arguments)
        if clamped is not None:
            assert same_bits(result, native(mode, clamped)), (mode, arguments)
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
            assert same_bits(host(mode, {"hidden": hidden}, dim=33), native(mode, {"hidden": hidden}, dim=33))


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
        (x.transpose(0, 2), {"dim": 77, "eps": 20.0}),
        (x[..., 1:], {"out_dtype": torch.float64}),
        (x[0, 0, 0], {"dim": 1}),
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


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_norm_overflows(host: Host, mode: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        hidden = (torch.randn(2, 50, 9000, dtype=torch.float64) * torch.finfo(dtype).max / 1e6).to(dtype)
        for width in (64, 9000):
            arguments = {"hidden": hidden[..., :width]}
            host.tune(split=32)
            assert same_bits(host(mode, arguments, normalize=True), native(mode, arguments, normalize=True))


def test_errors_are_the_same(host: Host) -> None:
    hidden = torch.randn(2, 5, 8)
    wrong: tuple[dict[str, Any], ...] = (
        {"hidden": hidden.long()},
        {"hidden": hidden, "mask": hidden[..., 0]},
        {"hidden": hidden, "dim": 9},
    )
    for arguments in wrong:
        messages = []
        for ops in (host.ops, NATIVE):
            with pytest.raises(RuntimeError) as caught:
                ops.mean(**arguments)
            messages.append(str(caught.value).splitlines()[0])
        assert messages[0] == messages[1]


def test_who_turns_to_python(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wishes, validation and size decide, as csrc/native.h has them; not where Python has already decided."""
    inherit, own, other, automatic = -1, 0, 1, 2
    never = 2**62
    hidden = torch.ones(1, 4, 8)  # 128 bytes
    asked: list[str] = []

    def run(call: Any) -> Tensor:
        asked.append(call.op)
        return torch.zeros(1, 8)

    monkeypatch.setattr(dispatch, "run", run)
    # By their names in C++: this library has its own copy of csrc/native.cpp.
    process, thread = host.c._ZN8fastpool6native16redirect_processEi, host.c._ZN8fastpool6native15redirect_threadEi
    direct, cuda = host.c._ZN8fastpool6native10set_directEb, host.c._ZN8fastpool6native8set_cudaEbl
    cuda.argtypes = [ctypes.c_bool, ctypes.c_int64]
    for of_process, of_thread, validate, python_from, turns in (
        (automatic, inherit, False, never, False),
        (automatic, inherit, False, 128, True),
        (automatic, inherit, False, 129, False),
        (own, inherit, False, 128, False),
        (own, inherit, True, never, True),
        (other, inherit, False, never, True),
        (other, own, False, 128, False),
        (other, automatic, False, 128, True),
        (own, other, False, never, True),
    ):
        process(of_process)
        thread(of_thread)
        cuda(validate, python_from)
        for is_direct in (False, True):
            direct(is_direct)
            host("mean", {"hidden": hidden})
            host.ops.l2_normalize(hidden)
            expected = ["fastpool.mean", "fastpool.l2_normalize"] if turns and not is_direct else []
            assert asked == expected, (of_process, of_thread, validate, python_from, is_direct)
            asked.clear()
    process(automatic)
    thread(inherit)
    cuda(False, never)
    direct(False)


ADDRESSES = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("host_tests", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
host = tests.Host(tests.Path(sys.argv[2]))
host.c.cuda_host_check_zeros(0)
calls = 0
for i, (arguments, _) in enumerate(tests.hostile_calls(150, seed=1)):
    # Memory of its own for every argument, so that a byte beyond it is noticed.
    arguments = {name: value.clone() for name, value in arguments.items()}
    for mode in ("mean", "weighted_mean", "max", "last"):
        host.tune(split=(32, 64, 0)[i % 3])
        host(mode, arguments, normalize=True)
        calls += 1
for dtype in tests.DTYPES:
    for width in (1, 3, 8, 77, 300):
        batch = tests.sequences([1, 40, 0, 300, 33], width, dtype)
        for name in ("packed", "padded_lengths"):
            for mode, weighted in tests.variants():
                host.tune(split=32, strip=128 if width == 300 else 0)
                host(mode, tests.SPELLINGS[name].make(batch, weighted), normalize=True)
                calls += 1
        host.ops.l2_normalize(torch.randn(3, width).to(dtype))
print("calls:", calls)
"""


def test_addresses(tmp_path: Path) -> None:
    """Hostile bounds and odd shapes under the address sanitizer."""
    library = build("cuda_host_address", "-DFASTPOOL_SANITIZE=address")
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", ADDRESSES, __file__, str(library)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "calls: 920" in done.stdout


def test_is_not_installed() -> None:
    assert not list(Path(fastpool.__file__).parent.rglob("*cuda_host*"))
    assert "cuda_host" not in (ROOT / "setup.py").read_text() + (ROOT / "MANIFEST.in").read_text()
