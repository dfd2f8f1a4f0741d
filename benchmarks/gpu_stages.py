"""A GPU's first minutes: stages in order of worth, each in a process of its own and under its own limit.

gpu_stages.py first              builds; is it right, how fast is it: under four minutes
gpu_stages.py rest               everything else, for as long as SECONDS_LEFT (default 560) says
gpu_stages.py rest --only tune   the stages whose name holds this, and what they wait for
gpu_stages.py first rest --list  what they are

Every line goes to the terminal and to $OUT/first.log or rest.log (default gpu-out/) as soon as it is there, and figures
to $OUT/*.json: whatever ends the run, nothing is lost. A stage that fails or takes too long does not stop the others,
but for the build. The last line says what passed; the exit status is 1 if a stage failed that judges whether fastpool
is right. COMMIT says what is measured, where git cannot; SMOKE_DEVICE=cpu rehearses without a GPU. Needs nothing but
Python.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 8  # with fewer left, no stage begins
GRACE_SECONDS = 5  # between asking a process to end and ending it
_CORES = os.cpu_count() or 1
_FEWER = max(1, _CORES - 4)  # for what runs beside a measurement


@dataclass(frozen=True)
class Stage:
    """`command`: as for a shell, with {out}, {device} and {commit} to be filled in. A stage waits for those it comes
    `after`; the next ones do not wait for one in the `background`. One that `judges` says whether fastpool is right.
    Without a `vital` one the others make no sense."""

    name: str
    seconds: int
    command: str
    after: tuple[str, ...] = ()
    background: bool = False
    judges: bool = False
    vital: bool = False


# Those that need a GPU: all of a name but the tests of this file.
GPU_TESTS = [f"tests/{path.name}" for path in sorted(ROOT.glob("tests/test_gpu*.py")) if "stages" not in path.name]
_FORWARD = " ".join(name for name in GPU_TESTS if "gradients" not in name)
_GRADIENTS = " ".join(name for name in GPU_TESTS if "gradients" in name)
_PYTEST = "python -m pytest -q --tb=short -p as_they_come -p no:cacheprovider --maxfail=40"
_ON_CORES = f"OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 {_PYTEST}"
if find_spec("xdist"):
    _ON_CORES += f" --dist worksteal -n {min(14, _CORES)}"
_SANITIZER = (
    "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-regex kns=fastpool --error-exitcode 1 --tool {tool} "
    f'{_PYTEST} -x {_FORWARD} -m sanitized -k "native and (outside or wider or dims)"'
)
_BESIDE = f"nice -n 19 python benchmarks/precompile.py --jobs {_FEWER}"

# In both parts, since the second may find itself on another machine; where nothing has changed, it takes seconds.
_BUILD = Stage("build", 100, "python -m pip install -q --no-build-isolation --no-deps -e .", vital=True)

# Programs of Triton are compiled on all cores while the C++ kernels, which need none, are looked at.
FIRST = (
    Stage("machine", 20, "nvidia-smi", background=True),
    _BUILD,
    Stage("versions", 30, "python -m fastpool env", background=True),
    Stage("precompile", 60, "python benchmarks/precompile.py smoke quick", background=True),
    Stage("smoke native", 45, "python benchmarks/gpu_smoke.py bits repeat --backends native", judges=True),
    Stage(
        "smoke triton", 60, "python benchmarks/gpu_smoke.py bits repeat --backends triton", ("precompile",), judges=True
    ),
    Stage("speed", 45, "python benchmarks/gpu_smoke.py speed", ("precompile",)),
    Stage(
        "quick figures",
        70,
        "python benchmarks/run.py --device {device} --quick --only shapes --seconds 60 --no-plots {commit} "
        "--json {out}/quick.json",
        ("precompile",),
    ),
)

# What needs no Triton; then figures, since they are what nobody can make elsewhere, with a clock that is the GPU's and
# does not mind what is compiled for the tests meanwhile; then the tests, a dtype at a time.
REST = (
    _BUILD,
    Stage("precompile figures", 60, f"{_BESIDE} figures tune", background=True),
    Stage("native forward", 90, f'{_ON_CORES} {_FORWARD} -k "not triton"', judges=True),
    Stage(
        "precompile bfloat16",
        200,
        f'{_BESIDE} tests -- -k "triton and (bfloat16 or not float)"',
        ("precompile figures",),
        background=True,
    ),
    Stage(
        "figures",
        150,
        "python benchmarks/run.py --device {device} --only shapes --seconds 140 --no-plots {commit} "
        "--json {out}/full.json",
        ("precompile figures",),
    ),
    Stage(
        "triton forward, bfloat16",
        120,
        f'{_ON_CORES} {_FORWARD} -k "triton and (bfloat16 or not float)"',
        ("precompile bfloat16",),
        judges=True,
    ),
    Stage(
        "gradients, bfloat16",
        100,
        f'{_ON_CORES} {_GRADIENTS} -k "bfloat16 or overlapping or graph"',
        ("precompile bfloat16",),
        judges=True,
    ),
    Stage(
        "tune", 150, "python benchmarks/tune.py --seconds 140 --out {out}/tuned.json {commit}", ("precompile figures",)
    ),
    Stage("precompile others", 200, f'{_BESIDE} tests -- -k "triton and float"', ("tune",), background=True),
    Stage("memcheck", 90, _SANITIZER.replace("{tool}", "memcheck"), judges=True),
    Stage(
        "triton forward, other dtypes",
        100,
        f'{_ON_CORES} {_FORWARD} -k "triton and float and not bfloat16"',
        ("precompile others",),
        judges=True,
    ),
    Stage(
        "gradients, the rest",
        100,
        f'{_ON_CORES} {_GRADIENTS} -k "not (bfloat16 or overlapping or graph)"',
        ("precompile others",),
        judges=True,
    ),
    Stage("racecheck", 90, _SANITIZER.replace("{tool}", "racecheck"), judges=True),
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
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Of every stage. What is set already stays."""
    path = [str(ROOT / "benchmarks"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    built = {"FASTPOOL_NATIVE": "1", "FASTPOOL_CUDA": "1", "FASTPOOL_CUDA_ARCHITECTURES": architecture()}
    wanted = {"PIP_NO_INDEX": "1", "FAIL_WITHOUT_CUDA": "1", "PYTHONUNBUFFERED": "1", **built}
    if os.environ.get("SMOKE_DEVICE") == "cpu":
        wanted |= {"FAIL_WITHOUT_CUDA": "0", "TRITON_INTERPRET": "1"}
    return {**wanted, **os.environ, "PYTHONPATH": os.pathsep.join(path)}


class Run:
    """The stages of one part."""

    def __init__(self, stages: Sequence[Stage], seconds: float, log: Path, words: dict[str, str]) -> None:
        self.stages, self.words, self.environment = stages, words, environment()
        self.began = time.monotonic()
        self.until = self.began + seconds
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
                thread.join()
        for thread in self._threads.values():
            thread.join()
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
        program = self._command(stage)[1][0]
        return "" if shutil.which(program) else f"not run: there is no {program}"

    def _command(self, stage: Stage) -> tuple[dict[str, str], list[str]]:
        """Its own environment, and the words of its command."""
        words = shlex.split(stage.command.format(**self.words))
        own = dict(word.split("=", 1) for word in takewhile(_assigns, words))
        command = words[len(own) :]
        return own, [sys.executable if word == "python" else word for word in command]

    def _run(self, stage: Stage) -> str:
        own, command = self._command(stage)
        seconds = min(stage.seconds, self.until - time.monotonic())
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
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
    """Those whose name holds one of the texts, what they come after, and what all need."""
    wanted = {stage.name for stage in stages if stage.vital or not texts or any(text in stage.name for text in texts)}
    for stage in reversed(stages):
        wanted.update(stage.after if stage.name in wanted else ())
    yield from (stage for stage in stages if stage.name in wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="first, rest, or both")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="stages whose name holds TEXT")
    parser.add_argument("--list", action="store_true", help="print the stages and run none")
    asked = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT") or "gpu-out").resolve()
    named = commit()
    words = {
        "out": shlex.quote(str(out)),
        "device": os.environ.get("SMOKE_DEVICE", "cuda"),
        "commit": f"--commit {shlex.quote(named)}" if os.environ.get("COMMIT") else "",
    }
    status = 0
    for part in asked.parts:
        stages, seconds = PARTS[part]
        if part == "rest":
            seconds = float(os.environ.get("SECONDS_LEFT") or seconds)
        stages = tuple(chosen(stages, asked.only))
        if asked.list:
            for stage in stages:
                print(f"{part}: {stage.name}, {stage.seconds} s: {stage.command.format(**words)}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        run = Run(stages, seconds, out / f"{part}.log", words)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.stop)
        run.say(f"== {part} of {named}")
        status |= run.all()
        if run.stopped:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
