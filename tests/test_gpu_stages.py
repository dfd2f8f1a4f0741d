"""The first minutes on a GPU, as far as they can be rehearsed without one: the stages, the smoke test, and the programs
that are compiled beforehand."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_smoke
import gpu_stages
import gpu_turns
import stream
from cases import Case
from fastpool import dispatch
from fastpool.backends import native
from fastpool.backends import triton as triton_backend
from fastpool.modes import MODES
from fastpool.testing import SPELLINGS
from gpu import Gpu
from gpu_smoke import Findings
from gpu_stages import FIRST, PARTS, REST, Run, Stage

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu_stages.py"


# ---- stages


def run(tmp_path: Path, *stages: Stage, seconds: float = 60) -> tuple[int, dict[str, str], str]:
    """The exit status, what became of each stage, and the log."""
    log = tmp_path / "log"
    one = Run(stages, seconds, log, {"out": str(tmp_path), "device": "cpu", "commit": ""})
    return one.all(), one.outcomes, log.read_text()


def python(code: str) -> str:
    return f'python -c "{code}"'


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    status, outcomes, log = run(
        tmp_path,
        Stage("one", 30, python("print('first line'); raise SystemExit(3)")),
        Stage("two", 30, "KIND=kind " + python("import os; print(os.environ['KIND'])")),
        Stage("none", 30, "no-such-program here"),
    )
    assert status == 0  # none of them judges
    assert outcomes["one"].startswith("failed: exit status 3")
    assert outcomes["two"] == "passed"
    assert outcomes["none"] == "not run: there is no no-such-program"
    for line in ("one: first line", "two: kind"):
        assert line in log
    assert log.splitlines()[-1].partition("== ")[2].startswith("passed: two; not: one (failed")


def test_a_stage_that_judges_decides(tmp_path: Path) -> None:
    assert run(tmp_path, Stage("right", 30, python("pass"), judges=True))[0] == 0
    assert run(tmp_path, Stage("wrong", 30, python("1 / 0"), judges=True))[0] == 1
    assert run(tmp_path, Stage("not here", 30, "no-such-program", judges=True))[0] == 0


def test_one_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores the polite way, and so does its child; what it said before is there."""
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"{ignore}; import os; pid = os.fork(); pid and print('child', pid, flush=True); time.sleep(600)"
    monkeypatch.setattr(gpu_stages, "GRACE_SECONDS", 1)
    hangs = Stage("hangs", 3, python(code), judges=True)
    status, outcomes, log = run(tmp_path, hangs, Stage("next", 30, python("pass")))
    assert status == 1
    assert outcomes == {"hangs": "failed: ended after 3 s", "next": "passed"}
    (child,) = [int(line.split()[-1]) for line in log.splitlines() if "hangs: child" in line]
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"  # dead, if nobody has asked yet


def test_without_a_build_nothing_is_run(tmp_path: Path) -> None:
    status, outcomes, _ = run(tmp_path, Stage("build", 30, python("1 / 0"), vital=True), Stage("next", 30, "true"))
    assert status == 1
    assert outcomes["next"].startswith("not run: build failed")


def test_nothing_begins_when_time_is_up(tmp_path: Path) -> None:
    status, outcomes, _ = run(tmp_path, Stage("late", 30, "true", judges=True), seconds=gpu_stages.LEAST_SECONDS - 1)
    assert (status, outcomes) == (0, {"late": "not run: no time left"})


def test_stages_wait_for_what_they_need_and_for_nothing_else(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    wait = f"import time, pathlib; [time.sleep(0.01) for _ in iter(pathlib.Path('{mark}').exists, True)]"
    _, outcomes, _ = run(
        tmp_path,
        Stage("behind", 30, python(wait), background=True),
        Stage("meanwhile", 30, f"touch {mark}"),  # or the one before would never end
        Stage("after", 30, "true", after=("behind",)),
    )
    assert list(outcomes) == ["meanwhile", "behind", "after"]
    assert set(outcomes.values()) == {"passed"}


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_the_run_leaves_what_there_was(tmp_path: Path, kill: signal.Signals) -> None:
    code = (
        "import sys; import gpu_stages as g; "
        f"g.PARTS = {{'first': ((g.Stage('says', 60, '''{python('print(1 + 1)')}'''), "
        "g.Stage('sleeps', 600, 'sleep 600'), g.Stage('never', 9, 'true')), 600)}; "
        "sys.exit(g.main(['first']))"
    )
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(PROGRAM.parent), "COMMIT": "abc"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "== sleeps, at most" in line:
            break
    process.send_signal(kill)
    assert process.wait(60) == 1
    log = (tmp_path / "first.log").read_text()
    assert "== first of abc" in log
    assert "says: 2" in log
    assert "passed: says; not: sleeps (interrupted), never (not run: interrupted)" in log.splitlines()[-1]


def test_the_stages_are_sound() -> None:
    """What they name is there, and what they wait for comes before them."""
    for stages, seconds in PARTS.values():
        names: list[str] = []
        for stage in stages:
            assert set(stage.after) <= set(names), stage.name
            assert stage.seconds <= seconds
            names.append(stage.name)
            for word in stage.command.split():
                if word.startswith(("benchmarks/", "tests/")):
                    assert (ROOT / word).exists(), word
        assert len(set(names)) == len(names)
        assert [stage.name for stage in stages if stage.vital] == ["build"]
    waited = sum(stage.seconds for stage in FIRST if stage.judges)
    assert waited + 100 < PARTS["first"][1]  # a build that takes its time leaves room for what judges
    chosen = list(gpu_stages.chosen(REST, ["tune"]))
    assert [stage.name for stage in chosen] == ["build", "precompile figures", "tune"]


def test_the_commit_is_what_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMMIT", "abc")
    assert gpu_stages.commit() == "abc"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)  # no checkout, unless the folder of temporary files is in one
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gpu_stages.commit() == "unknown"


def test_no_gpu_test_may_skip_but_in_a_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAIL_WITHOUT_CUDA", "TRITON_INTERPRET", "SMOKE_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    assert gpu_stages.environment()["FAIL_WITHOUT_CUDA"] == "1"
    assert "TRITON_INTERPRET" not in gpu_stages.environment()
    monkeypatch.setenv("SMOKE_DEVICE", "cpu")
    assert gpu_stages.environment()["FAIL_WITHOUT_CUDA"] == "0"
    assert gpu_stages.environment()["TRITON_INTERPRET"] == "1"


def test_failures_are_told_as_they_come(tmp_path: Path) -> None:
    """By a test that would see itself in the output, had it not been told at once."""
    test = tmp_path / "test_it.py"
    test.write_text("def test_a():\n    assert 1 == 2, 'because'\n\n\ndef test_b():\n    import os; os._exit(7)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "as_they_come", "-p", "no:cacheprovider", str(test)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 7
    assert "FAILED test_it.py::test_a (call): AssertionError: because assert 1 == 2" in done.stdout


# ---- the smoke test


def test_the_smoke_test_knows_every_mode_and_passes_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert {shape.mode for shape in gpu_smoke.SHAPES} == set(MODES)
    assert len(gpu_smoke.SHAPES) == 13
    assert {shape.spelling for shape in gpu_smoke.SHAPES} <= set(SPELLINGS)
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
        backend.refuses = lambda tensor: None  # type: ignore[attr-defined]
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
    monkeypatch.setattr(stream, "READERS", {"torch.sum": lambda tensor: reads(tensor, 1)})
    monkeypatch.setattr(gpu_turns, "READERS", stream.READERS)
    found = Findings("cuda")
    gpu_smoke.speed(found, ["native"], clock)
    printed = capsys.readouterr().out
    assert found.wrong == 0
    assert "read-only stream, torch.sum: 100 GB/s" in printed
    assert "64 B2 H24 bf16, native, packed: 0.1 us, 50 % of the stream, host 3.0 us a call" in printed
    assert gpu_smoke.share(nbytes=3_000_000_000, us=1000.0, gb_per_s=4000.0) == 0.75


# ---- programs that are compiled beforehand

_COUNT = """
import sys, torch
from pathlib import Path
import precompile
from fastpool.segments import PoolCall
from fastpool.triton_kernels import run
from triton import knobs

asked = []
knobs.runtime.jit_cache_hook = None
knobs.compilation.listener = lambda *, src, metadata, metadata_group, times, cache_hit: asked.append(cache_hit)


def warm(one):
    one.kernel.warmup(**one.arguments, **one.options, grid=one.grid)


precompile.instead_of_launching(precompile.Gpu.here(), warm)
hidden, cu = torch.randn(640, 128).bfloat16(), torch.tensor([0, 600, 640], dtype=torch.int32)
run.pool(PoolCall("mean", hidden, cu_seqlens=cu, normalize=True))
run.pool(PoolCall("max", torch.randn(2, 320, 128).bfloat16(), ends=torch.tensor([3, 300]), normalize=True))
print(*asked)
"""

_PLAN = """
import sys, torch
import precompile
from fastpool.segments import PoolCall
from fastpool.triton_kernels import run


def calls():
    empty = precompile.empty
    packed, cu = empty(640, 128, dtype=torch.bfloat16), empty(3, dtype=torch.int32)
    run.pool(PoolCall("mean", packed, cu_seqlens=cu, normalize=True))
    padded, ends = empty(2, 320, 128, dtype=torch.bfloat16), empty(2, dtype=torch.int64)
    run.pool(PoolCall("max", padded, ends=ends, normalize=True))


if __name__ == "__main__":
    compilers = precompile.compile_calls([calls, calls], jobs=2)
    sys.exit(precompile.tell("two calls", compilers, 0))
"""


def said(tmp_path: Path, *command: str) -> str:
    """By a process with Triton's cache, and nothing interpreted."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(PROGRAM.parent)}
    environment |= {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_calls_find_what_was_compiled_for_them(tmp_path: Path) -> None:
    """Planned on tensors without data by two processes at once, each program compiled once; then, in another process
    and with tensors that have data, every one is found under the key that the call looks for."""
    pytest.importorskip("triton")  # there is no Triton for every platform
    assert said(tmp_path, "-c", _COUNT).split() == ["False", "False"]  # nothing is there yet
    shutil.rmtree(tmp_path / "cache")
    program = tmp_path / "plan.py"
    program.write_text(_PLAN)
    assert "precompiled 2 programs for two calls" in said(tmp_path, str(program))
    files = sorted((tmp_path / "cache").rglob("*.cubin"))
    assert len(files) == 2
    assert said(tmp_path, "-c", _COUNT).split() == ["True", "True"]
    assert sorted((tmp_path / "cache").rglob("*.cubin")) == files


def test_what_gpu_tests_call_is_compiled(tmp_path: Path) -> None:
    """By a run of the tests themselves, which need no GPU for it."""
    pytest.importorskip("triton")  # likewise
    one = "test_rows_wider_than_a_program and triton"
    told = said(tmp_path, str(PROGRAM.parent / "precompile.py"), "tests", "--jobs", "1", "--", "-k", one)
    assert "precompiled 2 programs for tests" in told  # strips, and the norm over them
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 2
