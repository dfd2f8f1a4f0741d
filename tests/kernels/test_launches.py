"""How many launches a Triton call is, of how many programs, and with how much memory beside its result: counted where
calls are run without a GPU, by a stand-in for the launch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.calls import NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall
from fastpool.testing import LAYOUTS, sequences, variants
from fastpool.triton_kernels import counters, plan, plan_backward, run  # after the skip
from fastpool.triton_kernels.launch import _MODULES, Launch  # likewise

# What allocates or looks at memory and puts nothing on a device.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "view", "as_strided", "select", "detach", "slice"}
DEVICE = plan.DeviceProperties("test", 132)


class Counted(TorchDispatchMode):
    """Launches of kernels, and of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Launch] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.others.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted()
    monkeypatch.setattr(Launch, "_launch", lambda self, device: found.kernels.append(self))
    monkeypatch.setattr(run, "device_of", lambda device: DEVICE)
    counters._pairs.clear()
    with found:
        yield found
    counters._pairs.clear()


def call_of(mode: str, arguments: dict[str, Any], **more: Any) -> PoolCall:
    arguments = dict(arguments)
    if "lengths" in arguments:
        arguments["ends"] = arguments.pop("lengths")
    return PoolCall(mode, **arguments, **more)


OP_LAYOUTS = [name for name in LAYOUTS if name != "nested"]


@pytest.mark.parametrize("layout", OP_LAYOUTS)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_a_small_call_is_one_launch(mode: str, given: str | None, layout: str, counted: Counted) -> None:
    """Queries, packed or padded: many, and some a little longer. Where they may overlap, each might be as long as all,
    and may be split."""
    for lengths in ([9] * 32, [1, 9, 0, 60, 33, 5, 64, 40]):
        arguments = LAYOUTS[layout].make(sequences(lengths, 384, torch.bfloat16), given)
        counted.kernels.clear()
        counted.others.clear()
        run.pool(call_of(mode, arguments, normalize=True))
        (launch,) = counted.kernels
        if layout == "packed_shuffled" and not launch.arguments["WHOLE"]:
            assert set(counted.others) <= {"clone", "zeros", "zero_", "fill_"}
        else:
            assert launch.counters == 0
            assert launch.arguments["states"] is None
            # starts and ends of a view may have to be copied.
            assert set(counted.others) <= {"clone"}, layout


@pytest.mark.parametrize("mode", ["cls", "last"])
@pytest.mark.parametrize("shape", [(64, 512, 384), (16, 32768, 4096), (1, 100_000, 1024)])
def test_one_token_is_one_launch_without_memory(mode: str, shape: tuple[int, int, int], counted: Counted) -> None:
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    flat, cu = hidden.flatten(0, 1), torch.empty(shape[0] + 1, dtype=torch.int32, device="meta")
    index = torch.empty(shape[0], dtype=torch.int64, device="meta")
    for arguments in (
        {"hidden": hidden, "mask": torch.empty(shape[:2], dtype=torch.bool, device="meta")},
        {"hidden": flat, "cu_seqlens": cu},
        {"hidden": flat, "starts": index, "ends": index},
    ):
        counted.kernels.clear()
        run.pool(PoolCall(mode, **arguments, normalize=True))
        (launch,) = counted.kernels
        assert launch.arguments["states"] is None
        assert launch.grid == (shape[0], 1, 1)
    assert counted.others == []


@pytest.mark.parametrize("layout", ["padded", "cu_seqlens", "starts and ends"])
def test_a_split_call_is_one_launch(layout: str, counted: Counted) -> None:
    """Once its stream has counters; the first time they are cleared."""
    lengths = torch.tensor([3000, 9000, 1, 700])
    flat = torch.zeros(int(lengths.sum()), 1024, dtype=torch.bfloat16)
    ends = lengths.cumsum(0)
    arguments: dict[str, Tensor] = {
        "padded": {"hidden": torch.zeros(4, 9000, 1024, dtype=torch.bfloat16), "ends": lengths},
        "cu_seqlens": {"hidden": flat, "cu_seqlens": torch.cat([torch.zeros(1), ends]).int()},
        "starts and ends": {"hidden": flat, "starts": ends - lengths, "ends": ends},
    }[layout]
    calls = [PoolCall("mean", **arguments, normalize=True) for _ in range(4)]
    counted.others.clear()
    run.pool(calls[0])
    run.pool(calls[1])
    assert set(counted.others) <= {"zeros", "zero_", "fill_"}
    assert counted.others
    counted.others.clear()
    counted.kernels.clear()
    for call in calls[2:]:
        run.pool(call)
    assert counted.others == []
    assert len(counted.kernels) == 2
    assert all(launch.counters > 0 for launch in counted.kernels)


def test_rows_wider_than_a_program_are_two_launches(counted: Counted) -> None:
    run.pool(PoolCall("mean", torch.zeros(3, 20, 20_000), normalize=True))
    assert [launch.kernel.fn.__name__ for launch in counted.kernels] == ["pool_kernel", "normalize_kernel"]


def test_l2_normalize_is_one_launch(counted: Counted) -> None:
    call = NormalizeCall(torch.zeros(3, 20, 77))
    counted.others.clear()
    run.l2_normalize(call)
    assert len(counted.kernels) == 1
    assert counted.others == []


def planned(batch: int, rows: int, width: int, layout: str, mode: str = "mean") -> Launch:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if layout == "padded":
        call = PoolCall(mode, empty(batch, rows, width, dtype=torch.bfloat16), ends=empty(batch))
    else:
        hidden = empty(batch * rows, width, dtype=torch.bfloat16)
        bounds = {"cu": {"cu_seqlens": empty(batch + 1)}, "overlap": {"starts": empty(batch), "ends": empty(batch)}}
        call = PoolCall(mode, hidden, **bounds[layout])
    return plan.plan_pool(call, DEVICE)


@pytest.mark.parametrize(
    ("batch", "rows", "width", "layout", "least", "most"),
    [
        (64, 512, 1024, "padded", 99, 528),
        (64, 512, 1024, "cu", 99, 592),
        (64, 512, 1024, "overlap", 528, 32 * 132),
        (1, 32768, 4096, "padded", 99, 264),
        (1, 32768, 4096, "cu", 99, 265),
        (256, 8192, 1024, "padded", 4096, 65536),
        (4096, 16, 384, "cu", 4096, 4096 + 65536 // 32),
        (4096, 16, 384, "overlap", 4096, 4096 * 2),
    ],
)
def test_programs_of_a_plan(batch: int, rows: int, width: int, layout: str, least: int, most: int) -> None:
    """One for most processors where there are tokens for them, or a few; and no more than a few without tokens."""
    assert least <= planned(batch, rows, width, layout).grid[0] <= most


@pytest.mark.parametrize(
    ("batch", "rows", "width", "layout"),
    [(64, 512, 1024, "padded"), (64, 512, 1024, "cu"), (1, 32768, 4096, "cu"), (16, 32768, 4096, "cu")],
)
def test_memory_beside_the_result(batch: int, rows: int, width: int, layout: str) -> None:
    """A state for each unit, of 32 tokens at least: a sixteenth of bfloat16 token states, and much less where there are
    many."""
    states = planned(batch, rows, width, layout).arguments["states"]
    hidden = batch * rows * width * 2
    assert 0 < states.numel() * 4 <= 1.1 * hidden / (16 if hidden < 1 << 30 else 64)


def test_nothing_is_compiled_for_a_number() -> None:
    """What a program is known by leaves numbers out: kernels must not be compiled anew for a 1 or a multiple of 16."""
    hidden, index = torch.zeros(3, 40, 8), torch.tensor([1, 2, 3])
    gradient = torch.zeros(3, 8)
    launches = [plan.plan_pool(PoolCall("mean", hidden, ends=index), DEVICE)]
    launches += [plan.plan_normalize(hidden, 1e-12, hidden, DEVICE)]
    launches += [plan.plan_normalize_backward(NormalizeBackwardCall(NormalizeCall(hidden), hidden), DEVICE)]
    weighted = PoolCall("weighted_mean", hidden, weights=hidden[..., 0])
    for call, of in ((PoolCall("max", hidden), "hidden"), (weighted, "hidden"), (weighted, "weights")):
        launches += plan_backward.plan_pool_backward(PoolBackwardCall(call, gradient, gradient, of), DEVICE)
    kernels = {launch.kernel.fn.__name__: launch for launch in launches}
    assert len(kernels) == 7
    for name, launch in kernels.items():
        numbers = {n for n, value in launch.arguments.items() if isinstance(value, int) and not n.isupper()}
        kernel = launch.kernel
        options = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)  # the interpreter's, or a compiled one's
        names = set(options["do_not_specialize"])
        assert numbers <= names, name


def test_every_kernel_has_its_key_settled() -> None:
    """Modules with functions of Triton's, each behind those that it calls."""
    folder = Path(plan.__file__).parent
    compiled = {path.stem: path.read_text() for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}
    assert set(_MODULES) == set(compiled)
    for at, name in enumerate(_MODULES):
        called = set(re.findall(r"^from \.(\w+) import", compiled[name], re.MULTILINE)) & set(compiled)
        assert called <= set(_MODULES[:at]), name
