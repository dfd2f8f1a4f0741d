"""The smoke test of a GPU, as far as it can be rehearsed without one."""

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bandwidth_gpu, gpu_smoke, timing_cuda
from benchmarks.cases import Case
from benchmarks.gpu import Gpu
from benchmarks.gpu_smoke import Findings
from fastpool import dispatch
from fastpool.backends import native
from fastpool.backends import triton as triton_backend
from fastpool.modes import MODES
from fastpool.testing import LAYOUTS


def test_the_smoke_test_knows_every_mode_and_passes_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert {shape.mode for shape in gpu_smoke.SHAPES} == set(MODES)
    assert len(gpu_smoke.SHAPES) == 21
    assert {shape.layout for shape in gpu_smoke.SHAPES} <= set(LAYOUTS)
    assert gpu_smoke.main(["bits", "repeat", "--device", "cpu", "--backends", "native"]) == 0
    printed = capsys.readouterr().out
    assert "0 wrong" in printed
    for shape in gpu_smoke.SHAPES:
        assert f"ok    native {shape.name} {shape.mode} first call" in printed
        assert f"ok    native {shape.name} {shape.mode} gradients" in printed
    for shape in gpu_smoke.REPEATED:
        assert f"ok    native {shape.name} repeated: 0 of 3 differ" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's kernels are compiled and not interpreted")
def test_the_smoke_test_runs_the_interpreter_on_what_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")  # there is no Triton for every platform
    assert gpu_smoke.main(["bits", "repeat", "--device", "cpu", "--backends", "triton"]) == 0
    printed = capsys.readouterr().out
    assert "ok    triton whole mean first call" in printed
    assert "split, mask" not in printed  # minutes


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor, int], Tensor]], None]:
    """Puts something between a backend's results and whoever looks at them, with the number of the call."""

    def put(change: Callable[[Tensor, int], Tensor]) -> None:
        calls = itertools.count()
        backend = ModuleType("broken")
        backend.supports = lambda call: None  # type: ignore[attr-defined]  # a made module
        for kernel in ("pool", "pool_backward", "l2_normalize", "l2_normalize_backward"):
            right = getattr(native, kernel)
            setattr(backend, kernel, lambda call, right=right: change(right(call), next(calls)))
        monkeypatch.setitem(dispatch.BACKENDS, "triton", backend)
        monkeypatch.setattr(triton_backend, "INTERPRETED", False)

    return put


def _off_by_one_bit(result: Tensor) -> Tensor:
    words = result.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[result.element_size()])
    words.view(-1)[:1] ^= 1
    return result


def test_a_wrong_bit_is_noticed_and_named(broken: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In the results of one shape alone, those of 1100 columns."""
    broken(lambda result, _: _off_by_one_bit(result) if result.shape[-1] == 1100 else result)
    assert gpu_smoke.main(["bits", "--device", "cpu", "--backends", "triton"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line or "FAILS" in line]
    assert ["triton strips of float64 sum" in line for line in wrong] == [True] * len(wrong)
    assert "1 of 2 rows differ, [0], by " in wrong[0]
    assert "gradients" in wrong[1]


def test_a_backend_that_breaks_is_named_and_the_others_go_on(broken: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(result: Tensor, call: int) -> Tensor:
        if result.shape[-1] == 130:
            raise RuntimeError("out of luck")
        return result

    broken(breaks)
    assert gpu_smoke.main(["bits", "--device", "cpu", "--backends", "triton"]) == 1
    printed = capsys.readouterr().out
    assert "FAILS triton search, holes RuntimeError" in printed
    assert "out of luck" in printed
    assert "ok    triton deep tree mean first call" in printed
    assert "2 wrong" in printed  # the result and the gradients


def test_one_wrong_result_of_many_is_noticed(broken: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broken(lambda result, call: _off_by_one_bit(result) if call == 4 else result)
    assert gpu_smoke.main(["repeat", "--device", "cpu", "--backends", "triton"]) == 1
    assert "WRONG triton long repeated: 1 of 3 differ" in capsys.readouterr().out


class Clock(Gpu):
    """A GPU that reads 100 GB/s, whatever it is asked, and whose host takes 3 us a call."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = 1 << 14
        self.read = self.calls = 0

    def empty(self) -> None:
        pass

    def time(self, run: Callable[[], object], cold: bool, ahead: bool) -> tuple[float, float]:
        self.read = self.calls = 0
        run()
        return self.read / 100e9, 3e-6 * self.calls

    def capture(self, calls: Sequence[Callable[[], object]], keep: bool = False) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: [call() for call in calls])

    def free(self) -> None:
        pass


def test_speed_is_a_share_of_the_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Pooling that reads each byte twice is half as fast as reading it once."""
    clock = Clock()

    def reads(tensor: Tensor, times: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            clock.read += times * tensor.nbytes
            clock.calls += 1
            return tensor

        return call

    ways = {"packed": ("packed", lambda batch, normalize: reads(batch.packed, 2))}
    monkeypatch.setattr(gpu_smoke, "WAYS", ways)
    monkeypatch.setattr(gpu_smoke, "SPEEDS", (Case(64, 2, 24),))
    monkeypatch.setattr(bandwidth_gpu, "READERS", {"torch.sum": lambda tensor: reads(tensor, 1)})
    monkeypatch.setattr(timing_cuda, "READERS", bandwidth_gpu.READERS)
    found = Findings("cuda")
    gpu_smoke.speed(found, ["native"], clock)
    printed = capsys.readouterr().out
    assert found.wrong == 0
    assert "read-only stream, torch.sum: 100 GB/s" in printed
    said = "64 B2 H24 bf16, native, packed: 0.1 us in a graph, 50 % of the stream; eager 0.1 us, host 3.0 us"
    assert said in printed
    assert gpu_smoke.share(nbytes=3_000_000_000, us=1000.0, gb_per_s=4000.0) == 0.75
