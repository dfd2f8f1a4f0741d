"""A GPU's first minutes: stages in order of worth, each in a process of its own and under its own limit.

    python -m benchmarks.gpu_stages first|rest [--only TEXTS] [--times N] [--list]

first                           builds; is it right, how fast is it: under four minutes
rest                            everything else, for as long as SECONDS_LEFT (default 560) says
rest --only "tune, memcheck"    the stages whose name holds one of these, and what they wait for
rest --times 8                  with limits so many times as long: for a machine of few cores
first rest --list               what they are

Every line goes to the terminal and to $OUT/first.log or rest.log (default gpu-out/) as soon as it is there, and figures
to $OUT/*.json: whatever ends the run, nothing of it is lost. What an earlier run of the same stages left there is
deleted first; with --only the log goes on. A stage that fails or takes too long does not stop the others, but for the
build. The last line says what passed; the exit status is 1 if a stage failed that judges whether fastpool is right.
COMMIT says what is measured, where git cannot; SMOKE_DEVICE=cpu rehearses without a GPU. Needs nothing but Python.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT
from benchmarks.staging import Run, Stage, filled

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers(jobs: int) -> list[str]:
    """pytest's options for so many processes; none where pytest-xdist is not installed."""
    return ["--dist", "worksteal", "-n", str(jobs)] if jobs > 1 and find_spec("xdist") else []


# Those that need a GPU, by name, since others import what may not be there.
GPU_TESTS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/kernels/test_gpu*.py"))]
# What `large` ones ask for is not compiled beforehand: on a CPU their tensors would be as large.
MARKED = "gpu_machine and not large"
_ALL = " ".join(GPU_TESTS)
_FORWARD = " ".join(name for name in GPU_TESTS if "gradients" not in name)
_GRADIENTS = " ".join(name for name in GPU_TESTS if "gradients" in name)
_PYTEST = "python -m pytest -q --tb=short -p benchmarks.immediate_failures -p no:cacheprovider --maxfail=40"
_ON_CORES = " ".join(
    ["OMP_NUM_THREADS=1 MKL_NUM_THREADS=1", _PYTEST, *workers(min(14, CORES)), "-m", shlex.quote(MARKED)]
)
# Beside stages that use the CPU, and after them.
_BESIDE = f"nice -n 19 python -m benchmarks.precompile --jobs {max(1, CORES - 4)}"


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
        "OMP_NUM_THREADS=1 python -m benchmarks.gpu_smoke bits repeat --backends native",
        judges=True,
    ),
    Stage(
        "smoke triton", 60, "python -m benchmarks.gpu_smoke bits repeat --backends triton", ("precompile",), judges=True
    ),
    Stage("speed", 45, "python -m benchmarks.gpu_smoke speed", ("precompile",)),
    Stage(
        "quick figures",
        70,
        "python -m benchmarks.run --device {device} --quick --only shapes --seconds {seconds} --no-plots {commit} "
        "--json {out}/quick.json",
        ("precompile",),
    ),
)

# What needs no Triton; then figures, since they cannot be made without a GPU; then the tests, a dtype at a time.
# Nothing is compiled beside what measures, since some of it is the host's time.
REST = (
    _BUILD,
    Stage("precompile figures", 90, f"{_BESIDE} modes figures tune", background=True),
    Stage("machine code", 40, f"{_PYTEST} tests/kernels/test_cuda_build.py -m gpu_machine", judges=True),
    Stage("native forward", 90, f'{_ON_CORES} {_FORWARD} -k "not triton"', judges=True),
    Stage(
        "modes",
        60,
        "python -m benchmarks.gpu_modes --seconds {seconds} --out {out}/modes.jsonl",
        ("precompile figures",),
    ),
    Stage(
        "figures",
        150,
        "python -m benchmarks.run --device {device} --only shapes --seconds {seconds} --no-plots {commit} "
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
        "python -m benchmarks.tune --seconds {seconds} --out {out}/tuned.json {commit}",
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


def commit() -> str:
    """What is run, as far as COMMIT or git say."""
    if named := os.environ.get("COMMIT"):
        return named
    git = ["git", "--no-optional-locks", "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def chosen(stages: Sequence[Stage], texts: Sequence[str]) -> Iterator[Stage]:
    """The stages whose name holds one of the texts, what they come after, and what all need; without texts all."""
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
