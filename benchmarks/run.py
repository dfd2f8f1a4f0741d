"""The benchmark: what pooling costs above reading its input once, on this machine.

    python -m benchmarks.run [options]

                         everything, some ten minutes; on a GPU where there is one, else on the CPU
--quick                  fewer cases and rounds, no model
--filter "H1024 bf16"    the cases whose name holds this
--only shapes quality    these parts alone
--seconds 60             what there is time for: the other ways of pooling are left out first, then cases
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    attention,
    correctness,
    end_to_end,
    gradients,
    plots,
    real_states,
    scaling,
    sparse,
    tables,
    targets,
    timing_cpu,
)
from benchmarks.case_results import Result, Spread
from benchmarks.cases import CASES, Case
from benchmarks.gpu import Gpu
from benchmarks.machine import cores, describe_commit, describe_gpu, describe_machine, describe_versions, gpu_state
from benchmarks.measure import OUT_OF_TIME, Device, measure, skipped, words
from benchmarks.providers import COMPILED, FASTPOOL, PROVIDERS, Provider
from benchmarks.record import Record, load, result_path
from benchmarks.timing_cpu import Cpu
from benchmarks.timing_cuda import Cuda
from fastpool.triton_kernels.config import slug

SUITES = tuple(dict.fromkeys(case.suite for case in CASES))
PARTS = (*SUITES, "host", "attention", "sparse", "gradients", "growth", "quality", "real-states", "end-to-end")
_WITH_A_MODEL = ("real-states", "end-to-end")
_PEERS_SHARE = 0.75  # of the time there is: from then on fastpool is measured alone


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, about a minute")
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, metavar="PART", help=", ".join(PARTS))
    where = "the result file; without it results/<machine>/<date>-<commit>.json"
    limit = "a limit for the whole run; what was not measured by then is left out"
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help=limit)
    parser.add_argument("--no-plots", action="store_true", help="write the result file alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help=where)
    parser.add_argument("--commit", metavar="SHA", help="what was measured, where git cannot tell")
    return parser.parse_args(arguments)


def chosen(arguments: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in CASES
        if arguments.device in case.devices
        and arguments.filter in case.name
        and (case.quick or not arguments.quick)
        and case.suite in (arguments.only or SUITES)
    ]


def providers_of(device: str, suite: str, quick: bool) -> list[Provider]:
    """The providers of one suite. torch.compile would compile anew for each length of one long text, so it is left out
    there; the reference is slow, and measured in the shapes alone."""
    without = {COMPILED} if suite == "length" or (quick and device == "cuda") else set()
    if suite != "shapes":
        without |= {provider for provider in FASTPOOL if provider.backend == "reference"}
    return [provider for provider in PROVIDERS if device in provider.devices and provider not in without]


def main() -> None:
    arguments, started = parse(), time.monotonic()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    cases = chosen(arguments)
    # A filter asks for some cases, and no model.
    default = SUITES if arguments.filter else PARTS
    parts = arguments.only or [part for part in default if part not in _WITH_A_MODEL or not arguments.quick]
    if not cases and set(parts) & set(SUITES):
        names = ", ".join(case.name for case in CASES if arguments.device in case.devices)
        raise SystemExit(f"no case in these parts has {arguments.filter!r} in its name; names: {names}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=tables.WIDTH)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    commit = arguments.commit or describe_commit()
    on_gpu = arguments.device == "cuda"
    machine = {**describe_machine(), **(describe_gpu() if on_gpu else {})}
    folder = str(slug(str(machine["gpu"]))) if on_gpu else "cpu"
    complete = not (arguments.quick or arguments.filter or arguments.only or arguments.seconds < math.inf)
    path = arguments.json or result_path(folder, date, commit, complete)
    versions = describe_versions("triton", "sentence-transformers")
    head: dict[str, object] = {"date": date, "commit": commit, "device": arguments.device, "machine": machine}
    record = Record(path, {**head, "versions": versions, "complete": complete})
    limits = Limits.of(started, arguments.seconds)
    (_run_on_gpu if on_gpu else _run_on_cpu)(console, record, cases, parts, arguments.quick, limits)
    for line in record.content["method"]:
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    drawn = [] if arguments.no_plots else plots.draw(load(path), path.with_suffix(""))
    for written in (path, *drawn):
        console.print(f"written: {written}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Limits:
    """Values of time.monotonic: when peers are left out, and when everything is."""

    peers: float = math.inf
    all: float = math.inf

    @staticmethod
    def of(started: float, seconds: float) -> "Limits":
        return Limits(started + _PEERS_SHARE * seconds, started + seconds)

    def due(self, console: Console, record: Record, part: str) -> bool:
        """Whether there is time for a part; if there is none, it is said."""
        if time.monotonic() < self.all:
            return True
        record.set(**{f"{part.replace('-', '_')}_failure": OUT_OF_TIME})
        console.print(f"{part}: {OUT_OF_TIME}", style="yellow", highlight=False)
        return False


def _run_on_cpu(
    console: Console, record: Record, cases: list[Case], parts: Sequence[str], quick: bool, limits: Limits
) -> None:
    device = Cpu(rounds=3 if quick else 9, deadline=limits.peers)
    record.set(method=device.method)
    results = walk(console, record, device, cases, quick, limits.all)
    if results:
        record.set(load=os.getloadavg()[0])
    found = targets.verdicts("cpu", results)
    if "host" in parts and limits.due(console, record, "host"):
        tiny_us = timing_cpu.tiny(repeats=10 if quick else 40)
        found += targets.tiny_verdicts(tiny_us["inference mode"])
        record.set(tiny_us=tiny_us)
        tables.print_tiny(console, tiny_us)
        if cores() > 1:
            threads_ms = device.threads(rounds=21 if quick else 61)
            record.set(threads_wall_ms=threads_ms)
            tables.print_threads(console, threads_ms)
    if "attention" in parts and limits.due(console, record, "attention"):
        scored = attention.measure(device, attention.CASES[:2] if quick else attention.CASES)
        found += targets.attention_verdicts(scored)
        record.set(attention=scored)
        attention.print_attention(console, scored)
    if "sparse" in parts and limits.due(console, record, "sparse"):
        pooled = sparse.measure(device, sparse.CASES[:1] if quick else sparse.CASES)
        found += targets.sparse_verdicts(pooled)
        record.set(sparse=pooled)
        sparse.print_sparse(console, pooled)
    if "gradients" in parts and limits.due(console, record, "gradients"):
        by_memory = gradients.in_processes_of_their_own(rounds=3 if quick else 15)
        record.set(gradients=by_memory)
        for name, rows in by_memory.items():
            console.print(name, style="bold")
            gradients.print_gradients(console, rows)
    record.set(goals=found)
    tables.print_summary(console, "cpu", results)
    tables.print_verdicts(console, "cpu", found)
    _other_parts(console, record, device, parts, quick, limits)


def _run_on_gpu(
    console: Console, record: Record, cases: list[Case], parts: Sequence[str], quick: bool, limits: Limits
) -> None:
    device = Cuda(Gpu(), rounds=9 if quick else 25, deadline=limits.peers)
    rates: dict[str, float] = {}
    empty: dict[str, Spread] = {}
    failure = ""
    try:
        rates, empty = device.limits()
    except Exception as error:
        failure = words(error)
    tables.print_limits(console, rates, empty, failure)
    record.set(method=device.method, read_gb_per_s=rates, empty_us=empty, failure=failure, state=gpu_state())
    results = walk(console, record, device, cases, quick, limits.all)
    found = targets.verdicts("cuda", results, empty["replay"].median if "replay" in empty else None)
    record.set(goals=found)
    tables.print_summary(console, "cuda", results)
    tables.print_verdicts(console, "cuda", found)
    _other_parts(console, record, device, parts, quick, limits)
    record.set(state_at_end=gpu_state())


def walk(
    console: Console, record: Record, device: Device, cases: list[Case], quick: bool, until: float = math.inf
) -> list[Result]:
    """Every case, each printed and written as soon as it is there; while there is time for one like that before it."""
    results: list[Result] = []
    took = 0.0
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn between cases only: a thread of its own would take turns with what is timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name, refresh=True)
            if (began := time.monotonic()) + took < until:
                providers = providers_of(device.device.type, case.suite, quick)
                result = measure(device, case, providers, timed=case.suite != "length")
                took = time.monotonic() - began
            else:
                result = skipped(case, OUT_OF_TIME)
            results.append(result)
            record.set(cases=results)
            tables.print_result(console, device.device.type, result)
            progress.update(task, advance=1, refresh=True)
    return results


def _other_parts(
    console: Console, record: Record, device: Device, parts: Sequence[str], quick: bool, limits: Limits
) -> None:
    measures: dict[str, Callable[[], object]] = {
        "growth": lambda: scaling.measure(console, device, 1e6 if quick else 1e8),
        "quality": lambda: correctness.measure(console, device),
        "real-states": lambda: real_states.measure(console, device),
        "end-to-end": lambda: end_to_end.measure(console, device),
    }
    for part, run in measures.items():
        if part in parts and limits.due(console, record, part):
            try:
                record.set(**{part.replace("-", "_"): run()})
                if part == "quality":
                    record.set(quality_about={trial.name: trial.about for trial in correctness.TRIALS})
            except Exception as error:  # a package that is not there, or too little memory
                record.set(**{f"{part.replace('-', '_')}_failure": words(error)})
                console.print(f"{part} failed: {words(error)}", style="red", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
