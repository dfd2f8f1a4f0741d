"""Runs campaigns in processes of their own, which may die, and counts what became of their inputs."""

import ctypes.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile


@dataclass(frozen=True)
class Campaign:
    module: str
    checks_memory: bool = False  # whether the C library does, which is slow where much of it is asked for


CAMPAIGNS = {
    "guarded": Campaign("hostile.guarded", checks_memory=True),
    "folders": Campaign("hostile.folders"),
    "interrupts": Campaign("hostile.interrupts"),
}
ENOUGH = 5  # failures of one campaign


@dataclass
class Failure:
    campaign: str
    seed: int
    index: int
    what: str

    def __str__(self) -> str:
        again = f'make hostile HOSTILE="--only {self.campaign} --seed {self.seed} --first {self.index} --count 1"'
        return f"{self.campaign}, seed {self.seed}, input {self.index}: {self.what}\nalone: {again}"


@dataclass
class Report:
    campaign: str
    seed: int
    refused: int = 0
    answered: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.refused + self.answered + len(self.failures)

    def __str__(self) -> str:
        return (
            f"{self.campaign}, seed {self.seed}: {self.tried} inputs were tried, {self.refused} refused, "
            f"{self.answered} answered, {len(self.failures)} failures"
        )


def run(campaign: str, seed: int, first: int = 0, count: int | None = None, seconds: float | None = None) -> Report:
    """Tries inputs from `first` on, `count` of them or as many as `seconds` allow. A failure ends a process; another
    one goes on with what follows."""
    report = Report(campaign, seed)
    end = sys.maxsize if count is None else first + count
    until = float("inf") if seconds is None else time.monotonic() + seconds
    while first < end and len(report.failures) < ENOUGH and (left := until - time.monotonic()) > 0:
        first, done = _by_one_process(report, first, end - first, left)
        if done:
            break
    return report


def _by_one_process(report: Report, first: int, count: int, seconds: float) -> tuple[int, bool]:
    """The input to go on with, and whether there is none."""
    campaign = CAMPAIGNS[report.campaign]
    asked = (campaign.module, report.seed, first, count, seconds)
    command, env = [sys.executable, "-m", "hostile.child", *map(str, asked)], environment(campaign.checks_memory)
    index, said, wrong, done = first, "", "", False
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as child:
            for kind, text in _lines(child):
                if kind == "try":
                    index, said = int(text), ""
                elif kind == "say":
                    said = json.loads(text)
                elif kind == "wrong":
                    wrong = json.loads(text)
                elif kind == "end":
                    done = True
                else:
                    setattr(report, kind, getattr(report, kind) + 1)
        errors.seek(0)
        if not done:
            wrong = wrong or f"the process died of it, {_of_what(child.returncode)}:\n{errors.read()[-3000:]}"
            report.failures.append(Failure(report.campaign, report.seed, index, f"{said}\n{wrong}".strip()))
    return index + 1, done


def _lines(child: "subprocess.Popen[str]") -> Iterator[tuple[str, str]]:
    assert child.stdout is not None
    for line in child.stdout:
        kind, _, text = line.rstrip("\n").partition(" ")
        yield kind, text


def _of_what(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"with status {status}"


def environment(checks_memory: bool) -> dict[str, str]:
    """This process's, with the tests on the path and nothing asked of fastpool. With the C library's checks, what was
    written beside a piece of memory ends the process once that is freed, and new memory is full of rubbish."""
    path = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = {name: value for name, value in os.environ.items() if not name.startswith("FASTPOOL_")}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    checker = ctypes.util.find_library("c_malloc_debug") if checks_memory else None
    if checker is not None:
        found |= {"LD_PRELOAD": checker, "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.perturb=165"}
    return found
