"""Measures how the Triton kernels are best cut up on this GPU, and up to which size CUDA C++ is the faster backend.

    python -m benchmarks.tune [--all] [--filter TEXT] [--seconds N] [--out FILE]

Writes triton_kernels/tuned/<gpu>.json, which fastpool reads when it meets such a GPU. A configuration says how many
leaves and groups make a unit, how many warps share it and how many loads are in flight; none changes the order of
additions, so tuning cannot change a result. Entries are kept where they beat the heuristic by more than noise.

Tried are the heuristic's neighbours for a few shapes, which takes three minutes on 16 cores; with --all every candidate
for every shape, which takes an hour. All are compiled on all cores before the first is timed.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

import fastpool
from benchmarks.cases import DTYPES, SHAPES, SKEWED, Batch, Case, build
from benchmarks.machine import cores, describe_commit, describe_versions
from fastpool import known
from fastpool.calls import PoolCall
from fastpool.dispatch import BACKENDS
from fastpool.triton_kernels import plan, run
from fastpool.triton_kernels.config import TUNED, Config, Shape, candidates, heuristic, key, slug, warps

GAIN = 0.03  # of the heuristic's time; less is noise
Time = Callable[[Config], float]
Among = Callable[[Shape], Sequence[Config]]

ALL = tuple(case for case in SHAPES if "cuda" in case.devices)
# Shapes whose time is the reading of token states, so that how they are cut up shows.
SHORT_LIST = (
    Case(512, 64, 768),  # a full batch of a base model: every processor has units enough
    Case("chunks", 64, 1024),  # a ragged one of a large model: units end early
    Case("passages", 1024, 768),  # many short texts: a unit each, and a search for it
    Case(SKEWED, 256, 1024),  # most programs find next to nothing to do
    Case(8192, 1, 4096),  # one text over the whole GPU: hardly a unit for a processor
    Case(32768, 1, 4096),  # and four times as many, which meet in a deeper tree
)
# Where the host's time decides, and with it which backend comes first; there is nothing to cut up.
SMALL = (Case(16, 1, 384), Case("queries", 32, 384), Case("passages", 32, 1024), Case(64, 8, 384))


def near(shape: Shape) -> list[Config]:
    """The candidates that differ from the heuristic in one choice. The number of warps follows that of leaves."""
    usual, found = heuristic(shape), []
    for config in candidates(shape):
        changed = {one.name for one in fields(Config) if getattr(config, one.name) != getattr(usual, one.name)}
        many = warps(config.leaves, shape.columns, shape.element_size, shape.warp_size)
        if len(changed) <= 1 or (changed == {"leaves", "warps"} and config.warps == many):
            found.append(config)
    return found


def best(shape: Shape, time_of: Time, among: Among = candidates, until: float = math.inf) -> Config | None:
    """The fastest candidate, if it beats the heuristic by more than GAIN. One that cannot run is none, and none is
    begun after `until` (of time.monotonic)."""
    usual = heuristic(shape)
    times: dict[Config, float] = {usual: time_of(usual)}
    for config in among(shape):
        if time.monotonic() > until:
            break
        if config == usual:
            continue
        try:
            times[config] = time_of(config)
        except Exception:  # it may need more registers or memory than there are, and Triton has many ways to say so
            continue
    fastest = min(times, key=lambda config: times[config])
    return fastest if times[fastest] < (1 - GAIN) * times[usual] else None


def crossover(times: Iterable[tuple[int, float, float]]) -> int:
    """From (bytes, native's time, Triton's time): the size up to which every measured call is faster on native. 0:
    none."""
    below = 0
    for size, native, triton in sorted(times):
        if native >= triton:
            break
        below = size + 1
    return below


@contextmanager
def choosing(config: Config) -> Iterator[None]:
    """Plans take this configuration, whatever the shape."""
    before = plan.choose
    plan.choose = lambda shape, name: config  # type: ignore[assignment]  # in its place
    known.forget()
    try:
        yield
    finally:
        plan.choose = before
        known.forget()


def shape_of(case: Case, device: str | torch.device) -> tuple[PoolCall, Shape]:
    """The call that is timed, without data, and what its configuration is chosen by."""
    packed = torch.empty(sum(case.lengths()), case.width, dtype=DTYPES[case.dtype], device="meta")
    cu_seqlens = torch.empty(case.batch + 1, dtype=torch.int32, device="meta")
    call = PoolCall("mean", packed, cu_seqlens=cu_seqlens, normalize=True)
    return call, plan.shape_of(call, case.width, run.device_of(torch.device(device)))


def plan_calls(cases: Sequence[Case], among: Among) -> None:
    """Makes the calls that will be timed, for precompile.py, which does not run them."""
    for case in cases:
        call, shape = shape_of(case, "cuda")
        for config in (heuristic(shape), *among(shape)):
            with choosing(config):
                run.pool(replace(call))  # another one, which is planned anew


def no_other(shape: Shape) -> list[Config]:
    """The candidates of a shape that is not tuned: none."""
    return []


def _call(batch: Batch) -> torch.Tensor:
    return fastpool.mean(batch.packed, cu_seqlens=batch.cu_seqlens, normalize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every candidate for every shape")
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name holds TEXT, and no others")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="nothing is begun after so many")
    parser.add_argument("--out", type=Path, metavar="FILE", help="another file to write")
    parser.add_argument("--commit", metavar="SHA", help="what is measured, where git cannot tell")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    if not torch.cuda.is_available():
        raise SystemExit("tune.py: torch sees no GPU here")
    from benchmarks import precompile
    from benchmarks.gpu import Gpu
    from benchmarks.measure import take_turns
    from benchmarks.timing_cuda import copies_of, eager_turn, seconds_of, time_calls

    among: Among = candidates if arguments.all else near
    tuned = [case for case in (ALL if arguments.all else SHORT_LIST) if arguments.filter in case.name]
    small = [case for case in SMALL if arguments.filter in case.name and case not in tuned]
    cases, began = small + tuned, time.monotonic()
    calls = [partial(plan_calls, small, no_other), partial(plan_calls, tuned, among)]
    compilers = precompile.compile_calls(calls, cores())
    precompile.tell(f"{len(cases)} cases", compilers, time.monotonic() - began)

    out = arguments.out or TUNED / f"{slug(torch.cuda.get_device_name())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    gpu = Gpu()
    configs: dict[str, dict[str, int]] = {}
    sizes: list[tuple[int, float, float]] = []
    for case in cases:
        if time.monotonic() > until:
            print(f"{case.name}: no time left", flush=True)
            continue
        batch = build(case, gpu.device)
        rotate = copies_of(batch, gpu)
        runs = [partial(_call, one) for one in rotate]

        def time_of(config: Config, runs: Sequence[Callable[[], torch.Tensor]] = runs) -> float:
            with choosing(config), fastpool.backend("triton"):
                return time_calls(runs, gpu, rounds=5).median

        _, shape = shape_of(case, gpu.device)
        found = best(shape, time_of, among, until) if case in tuned else None
        if found is not None:
            configs[key(shape)] = asdict(found)
        print(f"{case.name}: {found or 'the heuristic'}", flush=True)
        turns, call = [], PoolCall("mean", batch.packed, cu_seqlens=batch.cu_seqlens, normalize=True)
        seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        with choosing(found or heuristic(shape)):  # what Triton will take from now on
            for backend in ("native", "triton"):
                if BACKENDS[backend].supports(call) is None:
                    with fastpool.backend(backend):
                        turns.append(eager_turn(gpu, backend, runs, seconds_of(gpu, runs[0]), 9, backend))
            take_turns(turns, seconds, lambda turn, error: print(f"  {turn.name}: {error}"))
        if len(seconds) == 4:  # both, on the device and on the host
            native, triton = (median(seconds[name, "eager"]) for name in ("native", "triton"))
            sizes.append((batch.real_bytes, native, triton))
        found_all = {
            "native_below_bytes": crossover(sizes),
            "configs": configs,
            "commit": arguments.commit or describe_commit(),
            "versions": describe_versions(),
        }
        out.write_text(json.dumps(found_all, indent=1) + "\n")  # after every case: a run may be cut short
    print(f"{len(configs)} configurations in {out}")


if __name__ == "__main__":
    main()
