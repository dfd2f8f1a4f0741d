"""The stages of the first minutes on a GPU, as far as they can be rehearsed without one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_stages, staging
from benchmarks.gpu_stages import FIRST, PARTS, REST
from benchmarks.staging import Run, Stage

ROOT = Path(__file__).parents[2]


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
    monkeypatch.setattr(staging, "GRACE_SECONDS", 1)
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
    monkeypatch.setattr(staging, "environment", lambda: asked.append(time.monotonic()) or {})
    assert Run([], 60, tmp_path / "log", {}).began <= asked[0]


def test_without_a_build_nothing_is_run(tmp_path: Path) -> None:
    status, outcomes, _ = run(tmp_path, Stage("build", 30, python("1 / 0"), vital=True), Stage("next", 30, "true"))
    assert status == 1
    assert outcomes["next"].startswith("not run: build failed")


def test_nothing_begins_when_time_is_up(tmp_path: Path) -> None:
    status, outcomes, _ = run(tmp_path, Stage("late", 30, "true", judges=True), seconds=staging.LEAST_SECONDS - 1)
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
        f"import sys; import benchmarks.gpu_stages as g; g.PARTS = {{'first': (({', '.join(stages)},), 600)}}; "
        "sys.exit(g.main(['first']))"
    )
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT), "COMMIT": "abc"}
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
                if word.startswith("tests/"):
                    assert (ROOT / word).exists(), word
                if word.startswith("benchmarks."):
                    assert (ROOT / f"{word.replace('.', '/')}.py").exists(), word
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
            compiling |= {stage.name} if "benchmarks.precompile" in stage.command else set()
            continue
        ended.update(stage.after)
        if any(name in stage.command for name in ("benchmarks.run ", "benchmarks.tune ", "benchmarks.gpu_smoke speed")):
            assert compiling <= ended, stage.name
    assert compiling


def test_every_test_for_a_machine_with_a_gpu_is_in_a_stage() -> None:
    """And says so by its mark, without which it would not be chosen."""
    marked = re.compile(r"\bgpu_machine\b|^pytestmark = MARKS$", re.M)
    files = [path for path in sorted(ROOT.glob("tests/*/test_*.py")) if path != Path(__file__)]
    found = {str(path.relative_to(ROOT)) for path in files if marked.search(path.read_text())}
    assert found == {*gpu_stages.GPU_TESTS, "tests/kernels/test_cuda_build.py"}
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
    assert staging.environment()["FAIL_WITHOUT_CUDA"] == "1"
    assert "TRITON_INTERPRET" not in staging.environment()
    monkeypatch.setenv("SMOKE_DEVICE", "cpu")
    assert staging.environment()["FAIL_WITHOUT_CUDA"] == "0"
    assert staging.environment()["TRITON_INTERPRET"] == "1"


def test_failures_are_told_at_once(tmp_path: Path) -> None:
    """By a test that would see itself in the output, had it not been told at once."""
    test = tmp_path / "test_it.py"
    test.write_text("def test_a():\n    assert 1 == 2, 'because'\n\n\ndef test_b():\n    import os; os._exit(7)\n")
    plugins = ["-p", "benchmarks.immediate_failures", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, str(test)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 7
    assert "FAILED test_it.py::test_a (call): AssertionError: because assert 1 == 2" in done.stdout
