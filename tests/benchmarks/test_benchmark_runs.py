"""The benchmark programs from end to end: on a CPU in earnest, and with a CPU that stands in for a GPU."""

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import (
    attention,
    cases,
    correctness,
    end_to_end,
    gradients,
    measure,
    providers,
    real_states,
    run,
    scaling,
    sparse,
    tables,
    targets,
    timing_cpu,
    timing_cuda,
)
from benchmarks.case_results import WRONG_BEYOND, Outcome, Result, from_json
from benchmarks.cases import Case
from benchmarks.gpu import Gpu
from benchmarks.record import Record
from benchmarks.timing_cpu import Cpu
from benchmarks.timing_cuda import Cuda
from fastpool.backends import triton as triton_backend

TINY = Case("queries", 5, 24)


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


class QuickCpu(Cpu):
    builds = 2

    def __init__(self, deadline: float = math.inf) -> None:
        super().__init__(rounds=1, deadline=deadline)
        self.buffer = torch.ones(8, dtype=torch.int64)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_copies_fill_the_cache_four_times() -> None:
    gpu, batch = OnCpu(), cases.build(Case(16, 2, 64), "cpu")  # 4 KiB
    copies = timing_cuda.copies_of(batch, gpu)
    assert len(copies) == 4 * gpu.cache_bytes // batch.real_bytes == 8
    assert len({one.packed.data_ptr() for one in copies}) == 8
    gpu.cache_bytes = 1 << 40
    assert len(timing_cuda.copies_of(batch, gpu)) == timing_cuda.MOST_COPIES
    gpu.cache_bytes = 1
    assert len(timing_cuda.copies_of(batch, gpu)) == 2


def test_calls_take_turns_over_the_copies() -> None:
    called: list[int] = []
    calls = [lambda i=i: called.append(i) for i in range(8)]
    spread = timing_cuda.time_calls(calls, OnCpu(), rounds=5)
    assert spread.rounds == 5
    assert {called.count(i) for i in range(1, 8)} == {3 * 6}  # 24 calls a sample, one to warm up


def test_a_turn_that_fails_is_out() -> None:
    seconds = measure.defaultdict(list)
    failed: list[str] = []
    samples = iter([{"x": 1.0}])
    turns = [measure.Turn("good", 3, lambda: {"x": 2.0}), measure.Turn("bad", 3, lambda: next(samples))]
    measure.take_turns(turns, seconds, lambda turn, error: failed.append(turn.name))
    assert seconds == {("good", "x"): [2.0] * 3, ("bad", "x"): [1.0]}
    assert failed == ["bad"]


def test_options() -> None:
    assert run.parse([]).device == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("cpu", "cuda"):
        quick = run.chosen(run.parse(["--device", device, "--quick"]))
        assert quick
        assert all(case.quick and device in case.devices for case in quick)
    with pytest.raises(AssertionError, match="gradient of mean"):
        gradients.check({"mean": lambda: torch.ones(2), "mean's formula": lambda: torch.ones(2) * 2})
    only = run.chosen(run.parse(["--device", "cpu", "--filter", "H4096"]))
    assert {case.width for case in only} == {4096}
    assert {case.suite for case in run.chosen(run.parse(["--only", "fill", "quality"]))} == {"fill"}
    with pytest.raises(SystemExit):
        run.parse(["--only", "nothing"])


def test_the_program_survives_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    """Runs, checks, prints and writes; a provider that breaks, one that is wrong, a case that does not fit."""

    def broken(batch: cases.Batch, normalize: bool) -> providers.Call:
        raise RuntimeError("out of luck\nmore")

    def breaks_later(batch: cases.Batch, normalize: bool) -> providers.Call:
        calls = iter([batch.hidden[:, 0]] * 6)
        return lambda: next(calls)

    wrong = providers.Provider("wrong", "padded", lambda batch, normalize: lambda: batch.hidden[:, 0].clone())
    pooling = [p for p in providers.PROVIDERS if p is not providers.COMPILED]
    pooling += [wrong, *(providers.Provider(f.__name__, "padded", f) for f in (broken, breaks_later))]
    monkeypatch.setattr(triton_backend, "supports", lambda call: "no Triton today")
    monkeypatch.setattr(run, "providers_of", lambda *_: pooling)
    path = tmp_path / "new" / "result.json"
    record = Record(path, {"date": "2027-01-02"})
    too_large = Case(1 << 40, 1, 1 << 20)
    device = Cuda(OnCpu(), rounds=3)
    rates, empty = device.limits()
    assert "torch.sum" in rates
    assert set(empty) == {"eager", "graph", "replay", "host"}
    run.walk(console, record, device, [TINY, too_large], quick=True)

    tiny, failed = (from_json(one) for one in json.loads(path.read_text())["cases"])
    ours = tiny.outcomes["fastpool auto, packed"]
    assert ours.same_bits is True
    assert ours.backend == "native"
    assert ours.error < WRONG_BEYOND["bf16"] < tiny.outcomes["wrong"].error
    assert tiny.outcomes["broken"].failure == "RuntimeError: out of luck"
    assert "StopIteration" in tiny.outcomes["breaks_later"].failure
    assert tiny.outcomes["fastpool triton, mask"].failure == "no Triton today"
    assert tiny.outcomes["segment_csr"].failure == "torch_scatter is not installed"
    assert tiny.read is not None
    assert failed.failure
    # The stand-in is a "cpu" by name: the columns of a GPU are there all the same.
    assert set(ours.us) == {"eager", "graph", "warm", "replay", "host"}
    tables.print_result(console, "cuda", tiny)
    for text in ("wrong: ", "broken: RuntimeError: out of luck", "failed: ", "SGLang"):
        assert text in printed(console)


def test_what_does_not_pool_is_found_out() -> None:
    """A provider that depends on the place in the batch, and one that writes nothing."""

    def by_place(batch: cases.Batch, normalize: bool) -> providers.Call:
        steps = 1 + torch.arange(len(batch.hidden))[:, None] * 1e-6
        return lambda: (providers.masked_mean(batch.hidden, batch.mask, normalize).double() * steps).float()

    def nothing(batch: cases.Batch, normalize: bool) -> providers.Call:
        return lambda: torch.empty(len(batch.hidden), batch.hidden.shape[-1])

    pooling = [providers.Provider(f.__name__, "padded", f) for f in (by_place, nothing)]
    pooling = [p for p in providers.PROVIDERS if p.name == "fastpool native, mask"] + pooling
    result = measure.measure(QuickCpu(), Case("queries", 32, 384, "fp32"), pooling, timed=False)
    assert [result.outcomes[p.name].same_bits for p in pooling[:2]] == [True, False]
    assert result.is_wrong(result.outcomes["nothing"])


def test_a_cpu_sample_is_cold_and_its_code_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = QuickCpu(), []
    monkeypatch.setattr(type(device.floor), "read", lambda self, tensor: seen.append("evicted"))
    provider = providers.Provider("any", "padded", lambda batch, normalize: lambda: batch.hidden)
    result = measure.skipped(TINY)
    result.outcomes["any"] = Outcome()
    calls = [lambda: seen.append("called"), lambda: seen.append("primed")]
    (turn,) = device.turns(provider, calls, result)
    seen.clear()
    turn.sample()
    assert seen == ["evicted", "primed", "called"]


def test_seconds_are_those_of_one_call() -> None:
    def busy() -> None:
        until = time.thread_time() + 2e-4
        while time.thread_time() < until:
            pass

    assert 1.9e-4 < QuickCpu().seconds(busy) < 2e-3


def test_peers_are_left_out_when_time_is_up() -> None:
    device = Cuda(OnCpu(), rounds=3, deadline=-math.inf)
    pooling = [p for p in providers.PROVIDERS if p.name in ("bmm", "fastpool auto, mask")]
    result = measure.measure(device, TINY, pooling)
    assert result.outcomes["bmm"].failure == "out of time"
    assert result.outcomes["fastpool auto, mask"].best


def test_what_there_is_no_time_for_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    """Peers first, then cases that would take too long, then the other parts; all of it by one clock."""
    limits = run.Limits.of(started=100.0, seconds=40.0)
    assert (limits.peers, limits.all) == (130.0, 140.0)
    assert run.parse(["--seconds", "40"]).seconds == 40
    assert run.Limits.of(100.0, run.parse([]).seconds) == run.Limits()
    path = tmp_path / "result.json"
    monkeypatch.setattr(run, "Cpu", lambda rounds, deadline: QuickCpu(deadline))
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    measured: list[str] = []

    def measure_slowly(device: QuickCpu, case: Case, *_: object, **__: object) -> Result:
        now[0] += 10 if len(measured) < 2 else 30
        measured.append(case.name)
        assert device.deadline == limits.peers
        return measure.skipped(case)

    monkeypatch.setattr(run, "measure", measure_slowly)
    now[0] = 105.0
    cases_ = [TINY, Case("queries", 6, 24), Case("queries", 7, 24), Case("queries", 8, 24)]
    run._run_on_cpu(console, Record(path, {}), cases_, ["shapes", "host", "quality"], True, limits)
    written = json.loads(path.read_text())
    assert len(measured) == 3
    assert [one["failure"] for one in written["cases"]] == ["", "", "", "out of time"]
    assert written["host_failure"] == written["quality_failure"] == "out of time"
    assert "tiny_us" not in written
    assert "quality: out of time" in printed(console)
    measured.clear()
    now[0] = 125.0
    run._run_on_cpu(console, Record(path, {}), cases_, ["shapes"], True, limits)
    assert len(measured) == 1  # at 135 a second one, which takes as long, would end at 145


def test_every_case_is_built_several_times_on_a_cpu(console: Console) -> None:
    device = QuickCpu()
    pooling = [p for p in providers.PROVIDERS if p.name in ("fastpool native, mask", "bmm", "bare C loop")]
    result = measure.measure(device, TINY, pooling)
    assert result.read is not None
    for name in ("fastpool native, mask", "bmm", "bare C loop"):
        assert result.outcomes[name].us["cpu"].rounds == 2, name
        assert result.outcomes[name].error < WRONG_BEYOND["bf16"]
    # One float32 tensor of the mask's size in bmm; fastpool needs nothing but its result.
    assert result.outcomes["bmm"].temporary_bytes > result.outcomes["fastpool native, mask"].temporary_bytes == 0
    untimed = measure.measure(device, TINY, pooling, timed=False)
    assert untimed.outcomes["bmm"].us == {}
    assert untimed.outcomes["bmm"].same_bits is not None
    tables.print_result(console, "cpu", result)
    tables.print_summary(console, "cpu", [result])
    assert "bare C loop" in printed(console)


def test_tiny_calls_and_two_threads(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.setattr(timing_cpu, "_THREAD_CASES", (TINY,))
    threads = QuickCpu().threads(rounds=1)
    assert set(threads[TINY.name]["torch.sum"]) == {"1", "2"}
    tiny = timing_cpu.tiny(repeats=1)
    assert set(tiny) == {"inference mode", "gradients on"}
    tables.print_tiny(console, tiny)
    tables.print_threads(console, threads)
    assert "fastpool native, packed" in printed(console)


def test_attention(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    """All that runs is timed, and what breaks or is wrong is not, and is said."""
    heads: list[int] = []

    def broken(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        heads.append(query.shape[-2])
        if query.shape[-2] > 1:
            raise RuntimeError("one query only")
        return value[:, :, :1]

    monkeypatch.setattr(attention, "flex_attention", lambda: broken)
    cases_ = (Case(64, 3, 24, "fp32"), Case(64, 3, 24, "bf16"))
    found = attention.measure(QuickCpu(), cases_)
    assert [one["bytes"] for one in found] == [3 * 64 * 24 * 4, 3 * 64 * 24 * 2]
    assert set(heads) == {1, attention.QUERIES}
    hidden = cases.build(cases_[0], "cpu").hidden
    everything = set(attention.calls_of(hidden))
    for one in found:
        broke = {"flex_attention", f"flex_attention, {attention.QUERIES} queries"}
        assert set(one["failures"]) == broke
        assert set(one["us"]) == everything - broke
        assert one["failures"]["flex_attention"].startswith("wrong: ")
    assert targets.attention_verdicts(found) == []  # too small
    attention.print_attention(console, found)
    assert "flex_attention: wrong: " in printed(console)
    assert "one query only" in printed(console)


def test_sparse(console: Console) -> None:
    """Ours, torch's and sentence-transformers' are right, in 32 and in 16 bits, and timed."""
    pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    cases_ = (Case(64, 3, 24, "fp32"), Case(64, 3, 24, "bf16"))
    found = sparse.measure(QuickCpu(), cases_)
    for one in found:
        assert not one["failures"]
        assert set(one["us"]) == set(sparse.calls_of(cases.build(cases_[0], "cpu").hidden))
    (verdict,) = targets.sparse_verdicts(found)
    assert verdict.of == 2
    sparse.print_sparse(console, found)
    assert "sentence-transformers, sum" in printed(console)


def test_flex_attention_runs_on_a_cpu() -> None:
    hidden = cases.build(Case(64, 2, 32, "fp32"), "cpu").hidden
    with torch.inference_mode():
        call, exact = attention.calls_of(hidden)["flex_attention"]
        torch.testing.assert_close(call(), exact().float(), rtol=1e-4, atol=1e-5)


def test_growth(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    assert scaling.steps(1e4) == [100, 300, 1000, 3000, 10_000]
    monkeypatch.setattr(scaling, "_ROWS", 2000)
    found = scaling.measure(console, QuickCpu(), 3000)
    everybody = {"fastpool native, packed", *scaling._PEERS}
    # Beyond memory, only what can read rows twice.
    assert [set(step["us"]) for step in found] == [everybody] * 3 + [{"fastpool native, packed"}]


def test_quality(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of each: the table would be worthless if a provider that is wrong looked fine, or ours did not. Of
    torch.compile, which takes longer than all others, nothing is known."""
    monkeypatch.setattr(correctness, "PROVIDERS", [p for p in providers.PROVIDERS if p is not providers.COMPILED])
    found = correctness.measure(console, QuickCpu())
    for name, findings in found.items():
        if name.startswith("fastpool"):
            assert all(one.fine is not False for one in findings.values()), (name, findings)
    assert (found["bmm"]["fp16 sums"].fine, found["bmm"]["fp16 sums"].gave) == (False, "inf")
    assert found["model card"]["NaN in padding"].gave == "NaN"
    assert found["bmm"]["counts"].fine is False
    assert found["segment_reduce"]["long text"].fine is False
    assert found["SGLang"]["neighbours"].fine is False
    assert found["loop"]["empty text"].gave == "NaN"
    assert "wrong neighbours" in found["SGLang"]["empty text"].gave
    assert found["embedding_bag"]["NaN in padding"].fine is None


def test_real_states(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    """With states that only look like a model's: the model itself is the next test's."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(length, 24, generator=generator) + 1 for length in (7, 30, 300)]
    monkeypatch.setattr(real_states, "token_states", lambda: states)
    found = real_states.measure(console, QuickCpu())
    for dtype, half_ulp in (("bf16", 2**-9), ("fp16", 2**-12)):
        largest = max(one.mean(0).abs().max().item() for one in states)
        assert found[dtype]["fastpool native, packed"]["error"] <= 2 * half_ulp * largest
        assert found[dtype]["SGLang"]["error"] > found[dtype]["fastpool native, packed"]["error"]
        assert found[dtype]["SGLang"]["cosine"] < found[dtype]["fastpool native, packed"]["cosine"]


@pytest.mark.model
def test_end_to_end(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    few = end_to_end.Workload("few", 6, 4, lambda docs: docs)
    monkeypatch.setattr(end_to_end, "WORKLOADS", (few,))
    (found,) = end_to_end.measure(console, QuickCpu(), rounds=1)
    assert found["texts"] == 6
    for way in ("own", "fastpool"):
        assert 0 < found[way]["pooling_share"] < 1
    assert found["least_cosine"] > 0.999999
    assert found["largest_difference"] < 1e-6
