"""The benchmark on a GPU."""

import argparse
import json
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from fastpool.triton_kernels.config import slug
from rich.console import Console

import report_gpu
from bench_gpu import GpuBench, skipped, words
from cases_gpu import CASES, GpuCase
from goals_gpu import verdicts
from gpu import Gpu
from machine import describe_commit, describe_gpu, describe_versions, gpu_state
from providers import Provider
from providers_gpu import COMPILED, FASTPOOL, PEERS
from samples_gpu import Result, Spread, to_json

_RESULTS = Path(__file__).parent / "results"
# Seconds: when peers are left out, and when cases are.
_LIMITS = {False: (220, 265), True: (30, 42)}
METHOD = (
    "Median (and quartiles) of rounds in turn, clocked by events on the device, microseconds per call. All normalise. "
    "Compiling is not timed; torch.compile compiles each shape for itself.",
    "Cold: each call of a sample has another copy of the input, four times the L2 cache in all, and a read evicts the "
    "rest. eager: calls from Python, one after another. graph: many calls in one CUDA graph. replay: a graph for each "
    "call. warm: as graph, on one input. host: the CPU's share of an eager call.",
    "GB/s: real tokens alone. of read: bytes that have to move (real tokens, mask or bounds, result) in the graph's "
    "time, as a share of the rate at which a read-only stream of the same real tokens runs, in the same turns.",
)


def result_path(gpu: str, date: str, commit: str) -> Path:
    """results/<gpu>/<date>-<commit>.json"""
    sha, _, changes = commit.partition("+")
    name = f"{date[:10]}-{sha[:8]}{'-' + changes if changes else ''}.json"
    return _RESULTS / str(slug(gpu)) / name


def chosen(arguments: argparse.Namespace) -> list[GpuCase]:
    return [
        case
        for case in CASES
        if arguments.filter in case.name
        and (case.quick or not arguments.quick)
        and (case.native or arguments.shapes != "native")
    ]


class Record:
    """The result file, written again after every case: a run that is cut off has left what it had."""

    def __init__(self, path: Path, head: dict[str, object]) -> None:
        self.path, self.head = path, head
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, results: Sequence[Result], empty_replay_us: float | None, **more: object) -> None:
        goals = verdicts(list(results), empty_replay_us)
        record = to_json({**self.head, **more, "goals": goals, "cases": list(results)})
        self.path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def main(arguments: argparse.Namespace) -> None:
    cases = chosen(arguments)
    if not cases:
        names = ", ".join(case.name for case in CASES)
        raise SystemExit(f"no case's name holds {arguments.filter!r}; names: {names}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=report_gpu.WIDTH)
    description, date = describe_gpu(), datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    commit = arguments.commit or describe_commit()
    path = arguments.json or result_path(str(description["gpu"]), date, commit)
    head = {
        "date": date,
        "commit": commit,
        "method": METHOD,
        "machine": description,
        "versions": describe_versions("triton", "sentence-transformers"),
    }
    providers = [p for p in (*FASTPOOL, *PEERS) if not (arguments.quick and p is COMPILED)]
    measure(console, Gpu(), cases, providers, Record(path, head), arguments.quick)
    for line in METHOD:
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)


def measure(
    console: Console, gpu: Gpu, cases: list[GpuCase], providers: list[Provider], record: Record, quick: bool
) -> list[Result]:
    """Every case, each printed and written as soon as it is there."""
    started = time.monotonic()
    without_peers, without_cases = (started + limit for limit in _LIMITS[quick])
    bench = GpuBench(gpu, rounds=9 if quick else 25, deadline=without_peers)
    rates: dict[str, float] = {}
    empty: dict[str, Spread] = {}
    failure = ""
    try:
        rates, empty = bench.limits()
    except Exception as error:
        failure = words(error)
    report_gpu.print_limits(console, rates, empty, failure)
    empty_replay_us = empty["replay"].median if "replay" in empty else None
    more = {"read_gb_per_s": rates, "empty_us": empty, "failure": failure, "state": gpu_state()}
    results: list[Result] = []
    for case in cases:
        result = bench.run(case, providers) if time.monotonic() < without_cases else skipped(case, "out of time")
        results.append(result)
        report_gpu.print_result(console, result)
        record.write(results, empty_replay_us, **more, seconds=round(time.monotonic() - started))
    more["state_at_end"] = gpu_state()
    record.write(results, empty_replay_us, **more, seconds=round(time.monotonic() - started))
    report_gpu.print_summary(console, results)
    report_gpu.print_verdicts(console, verdicts(results, empty_replay_us))
    return results
