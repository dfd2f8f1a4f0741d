"""The benchmarks' formulas, cases, records and verdicts: all of them that needs no GPU and no quiet machine."""

import argparse
import io
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fastpool
from fastpool.backends import triton as triton_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_gpu
import cases
import cases_gpu
import goals_gpu
import measure_gpu
import providers
import providers_gpu
import run
import run_gpu
import stream_gpu
from gpu import Gpu
from samples import WRONG_BEYOND
from samples_gpu import Outcome, Result, Spread, from_json, to_json

TINY = cases_gpu.GpuCase("queries", 5, 24)


class OnCpu(Gpu):
    """Stands in for a GPU: everything runs, and figures mean nothing."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = 1 << 13

    def evict(self) -> None:
        pass

    def empty(self) -> None:
        pass

    def time(self, run: Callable[[], object], cold: bool, ahead: bool) -> tuple[float, float]:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 1e-6

    def capture(self, calls: Sequence[Callable[[], object]], keep: bool = False) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: [call() for call in calls])

    def launches(self, call: Callable[[], object]) -> int:
        return 1

    def synchronizes(self, call: Callable[[], object]) -> bool:
        return False

    def temporary_bytes(self, call: Callable[[], object]) -> int:
        return 0

    def free(self) -> None:
        pass


# ---- cases


def test_mixes_are_what_they_say() -> None:
    generator = random.Random(1)
    means = {name: sum(mix.draw(generator) for _ in range(20000)) / 20000 for name, mix in cases_gpu.MIXES.items()}
    assert means == pytest.approx({"queries": 8, "passages": 75, "chunks": 330, "documents": 1300}, rel=0.05)


@pytest.mark.parametrize("case", cases_gpu.CASES, ids=lambda case: case.name)
def test_lengths_are_reproducible_and_in_range(case: cases_gpu.GpuCase) -> None:
    lengths = case.lengths()
    assert lengths == case.lengths()
    assert len(lengths) == case.batch
    cap = (
        8192
        if case.mix == cases_gpu.SKEWED
        else case.mix
        if isinstance(case.mix, int)
        else cases_gpu.MIXES[case.mix].cap
    )
    assert all(1 <= length <= cap for length in lengths)
    if case.twin is not None:
        assert sum(case.twin.lengths()) == sum(lengths)
        assert case.twin in cases_gpu.CASES
        assert case.twin.name != case.name


def test_names_are_unique_and_seeds_pinned() -> None:
    names = [case.name for case in cases_gpu.CASES]
    assert len(set(names)) == len(names)
    assert cases_gpu.GpuCase("queries", 6, 8).lengths() == [8, 9, 8, 12, 7, 5]


def test_the_same_tokens_in_both_layouts_and_in_another_order() -> None:
    batch = cases_gpu.build(TINY, "cpu")
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.diff().tolist() == TINY.lengths() == batch.mask.sum(1).tolist()
    assert torch.equal(batch.hidden[batch.mask.bool()], batch.packed)
    order = [4, 0, 0]
    other = cases_gpu.reorder(batch, order)
    assert torch.equal(other.hidden[other.mask.bool()], other.packed)
    assert torch.equal(cases.exact(other), cases.exact(batch)[order])
    half = cases_gpu.build(cases_gpu.GpuCase(4, 3, 8, rows=8), "cpu")
    assert half.hidden.shape == (3, 8, 8)
    assert half.mask.sum() == 12


# ---- providers


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mix", ["queries", 3, 1])
def test_providers_compute_the_mean(mix: str | int, dtype: str) -> None:
    """Each formula against float64, with the engines' int32 offsets; torch.compile's by the function it compiles."""
    batch = cases_gpu.build(cases_gpu.GpuCase(mix, 7, 32, dtype), "cpu")
    expected = cases.exact(batch)
    calls = {p.name: p.prepare(batch) for p in providers_gpu.PEERS if p is not providers_gpu.COMPILED}
    calls["compiled"] = lambda: providers.masked_mean(batch.hidden, batch.mask)
    for provider in providers_gpu.FASTPOOL:
        if provider.backend == "auto":
            calls[provider.name] = provider.prepare(batch)
    for name, call in calls.items():
        assert cases.relative_error(call(), expected) <= WRONG_BEYOND[dtype], name


def test_vllm_adds_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = cases_gpu.build(TINY, "cpu")
    monkeypatch.setattr(providers_gpu, "_VLLM_CHUNK_BYTES", 3 * 4 * TINY.width)
    assert cases.relative_error(providers_gpu.vllm(batch)(), cases.exact(batch)) < 1e-5


def test_must_move() -> None:
    batch = cases_gpu.build(cases_gpu.GpuCase(2, 3, 8, rows=5), "cpu")
    by_name = {p.name: providers_gpu.must_move(p, batch) for p in providers_gpu.FASTPOOL}
    tokens, result = 2 * 3 * 8 * 2, 3 * 8 * 2
    assert by_name["fastpool auto, mask"] == tokens + result + 3 * 5 * 8
    assert by_name["fastpool auto, lengths"] == by_name["fastpool auto, packed"] == tokens + result + 4 * 4


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "refuses", lambda tensor: "no Triton today")


@pytest.mark.usefixtures("without_triton")
def test_a_backend_that_is_not_there_says_why() -> None:
    batch = cases_gpu.build(TINY, "cpu")
    triton = next(p for p in providers_gpu.FASTPOOL if p.backend == "triton")
    with fastpool.backend("triton"):
        served, reason = providers_gpu.backend_of(triton, batch)
    assert (served, reason) == ("", "no Triton today")
    assert providers_gpu.backend_of(providers_gpu.COMPILED, batch) == ("", "")


def test_readers_see_every_word() -> None:
    tensor = torch.randn(1003, 2).bfloat16()
    assert stream_gpu.reads_all("torch.sum", tensor)
    stream_gpu.READERS["torch.sum"](tensor)()


# ---- records


def outcome(us: float, **more: object) -> Outcome:
    return Outcome(us={"graph": Spread(us, us, us, us, 3)}, error=1e-3, launches=1, temporary_bytes=0, **more)


def result(case: cases_gpu.GpuCase, read_us: float, **us: float) -> Result:
    made = bench_gpu.skipped(case)
    made.read, made.reader = Spread(read_us, read_us, read_us, read_us, 3), "torch.sum"
    made.outcomes = {name.replace("_", " "): outcome(one, must_move=made.real_bytes) for name, one in us.items()}
    return made


def test_records_come_back() -> None:
    made = result(TINY, 2.0, vLLM=3.0)
    made.outcomes["SGLang"] = Outcome(failure="OutOfMemoryError: too much")
    made.outcomes["vLLM"].same_bits = False
    again = from_json(json.loads(json.dumps(to_json(made), allow_nan=False)))
    assert again.outcomes["vLLM"] == made.outcomes["vLLM"]
    assert again.read == made.read
    assert again.outcomes["SGLang"].error != again.outcomes["SGLang"].error  # NaN came back as NaN
    assert again.share("vLLM") == pytest.approx(2 / 3)
    assert again.share("SGLang") is None


def test_spreads() -> None:
    assert Spread.of([3e-6, 1e-6, 2e-6]) == Spread(2.0, 1.5, 2.5, 1.0, 3)
    assert Spread.of([1e-6]) == Spread(1.0, 1.0, 1.0, 1.0, 1)


def test_paths_name_the_gpu_the_day_and_the_commit() -> None:
    path = run_gpu.result_path("NVIDIA H200", "2027-01-02T03:04:05Z", "0123456789abcdef+changes")
    assert path.parts[-4:] == ("benchmarks", "results", "nvidia-h200", "2027-01-02-01234567-changes.json")
    assert run_gpu.result_path("NVIDIA H200", "2027-01-02T03:04:05Z", "unknown").name == "2027-01-02-unknown.json"


def test_options() -> None:
    assert run.parse([]).device == ("cuda" if torch.cuda.is_available() else "cpu")
    quick = run_gpu.chosen(run.parse(["--device", "cuda", "--quick"]))
    assert quick
    assert all(case.quick for case in quick)
    # A case and its twin come together, or neither goal about them could be judged.
    assert all(case.twin is None or case.twin in quick for case in quick)
    only = run_gpu.chosen(run.parse(["--filter", "H4096", "--shapes", "native"]))
    assert {case.dtype for case in only} == {"bf16"}


# ---- goals


def goal(found: list[goals_gpu.Verdict], start: str, backend: str) -> goals_gpu.Verdict:
    return next(v for v in found if v.goal.startswith(start) and v.backend == backend)


def test_verdicts() -> None:
    large, middle = cases_gpu.GpuCase(32768, 1, 4096), cases_gpu.GpuCase(512, 64, 768)
    skewed, half = cases_gpu.GpuCase("skewed", 256, 1024), cases_gpu.GpuCase(256, 256, 1024, rows=512)
    assert skewed.twin is not None
    assert half.twin is not None
    small = result(TINY, 1.0)
    small.outcomes["fastpool triton, mask"] = outcome(2.0)
    small.outcomes["fastpool triton, mask"].us["replay"] = Spread(4.0, 4.0, 4.0, 4.0, 3)
    small.outcomes["fastpool native, mask"] = outcome(2.0)
    small.outcomes["fastpool native, mask"].launches = 2
    small.outcomes["fastpool native, mask"].temporary_bytes = 2 * small.allowance
    name = "fastpool triton, mask"
    found = goals_gpu.verdicts(
        [
            result(large, 50.0, **{name: 52.0}),  # 0.96
            result(middle, 10.0, **{name: 14.0}),  # 0.71
            result(skewed, 50.0, **{name: 60.0}),  # 0.83, and 1.2 times its twin's time
            result(skewed.twin, 50.0, **{name: 50.0}),
            result(half, 50.0, **{name: 50.0}),
            result(half.twin, 50.0, **{name: 49.0}),
            small,
        ],
        empty_replay_us=3.5,
    )
    share = goal(found, "share of the read stream, 100 MB", "triton")
    assert (share.met, share.of, share.worst) == (4, 5, pytest.approx(0.8333))
    assert share.where == "skewed B256 H1024 bf16, mask"
    assert goal(found, "share of the read stream, 30", "triton").met == 0
    assert goal(found, "launches", "triton").met == 1
    assert goal(found, "launches", "native").met == 0
    assert goal(found, "replay", "triton").worst == pytest.approx(4 / 3.5, abs=1e-4)
    assert goal(found, "skewed", "triton").met == 0
    assert goal(found, "half padding", "triton").met == 1
    assert goal(found, "temporaries", "native").worst == 2
    assert not [v for v in found if v.backend == "auto"]


def test_a_provider_without_figures_does_not_count() -> None:
    failed = result(cases_gpu.GpuCase(32768, 1, 4096), 50.0)
    failed.outcomes["fastpool triton, mask"] = Outcome(failure="it broke", temporary_bytes=0)
    assert goals_gpu.verdicts([failed], 1.0) == []


# ---- measuring


def test_copies_fill_the_cache_four_times() -> None:
    gpu, batch = OnCpu(), cases_gpu.build(cases_gpu.GpuCase(16, 2, 64), "cpu")  # 4 KiB
    copies = measure_gpu.copies_of(batch, gpu)
    assert len(copies) == 4 * gpu.cache_bytes // batch.real_bytes == 8
    assert len({one.packed.data_ptr() for one in copies}) == 8
    gpu.cache_bytes = 1 << 40
    assert len(measure_gpu.copies_of(batch, gpu)) == measure_gpu.MOST_COPIES
    gpu.cache_bytes = 1
    assert len(measure_gpu.copies_of(batch, gpu)) == 2
    called: list[int] = []
    spread = measure_gpu.time_call(lambda one: called.append(one.packed.data_ptr()), copies, gpu, rounds=5)
    assert spread.rounds == 5
    assert {called.count(one.packed.data_ptr()) for one in copies[1:]} == {3 * 6}  # 24 calls a sample, one to warm up


# ---- the whole program, without a GPU


@pytest.mark.usefixtures("without_triton")
def test_the_program_survives_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, checks, prints and writes; a provider that breaks, one that is wrong, a case that does not fit."""

    def broken(batch: cases.Batch) -> providers.Call:
        raise RuntimeError("out of luck\nmore")

    def breaks_later(batch: cases.Batch) -> providers.Call:
        calls = iter([batch.hidden[:, 0]] * 6)
        return lambda: next(calls)

    monkeypatch.setattr(run_gpu, "gpu_state", dict)
    torch.set_num_threads(1)
    path = tmp_path / "new" / "result.json"
    console = Console(file=io.StringIO(), width=200)
    wrong = providers.Provider("wrong", "padded", lambda batch: lambda: batch.hidden[:, 0].clone())
    pooling = [p for p in (*providers_gpu.FASTPOOL, *providers_gpu.PEERS) if p is not providers_gpu.COMPILED]
    pooling += [wrong, *(providers.Provider(f.__name__, "padded", f) for f in (broken, breaks_later))]
    too_large = cases_gpu.GpuCase(1 << 40, 1, 1 << 20)
    record = run_gpu.Record(path, {"date": "2027-01-02"})
    run_gpu.measure(console, OnCpu(), [TINY, too_large], pooling, record, quick=True)

    written = json.loads(path.read_text())
    tiny, failed = (from_json(one) for one in written["cases"])
    ours = tiny.outcomes["fastpool auto, packed"]
    assert set(ours.us) == {"eager", "graph", "warm", "replay", "host"}
    assert ours.same_bits is True
    assert ours.backend == "native"
    assert ours.error < WRONG_BEYOND["bf16"] < tiny.outcomes["wrong"].error
    assert tiny.outcomes["broken"].failure == "RuntimeError: out of luck"
    assert "StopIteration" in tiny.outcomes["breaks_later"].failure
    assert tiny.outcomes["fastpool triton, mask"].failure == "no Triton today"
    assert tiny.read is not None
    assert failed.failure
    assert written["empty_us"]["replay"]["rounds"] > 0
    printed = console.file.getvalue()
    for text in ("wrong: ", "broken: RuntimeError: out of luck", "failed: ", "goals", "SGLang"):
        assert text in printed


def test_the_cpu_benchmark_still_runs() -> None:
    import goals
    import report
    from floor import build_floor
    from measure import Bench

    bench = Bench(build_floor(), cache_bytes=1 << 16, rounds=1)
    taken = bench.run(cases.Case(2, 8, 16, "fp32", True), (providers.FASTPOOL_PADDED, providers.BMM))
    assert taken.over_floor(providers.BMM)
    assert set(taken.summary()["providers"]) == {"fastpool padded", "bmm"}
    console = Console(file=io.StringIO(), width=140)
    report.print_results(console, "fp32", [taken])
    report.print_goals(console, [taken], goals.verdicts([taken], {"add": 1.0, "mean": 3.0}))
    assert isinstance(run.parse(["--device", "cpu", "--quick"]), argparse.Namespace)
