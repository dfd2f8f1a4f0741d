"""The first minutes on a GPU, as far as they can be rehearsed without one: the stages, the smoke test, and the programs
that are compiled beforehand."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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
    assert not lives(child)


def lives(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"  # dead, if nobody has asked yet


def test_a_stage_that_cannot_start_has_failed(tmp_path: Path) -> None:
    """There is a program of its name, which the system does not know how to run."""
    program = tmp_path / "no program"
    program.write_text("\0")
    program.chmod(0o755)
    status, outcomes, log = run(
        tmp_path, Stage("broken", 30, f"'{program}'", judges=True), Stage("next", 30, python("pass"))
    )
    assert status == 1
    assert outcomes["broken"].startswith("failed: ")
    assert outcomes["next"] == "passed"
    assert "not: broken (failed" in log.splitlines()[-1]


def test_a_command_is_told_its_real_limit(tmp_path: Path) -> None:
    """What is left, if that is less than what the stage may take, less a margin."""
    for limit, left, least, most in ((30, 600, 20, 20), (300, 60, 48, 50), (300, 9, 1, 1)):
        _, _, log = run(tmp_path, Stage("told", limit, "echo told {seconds} s"), seconds=left)
        (told,) = re.findall(r"told: told (\d+) s", log)
        assert least <= int(told) <= most
        (tmp_path / "log").unlink()


def test_the_clock_runs_while_the_gpu_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(gpu_stages, "environment", lambda: asked.append(time.monotonic()) or {})
    assert Run([], 60, tmp_path / "log", {}).began <= asked[0]


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


def started(tmp_path: Path, *stages: str) -> "subprocess.Popen[str]":
    """The program, in a process of its own, with one part of these stages."""
    code = (
        f"import sys; import gpu_stages as g; g.PARTS = {{'first': (({', '.join(stages)},), 600)}}; "
        "sys.exit(g.main(['first']))"
    )
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(PROGRAM.parent), "COMMIT": "abc"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def line_with(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if text in line)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent has died")
def test_no_stage_outlives_the_run(tmp_path: Path) -> None:
    """Nor is it in another session, whose end would not be its own."""
    code = python("import os, time; print('stage', os.getpid(), os.getsid(0), os.getpgid(0)); time.sleep(600)")
    process = started(tmp_path, f"g.Stage('sleeps', 600, '''{code}''')")
    try:
        stage, session, group = map(int, line_with(process, "sleeps: stage").split()[-3:])
        assert (session, group) == (os.getsid(process.pid), stage)
    finally:
        process.kill()
        process.wait(60)
    until = time.monotonic() + 60
    while lives(stage) and time.monotonic() < until:
        time.sleep(0.01)
    assert not lives(stage)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_the_run_leaves_what_there_was(tmp_path: Path, kill: signal.Signals) -> None:
    says = f"g.Stage('says', 60, '''{python('print(1 + 1)')}''')"
    process = started(tmp_path, says, "g.Stage('sleeps', 600, 'sleep 600')", "g.Stage('never', 9, 'true')")
    line_with(process, "== sleeps, at most")
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


@pytest.mark.parametrize("stages", [FIRST, REST])
def test_nothing_is_compiled_beside_what_measures(stages: tuple[Stage, ...]) -> None:
    """Or what the host takes would be the compilers' affair as well. A stage begins once those in the foreground before
    it have ended, and with them what they came after."""
    ended: set[str] = set()
    compiling: set[str] = set()
    for stage in stages:
        if stage.background:
            compiling |= {stage.name} if "precompile.py" in stage.command else set()
            continue
        ended.update(stage.after)
        if any(name in stage.command for name in ("run.py", "tune.py", "gpu_smoke.py speed")):
            assert compiling <= ended, stage.name
    assert compiling


def test_every_test_for_a_machine_with_a_gpu_is_in_a_stage() -> None:
    """And says so by its mark, without which it would not be chosen."""
    marked = re.compile(r"\bgpu_machine\b|^pytestmark = MARKS$", re.M)
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path != Path(__file__)]
    found = {f"tests/{path.name}" for path in files if marked.search(path.read_text())}
    assert found == {*gpu_stages.GPU_TESTS, "tests/test_cuda_build.py"}
    for test in found:
        assert any(test in stage.command for stage in REST)


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The names of the stages."""
    assert gpu_stages.main([*arguments, "--list"]) == 0
    return [line.split(": ")[1].rpartition(",")[0] for line in capsys.readouterr().out.splitlines()]


def test_stages_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """With a blank in it, too; several of them; in the part that has them; and not by what nobody is called."""
    assert listed(capsys, "rest", "--only", "tune") == ["build", "precompile figures", "tune"]
    assert listed(capsys, "first", "--only", "smoke native") == ["build", "smoke native"]
    assert listed(capsys, "first", "rest", "--only", "smoke native, tune") == [
        *("build", "smoke native"),
        *("build", "precompile figures", "tune"),
    ]
    assert listed(capsys, "first", "rest", "--only", "tune") == ["build", "precompile figures", "tune"]
    with pytest.raises(SystemExit):
        listed(capsys, "first", "--only", "smoke native, smok triton")
    assert "no stage of first has 'smok triton' in its name" in capsys.readouterr().err


def test_old_files_do_not_look_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stages write is deleted before they begin. Other files stay, and if some stages are chosen the log does."""
    stages = (Stage("build", 9, "true", vital=True), Stage("one", 9, "test ! -e {out}/one.json"))
    stages += (Stage("other", 9, "test ! -e {out}/other.json"),)
    monkeypatch.setattr(gpu_stages, "PARTS", {"first": (stages, 60)})
    monkeypatch.setenv("OUT", str(tmp_path))
    for name in ("one.json", "other.json", "more.json", "first.log"):
        (tmp_path / name).write_text("what was\n")
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # they stay pytest's
    gpu_stages.main(["first", "--only", "one"])
    assert {path.name for path in tmp_path.iterdir()} == {"other.json", "more.json", "first.log"}
    assert (tmp_path / "first.log").read_text().startswith("what was\n")
    gpu_stages.main(["first"])
    assert {path.name for path in tmp_path.iterdir()} == {"more.json", "first.log"}
    assert "what was" not in (tmp_path / "first.log").read_text()
    assert "passed: build, one, other" in (tmp_path / "first.log").read_text()


def test_limits_grow_where_cores_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's and a part's, but not what is left."""
    stages = (Stage("build", 9, "true", vital=True), Stage("told", 30, "echo {seconds} s"))
    monkeypatch.setattr(gpu_stages, "PARTS", {"first": (stages, 40), "rest": (stages, 40)})
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # they stay pytest's
    for part, left, least, most in (("first", "", 110, 110), ("rest", "", 110, 110), ("rest", "60", 48, 50)):
        monkeypatch.setenv("SECONDS_LEFT", left)
        gpu_stages.main([part, "--times", "4"])
        (told,) = re.findall(r"told: (\d+) s", (tmp_path / f"{part}.log").read_text())
        assert least <= int(told) <= most


def test_tests_share_processes_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: None)
    assert gpu_stages.workers(8) == []
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: object())
    assert gpu_stages.workers(8) == ["--dist", "worksteal", "-n", "8"]
    assert gpu_stages.workers(1) == []


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
        backend.refuses = lambda tensor: None  # type: ignore[attr-defined]  # a made module
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
    said = "64 B2 H24 bf16, native, packed: 0.1 us in a graph, 50 % of the stream; eager 0.1 us, host 3.0 us"
    assert said in printed
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


_CHEAP = """
import torch, gpu_smoke, precompile

for shape in gpu_smoke.SHAPES + gpu_smoke.REPEATED:
    right = shape.arguments()
    gpu_smoke.sequences, kept = precompile.cheap, gpu_smoke.sequences
    cheap = shape.arguments()
    gpu_smoke.sequences = kept
    assert cheap.keys() == right.keys(), shape
    for one, other in zip(right.values(), cheap.values()):
        if one.is_nested:
            assert torch.equal(one.offsets(), other.offsets()), shape
            one, other = one.values(), other.values()
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), shape
        assert one.dtype not in (torch.int32, torch.int64) or torch.equal(one, other), shape
"""


def test_what_is_planned_are_the_batches_of_the_smoke_test(tmp_path: Path) -> None:
    """Made without their numbers."""
    pytest.importorskip("triton")  # likewise
    said(tmp_path, "-c", _CHEAP)


_TUNE = """
import sys, torch
import gpu, precompile, tune
from fastpool.triton_kernels import plan, run


class Stopped(Exception):
    pass


def stop():
    raise Stopped


here = precompile.Gpu.here()
precompile.Gpu.here = staticmethod(lambda: here)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA H100 80GB HBM3"
gpu.Gpu = stop
if __name__ == "__main__":
    sys.argv = ["tune.py", "--filter", "16 B1 H384", "--out", sys.argv[1]]
    try:
        tune.main()
    except Stopped:
        print("stopped")
"""


def test_the_tuner_gets_as_far_as_the_gpu(tmp_path: Path) -> None:
    """Of a case that is not tuned it compiles what the heuristic takes, and nothing else."""
    pytest.importorskip("triton")  # likewise
    program = tmp_path / "tune_it.py"
    program.write_text(_TUNE)
    told = said(tmp_path, str(program), str(tmp_path / "tuned.json"))
    assert "precompiled 1 programs for 1 cases" in told
    assert told.endswith("stopped\n")
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 1
