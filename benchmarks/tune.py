"""Measures how the Triton kernels are best cut up on this GPU, and up to which size CUDA C++ is the faster backend.

    python benchmarks/tune.py [--filter TEXT] [--out FILE]

Writes triton_kernels/tuned/<gpu>.json, which fastpool reads when it meets such a GPU. A configuration says how many
leaves and groups make a unit, how many warps share it and how many loads are in flight; none changes the order of
additions, so tuning cannot change a result. Entries are kept where they beat the heuristic by more than noise.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from fastpool.triton_kernels import launch
from fastpool.triton_kernels.config import TUNED, Config, Shape, candidates, heuristic, key, slug

import fastpool
from cases import SHAPES, Batch, build
from fastpool.dispatch import BACKENDS
from fastpool.segments import PoolCall
from machine import describe_commit, describe_versions

GAIN = 0.03  # of the heuristic's time; less is noise
Time = Callable[[Config], float]


def best(shape: Shape, time: Time) -> Config | None:
    """The fastest candidate, if it beats the heuristic by more than GAIN. One that cannot run is no candidate."""
    usual = heuristic(shape)
    times: dict[Config, float] = {usual: time(usual)}
    for config in candidates(shape):
        try:
            times[config] = time(config)
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


def _call(batch: Batch) -> torch.Tensor:
    return fastpool.mean(batch.packed, cu_seqlens=batch.cu_seqlens, normalize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name holds TEXT, and no others")
    parser.add_argument("--out", type=Path, metavar="FILE", help="another file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune.py: torch sees no GPU here")
    from gpu import Gpu
    from gpu_turns import copies_of, eager_turn, seconds_of, time_calls
    from measure import take_turns

    out = arguments.out or TUNED / f"{slug(torch.cuda.get_device_name())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    gpu = Gpu()
    device = launch.device_of(gpu.device)
    configs: dict[str, dict[str, int]] = {}
    sizes = []
    chosen: list[Config] = []
    launch.choose = lambda shape, name: chosen[-1] if chosen else heuristic(shape)
    for case in SHAPES:
        if "cuda" not in case.devices or arguments.filter not in case.name:
            continue
        batch = build(case, gpu.device)
        rotate = copies_of(batch, gpu)
        call = PoolCall("mean", batch.packed, cu_seqlens=batch.cu_seqlens)
        shape = launch.shape_of(call, case.width, device)

        def time(config: Config, rotate: list[Batch] = rotate) -> float:
            chosen[:] = [config]
            with fastpool.backend("triton"):
                return time_calls([partial(_call, one) for one in rotate], gpu, rounds=5).median

        found = best(shape, time)
        chosen.clear()
        if found is not None:
            configs[key(shape)] = asdict(found)
        print(f"{case.name}: {found or 'the heuristic'}", flush=True)
        runs = [partial(_call, one) for one in rotate]
        turns = []
        for backend in ("native", "triton"):
            if BACKENDS[backend].refuses(batch.packed) is None:
                with fastpool.backend(backend):
                    turns.append(eager_turn(gpu, backend, runs, seconds_of(gpu, runs[0]), 9, backend))
        seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        take_turns(turns, seconds, lambda turn, error: print(f"  {turn.name}: {error}"))
        if len(seconds) == 4:  # both, on the device and on the host
            sizes.append((batch.real_bytes, *(median(seconds[name, "eager"]) for name in ("native", "triton"))))
        found_all = {
            "native_below_bytes": crossover(sizes),
            "configs": configs,
            "commit": describe_commit(),
            "versions": describe_versions(),
        }
        out.write_text(json.dumps(found_all, indent=1) + "\n")  # after every case: a run may be cut short
    print(f"{len(configs)} configurations in {out}")


if __name__ == "__main__":
    main()
