"""A GPU's first minutes: stages in order of worth, each in a process of its own and under its own limit.

gpu_stages.py first                           builds; is it right, how fast is it: under four minutes
gpu_stages.py rest                            everything else, for as long as SECONDS_LEFT (default 560) says
gpu_stages.py rest --only "tune, memcheck"    the stages whose name holds one of these, and what they wait for
gpu_stages.py rest --times 8                  with limits so many times as long: for a machine of few cores
gpu_stages.py first rest --list               what they are

Every line goes to the terminal and to $OUT/first.log or rest.log (default gpu-out/) as soon as it is there, and figures
to $OUT/*.json: whatever ends the run, nothing of it is lost. What an earlier run of the same stages left there is
deleted first; with --only the log goes on. A stage that fails or takes too long does not stop the others, but for the
build. The last line says what passed; the exit status is 1 if a stage failed that judges whether fastpool is right.
COMMIT says what is measured, where git cannot; SMOKE_DEVICE=cpu rehearses without a GPU. Needs nothing but Python.
"""

import argparse
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 8  # with fewer left, no stage begins
GRACE_SECONDS = 5  # between asking a process to end and ending it
MARGIN_SECONDS = 10  # between the {seconds} that a command is told and its limit
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Stage:
    """`command`: as for a shell, with {out}, {device}, {commit} and {seconds} to be filled in. A stage waits for those
    it comes `after`; the next ones do not wait for one in the `background`. One that `judges` says whether fastpool is
    right. Without a `vital` one the others make no sense."""

    name: str
    seconds: float
    command: str
    after: tuple[str, ...] = ()
    background: bool = False
    judges: bool = False
    vital: bool = False


def workers(jobs: int) -> list[str]:
    """pytest's options for so many processes; none where pytest-xdist is not installed."""
    return ["--dist", "worksteal", "-n", str(jobs)] if jobs > 1 and find_spec("xdist") else []


# Those that need a GPU: all of a name but the tests of this file. By name, since others import what may not be there.
GPU_TESTS = [f"tests/{path.name}" for path in sorted(ROOT.glob("tests/test_gpu*.py")) if "stages" not in path.name]
# What `large` ones ask for is compiled by nobody beforehand: on a CPU their tensors would be as large.
MARKED = "gpu_machine and not large"
_ALL = " ".join(GPU_TESTS)
_FORWARD = " ".join(name for name in GPU_TESTS if "gradients" not in name)
_GRADIENTS = " ".join(name for name in GPU_TESTS if "gradients" in name)
_PYTEST = "python -m pytest -q --tb=short -p as_they_come -p no:cacheprovider --maxfail=40"
_ON_CORES = " ".join(
    ["OMP_NUM_THREADS=1 MKL_NUM_THREADS=1", _PYTEST, *workers(min(14, CORES)), "-m", shlex.quote(MARKED)]
)
# Beside stages that use the CPU, and after them.
_BESIDE = f"nice -n 19 python benchmarks/precompile.py --jobs {max(1, CORES - 4)}"


def _sanitizer(tool: str, backend: str) -> str:
    """Triton's programs are named as its functions are, torch's kernels are looked at as well."""
    kernels = "--kernel-regex kns=fastpool " if backend == "native" else ""
    return (
        f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer {kernels}--error-exitcode 1 --tool {tool} "
        f"{_PYTEST} -x {_ALL} -m sanitized -k {backend}"
    )


# In both parts, since the second may find itself on another machine; where nothing has changed, it takes seconds.
_BUILD = Stage("build", 100, "python -m pip install -v --no-build-isolation --no-deps -e .", vital=True)

# Programs of Triton are compiled while the C++ kernels, which need none, are looked at.
FIRST = (
    Stage("machine", 20, "nvidia-smi", background=True),
    _BUILD,
    Stage("versions", 30, "python -m fastpool env", background=True),
    Stage("precompile", 60, f"{_BESIDE} smoke quick", background=True),
    Stage(
        "smoke native",
        45,
        "OMP_NUM_THREADS=1 python benchmarks/gpu_smoke.py bits repeat --backends native",
        judges=True,
    ),
    Stage(
        "smoke triton", 60, "python benchmarks/gpu_smoke.py bits repeat --backends triton", ("precompile",), judges=True
    ),
    Stage("speed", 45, "python benchmarks/gpu_smoke.py speed", ("precompile",)),
    Stage(
        "quick figures",
        70,
        "python benchmarks/run.py --device {device} --quick --only shapes --seconds {seconds} --no-plots {commit} "
        "--json {out}/quick.json",
        ("precompile",),
    ),
)

# What needs no Triton; then figures, since they are what nobody can make elsewhere; then the tests, a dtype at a time.
# Nothing is compiled beside what measures, since some of it is the host's time.
REST = (
    _BUILD,
    Stage("precompile figures", 60, f"{_BESIDE} figures tune", background=True),
    Stage("machine code", 40, f"{_PYTEST} tests/test_cuda_build.py -m gpu_machine", judges=True),
    Stage("native forward", 90, f'{_ON_CORES} {_FORWARD} -k "not triton"', judges=True),
    Stage(
        "figures",
        150,
        "python benchmarks/run.py --device {device} --only shapes --seconds {seconds} --no-plots {commit} "
        "--json {out}/full.json",
        ("precompile figures",),
    ),
    Stage(
        "precompile bfloat16",
        200,
        f'{_BESIDE} tests -- -k "triton and (bfloat16 or not float)"',
        background=True,
    ),
    Stage("memcheck native", 90, _sanitizer("memcheck", "native"), judges=True),
    Stage(
        "triton forward bfloat16",
        120,
        f'{_ON_CORES} {_FORWARD} -k "triton and (bfloat16 or not float)"',
        ("precompile bfloat16",),
        judges=True,
    ),
    Stage(
        "gradients bfloat16",
        100,
        f'{_ON_CORES} {_GRADIENTS} -k "bfloat16 or overlapping or graph"',
        ("precompile bfloat16",),
        judges=True,
    ),
    Stage(
        "tune",
        150,
        "python benchmarks/tune.py --seconds {seconds} --out {out}/tuned.json {commit}",
        ("precompile figures",),
    ),
    Stage("precompile others", 200, f'{_BESIDE} tests -- -k "triton and float"', background=True),
    Stage("racecheck native", 90, _sanitizer("racecheck", "native"), judges=True),
    Stage(
        "triton forward others",
        100,
        f'{_ON_CORES} {_FORWARD} -k "triton and float and not bfloat16"',
        ("precompile others",),
        judges=True,
    ),
    Stage(
        "gradients others",
        100,
        f'{_ON_CORES} {_GRADIENTS} -k "not (bfloat16 or overlapping or graph)"',
        ("precompile others",),
        judges=True,
    ),
    Stage("memcheck triton", 120, _sanitizer("memcheck", "triton"), ("precompile others",), judges=True),
    Stage("large", 60, f'{_PYTEST} {_ALL} -m "gpu_machine and large"', judges=True),
    Stage("racecheck triton", 120, _sanitizer("racecheck", "triton"), ("precompile others",), judges=True),
)
PARTS = {"first": (FIRST, 235), "rest": (REST, 560)}  # with the seconds that all of one take at most


def architecture() -> str:
    """Of the GPU here, as nvcc names it; nothing where nvidia-smi does not say, and then all are built for."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0].replace(".", "") if found else ""


def commit() -> str:
    """What is run, as far as COMMIT or git say."""
    if named := os.environ.get("COMMIT"):
        return named
    git = ["git", "--no-optional-locks", "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Of every stage. What is set already stays."""
    path = [str(ROOT / "benchmarks"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    built = {"FASTPOOL_NATIVE": "1", "FASTPOOL_CUDA": "1", "FASTPOOL_CUDA_ARCHITECTURES": architecture()}
    wanted = {"PIP_NO_INDEX": "1", "FAIL_WITHOUT_CUDA": "1", "PYTHONUNBUFFERED": "1", **built}
    if os.environ.get("SMOKE_DEVICE") == "cpu":
        wanted |= {"FAIL_WITHOUT_CUDA": "0", "TRITON_INTERPRET": "1"}
    return {**wanted, **os.environ, "PYTHONPATH": os.pathsep.join(path)}


def die_with_parent() -> None:
    """In a process about to become another program: it is ended as soon as the thread that started it is no more."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _on_its_own() -> None:
    """A group, so that it can be ended with all that it starts, but no session: whoever ends ours ends it as well."""
    os.setpgid(0, 0)
    die_with_parent()


class Run:
    """The stages of one part."""

    def __init__(self, stages: Sequence[Stage], seconds: float, log: Path, words: dict[str, str]) -> None:
        self.began = time.monotonic()  # before anything that may take its time
        self.until = self.began + seconds
        self.stages, self.words, self.environment = stages, words, environment()
        self.outcomes: dict[str, str] = {}
        self._log = log.open("a")
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self.stopped = ""  # why nothing more is begun

    def say(self, line: str) -> None:
        with self._lock:
            for stream in (sys.stdout, self._log):
                print(f"{time.monotonic() - self.began:5.0f} s  {line}", file=stream, flush=True)

    def all(self) -> int:
        """Runs them, and says what came of it."""
        for stage in self.stages:
            self._threads[stage.name] = threading.Thread(target=self._one, args=(stage,), daemon=True)
        for stage in self.stages:
            thread = self._threads[stage.name]
            thread.start()
            if not stage.background:
                _join(thread)
        for thread in self._threads.values():
            _join(thread)
        return self._tell()

    def stop(self, *_: object) -> None:
        """Ends what runs and begins nothing more: what a signal does."""
        self.stopped = "interrupted"
        for process in [*self._running.values()]:
            _end(process)

    def _one(self, stage: Stage) -> None:
        for name in stage.after:
            if name in self._threads:
                self._threads[name].join()
        outcome = self._why_not(stage) or self._run(stage)
        self.outcomes[stage.name] = outcome
        self.say(f"== {stage.name}: {outcome}")
        if stage.vital and outcome != "passed":
            self.stopped = f"{stage.name} {outcome}"

    def _why_not(self, stage: Stage) -> str:
        if self.stopped:
            return f"not run: {self.stopped}"
        if self.until - time.monotonic() < LEAST_SECONDS:
            return "not run: no time left"
        program = self._command(stage, 0)[1][0]
        return "" if shutil.which(program) else f"not run: there is no {program}"

    def _command(self, stage: Stage, seconds: float) -> tuple[dict[str, str], list[str]]:
        """Its own environment, and the words of its command, with its limit."""
        words = shlex.split(filled(stage.command, self.words, seconds))
        own = dict(word.split("=", 1) for word in takewhile(_assigns, words))
        command = words[len(own) :]
        return own, [sys.executable if word == "python" else word for word in command]

    def _run(self, stage: Stage) -> str:
        began = time.monotonic()
        seconds = min(stage.seconds, self.until - began)
        own, command = self._command(stage, seconds)
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                preexec_fn=_on_its_own,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"failed: {error}"
        self._running[stage.name] = process
        self.say(f"== {stage.name}, at most {seconds:.0f} s: {shlex.join(command)}")
        if self.stopped:
            _end(process)
        reader = threading.Thread(target=self._read, args=(stage.name, process), daemon=True)
        reader.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"failed: ended after {seconds:.0f} s"
        finally:
            del self._running[stage.name]
            reader.join(GRACE_SECONDS)
        if self.stopped:
            return self.stopped
        took = time.monotonic() - began
        return "passed" if process.returncode == 0 else f"failed: exit status {process.returncode} after {took:.0f} s"

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                self.say(f"{name}: {line.rstrip()}")

    def _tell(self) -> int:
        passed = [name for name, outcome in self.outcomes.items() if outcome == "passed"]
        others = [f"{name} ({outcome})" for name, outcome in self.outcomes.items() if outcome != "passed"]
        self.say(f"== passed: {', '.join(passed) or 'none'}; not: {', '.join(others) or 'none'}")
        wrong = [
            stage
            for stage in self.stages
            if (stage.judges or stage.vital) and not self.outcomes[stage.name].startswith(("passed", "not run"))
        ]
        return 1 if wrong or self.stopped else 0


def _join(thread: threading.Thread) -> None:
    """A signal that comes just before the main thread begins to wait is handled when it next wakes up: soon."""
    while thread.is_alive():
        thread.join(1)


def filled(command: str, words: dict[str, str], seconds: float) -> str:
    """A stage's command, with what it is to know of this run."""
    return command.format(**words, seconds=max(1, int(seconds - MARGIN_SECONDS)))


def _assigns(word: str) -> bool:
    """Whether it is of the form NAME=value."""
    name, equals, _ = word.partition("=")
    return bool(equals) and name.isidentifier()


def _end(process: "subprocess.Popen[str]") -> None:
    """Asks a process and all that it started to end, and then ends them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def chosen(stages: Sequence[Stage], texts: Sequence[str]) -> Iterator[Stage]:
    """Those whose name holds one of the texts, what they come after, and what all need; without texts all."""
    wanted = {stage.name for stage in stages if stage.vital or not texts or any(text in stage.name for text in texts)}
    for stage in reversed(stages):
        wanted.update(stage.after if stage.name in wanted else ())
    yield from (stage for stage in stages if stage.name in wanted)


def delete_old(stages: Sequence[Stage], out: Path) -> None:
    """The files that these stages write, so that those of an earlier run do not look like theirs."""
    for stage in stages:
        for name in re.findall(r"\{out\}/(\S+)", stage.command):
            (out / name).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="first, rest, or both")
    only = "stages whose name holds one of these texts, which commas separate"
    parser.add_argument("--only", default="", metavar="TEXTS", help=only)
    parser.add_argument("--times", type=float, default=1, metavar="N", help="limits so many times as long")
    parser.add_argument("--list", action="store_true", help="print the stages and run none")
    asked = parser.parse_args(arguments)
    texts = [text.strip() for text in asked.only.split(",") if text.strip()]
    for text in texts:
        if not any(text in stage.name for part in asked.parts for stage in PARTS[part][0]):
            parser.error(f"--only: no stage of {' and '.join(asked.parts)} has {text!r} in its name")
    out = Path(os.environ.get("OUT") or "gpu-out").resolve()
    words = {
        "out": shlex.quote(str(out)),
        "device": os.environ.get("SMOKE_DEVICE", "cuda"),
        "commit": f"--commit {shlex.quote(os.environ['COMMIT'])}" if os.environ.get("COMMIT") else "",
    }
    status = 0
    for part in asked.parts:
        stages, most = PARTS[part]
        seconds = most * asked.times
        if part == "rest":
            seconds = float(os.environ.get("SECONDS_LEFT") or seconds)
        stages = tuple(replace(stage, seconds=stage.seconds * asked.times) for stage in chosen(stages, texts))
        if all(stage.vital for stage in stages):
            continue  # what is looked for is in the other part
        if asked.list:
            for stage in stages:
                print(f"{part}: {stage.name}, {stage.seconds:g} s: {filled(stage.command, words, stage.seconds)}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"{part}.log"
        delete_old(stages, out)
        if not texts:
            log.unlink(missing_ok=True)
        run = Run(stages, seconds, log, words)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.stop)
        run.say(f"== {part} of {commit()}")
        status |= run.all()
        if run.stopped:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
