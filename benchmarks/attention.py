"""What weighing tokens by scores costs above pooling them, and several modes of one read above one, on a CPU.

    python -m benchmarks.run --only attention

Beside fastpool stand torch's own ways: softmax and bmm, scaled_dot_product_attention and flex_attention with pooling's
few queries. torch's attention over packed texts (torch.nn.attention.varlen) runs on GPUs alone. Every token is real and
nothing is normalised, which is what those do best. Each is checked against float64 before it is timed.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from rich.console import Console
from torch import Tensor

import fastpool
from benchmarks.case_results import WRONG_BEYOND
from benchmarks.cases import Case, build, relative_error
from benchmarks.measure import Turn, take_turns, words
from benchmarks.providers import Call
from benchmarks.tables import table_of
from benchmarks.timing_cpu import Cpu, cpu_seconds

QUERIES = 8
MODES = ("mean", "max", "cls")  # of one read
SHAPES = ((32, 512, 768), (64, 256, 384), (8, 2048, 1024), (4, 1024, 4096))
CASES = tuple(Case(length, batch, width, dtype) for dtype in ("fp32", "bf16") for batch, length, width in SHAPES)

Calls = dict[str, tuple[Call, Callable[[], Tensor]]]  # what is timed, and what gives its result in float64


@cache
def flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def calls_of(hidden: Tensor) -> Calls:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(hidden.shape[:2], generator=generator)
    queries = (torch.randn(QUERIES, hidden.shape[-1], generator=generator) / hidden.shape[-1] ** 0.5).to(hidden.dtype)
    weights, keys = scores.exp(), hidden.unsqueeze(1)

    def by_scores() -> Tensor:
        return (scores.double().softmax(1).unsqueeze(1) @ hidden.double()).squeeze(1)

    def attended(some: Tensor) -> Tensor:
        wide = hidden.double()
        return (wide @ some.double().T).softmax(1).mT @ wide

    def by_torch(function: Callable[..., Tensor], some: Tensor) -> Call:
        expanded = some.expand(len(hidden), 1, *some.shape)
        return lambda: function(expanded, keys, keys, scale=1.0).squeeze(1)

    calls: Calls = {
        "mean": (lambda: fastpool.mean(hidden), lambda: hidden.double().mean(1)),
        "max": (lambda: fastpool.max(hidden), lambda: hidden.double().amax(1)),
        "weighted_mean": (lambda: fastpool.weighted_mean(hidden, weights=weights), by_scores),
        "softmax_mean": (lambda: fastpool.softmax_mean(hidden, scores=scores), by_scores),
        "softmax, bmm": (
            lambda: torch.bmm(torch.softmax(scores, 1).to(hidden.dtype).unsqueeze(1), hidden).squeeze(1), by_scores
        ),
    }  # fmt: skip
    for said, some in (("", queries[:1]), (f", {QUERIES} queries", queries)):
        calls |= {
            f"attention{said}": (partial(fastpool.attention, hidden, some), partial(attended, some)),
            f"SDPA{said}": (by_torch(F.scaled_dot_product_attention, some), partial(attended, some)),
            f"flex_attention{said}": (by_torch(flex_attention(), some), partial(attended, some)),
        }

    def side_by_side() -> Tensor:
        wide = hidden.double()
        return torch.cat([wide.mean(1), wide.amax(1), wide[:, 0]], 1)

    each = [getattr(fastpool, mode) for mode in MODES]
    together = partial(fastpool.pool, hidden, modes=MODES)
    return calls | {
        ", ".join(MODES): (together, side_by_side),
        f"{', '.join(MODES)}, a call each": (lambda: torch.cat([one(hidden) for one in each], 1), side_by_side),
    }


def measure(device: Cpu, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each case, microseconds by call, medians, and why others have none."""
    return measure_calls(device, cases, calls_of)


@torch.inference_mode()
def measure_calls(device: Cpu, cases: Sequence[Case], calls_of: Callable[[Tensor], Calls]) -> list[dict[str, Any]]:
    """The same for any calls on a tensor of token states."""
    return [_measure(device, case, calls_of) for case in cases]


def _measure(device: Cpu, case: Case, calls_of: Callable[[Tensor], Calls]) -> dict[str, Any]:
    torch.compiler.reset()
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    failures: dict[str, str] = {}

    def failed(turn: Turn, error: Exception) -> None:
        failures[turn.name] = words(error)

    for seed in range(device.builds):
        batch = build(case, device.device, seed)
        (small,) = device.beside(case, batch)
        turns = []
        pairs = zip(calls_of(batch.hidden).items(), calls_of(small.hidden).values(), strict=True)
        for (name, (call, exact)), (prime, _) in pairs:
            try:
                failures |= _check(name, call, exact, WRONG_BEYOND[case.dtype])
                prime()
            except Exception as error:
                failures[name] = words(error)
            if name not in failures:
                turns.append(Turn(name, device.rounds, device.sample("cpu", prime, partial(cpu_seconds, call))))
        take_turns(turns, seconds, failed)
    us = {name: round(1e6 * statistics.median(taken), 3) for (name, _), taken in seconds.items()}
    return {"case": case.name, "bytes": batch.hidden.nbytes, "us": us, "failures": failures}


def _check(name: str, call: Call, exact: Callable[[], Tensor], beyond: float) -> dict[str, str]:
    """What is not right is not timed."""
    error = relative_error(call().flatten(1), exact().flatten(1))
    return {} if error <= beyond else {name: f"wrong: {error:.1e}"}


def print_attention(console: Console, found: list[dict[str, Any]]) -> None:
    print_calls(console, found, "pooling by scores, and several modes of one read: multiples of mean", "mean")


def print_calls(console: Console, found: list[dict[str, Any]], title: str, unit: str) -> None:
    """What measure_calls gives, as multiples of one of the calls."""
    table = table_of(title, "", *(one["case"].replace(" ", "\n", 1) for one in found))
    table.add_row(f"{unit}, us", *(f"{one['us'][unit]:.0f}" for one in found))
    names = dict.fromkeys(name for one in found for name in (*one["us"], *one["failures"]) if name != unit)
    for name in names:
        cells = (f"{one['us'][name] / one['us'][unit]:.2f}" if name in one["us"] else "-" for one in found)
        table.add_row(name, *cells)
    console.print(table)
    for one in found:
        for name, why in one["failures"].items():
            console.print(f"  {one['case']}, {name}: {why}", style="yellow", highlight=False, soft_wrap=True)
