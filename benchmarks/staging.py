"""Runs stages, each in a process of its own and under its own limit."""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from benchmarks import ROOT

LEAST_SECONDS = 8  # with fewer left, no stage begins
GRACE_SECONDS = 5  # between asking a process to end and ending it
MARGIN_SECONDS = 10  # between the {seconds} that a command is told and its limit
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


def architecture() -> str:
    """The GPU's architecture, as nvcc names it; empty where nvidia-smi does not say: then all are built for."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0].replace(".", "") if found else ""


def environment() -> dict[str, str]:
    """The environment of every stage. What is set already stays."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
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
    """Gives a stage a process group of its own, so that it can be ended with all that it starts, but no session of its
    own: the end of this one ends it as well."""
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
