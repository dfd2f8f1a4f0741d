"""The benchmark on a CPU."""

import argparse
import json
import os
import time
from dataclasses import asdict
from datetime import datetime, timezone

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import goals
import report
from cases import CASES, DTYPES, Case
from floor import build_floor
from machine import cores, describe_commit, describe_machine, describe_versions, last_cache_bytes
from measure import BUILDS, Bench, tiny
from providers import PROVIDERS
from samples import Result

# A long single sequence, which has to be cut for two threads, and a batch, which falls into two halves by itself.
_THREAD_CASES = (("B1 S8192 H4096", "bf16"), ("B32 S512 H768", "fp32"))
Threads = dict[str, dict[str, dict[int, float]]]  # case -> call -> threads -> seconds
_WIDTH = 140
_BUSY = 1.75  # a load above this run's own 1: two threads do not get two cores


def main(arguments: argparse.Namespace) -> None:
    shapes = arguments.shapes or ("native" if arguments.quick else "all")
    cases = [case for case in CASES if arguments.filter in case.name and (case.native or shapes == "all")]
    if not cases:
        raise SystemExit(f"no case's name holds {arguments.filter!r}; names: {', '.join(case.name for case in CASES)}")
    started, load_before = time.monotonic(), os.getloadavg()[0]
    bench = Bench(build_floor(), last_cache_bytes(), rounds=3 if arguments.quick else 17)
    method = [
        f"One thread, CPU time, median of {BUILDS} x {bench.rounds} rounds in turn (slow ones fewer); half of each "
        "batch is padding; all normalise; compiling is not timed.",
        f"Before each sample: read {bench.buffer.nbytes >> 20} MiB (data cold), one tiny call (code warm). "
        f"Floor: {bench.floor.note}, over the real tokens.",
    ]
    results, threads = measure(bench, cases, arguments.quick)
    tiny_us = tiny(repeats=10 if arguments.quick else 40)
    load_after = os.getloadavg()[0]
    if load_after > _BUSY:
        method.append(f"Other processes were busy (load {load_after:.1f} in the last minute): expect noise.")
    verdicts = goals.verdicts(results, tiny_us["inference mode"])

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for dtype in DTYPES:
        if of_dtype := [result for result in results if result.case.dtype == dtype]:
            report.print_results(console, dtype, of_dtype)
    report.print_goals(console, results, verdicts)
    report.print_tiny(console, tiny_us)
    report.print_threads(console, threads)
    for line in method:
        console.print(line, style="dim", highlight=False, soft_wrap=True)

    if arguments.json:
        record = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": describe_commit(),
            "seconds": round(time.monotonic() - started),
            "method": method,
            "load": {"before": load_before, "after": load_after},
            "machine": describe_machine(),
            "versions": describe_versions("sentence-transformers"),
            "goals": [asdict(verdict) for verdict in verdicts],
            "tiny_us": tiny_us,
            "threads_wall_ms": {
                case: {name: {n: round(1e3 * s, 4) for n, s in by.items()} for name, by in calls.items()}
                for case, calls in threads.items()
            },
            "cases": [result.summary() for result in results],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def measure(bench: Bench, cases: list[Case], quick: bool) -> tuple[list[Result], Threads]:
    """Every case, and the two-thread speed-ups where the machine has two cores."""
    results: list[Result] = []
    threads: Threads = {}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn between cases only: a thread of its own would take turns with what is timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases) + 1)
        for case in cases:
            progress.update(task, description=case.name, refresh=True)
            results.append(bench.run(case, PROVIDERS))
            progress.advance(task)
        progress.update(task, description="two threads", refresh=True)
        if cores() > 1:
            for case in CASES:
                if (case.shape, case.dtype) in _THREAD_CASES:
                    threads[case.name] = bench.threads(case, rounds=21 if quick else 61)
        progress.update(task, advance=1, description="done", refresh=True)
    return results, threads
