"""The benchmarks' cases, formulas, records and verdicts: all of them that needs no GPU and no quiet machine."""

import json
import random

import pytest
import torch

from benchmarks import bandwidth_gpu, cases, providers, targets
from benchmarks.case_results import WRONG_BEYOND, Outcome, Result, Spread, from_json, to_json
from benchmarks.cases import Case
from benchmarks.measure import skipped
from benchmarks.record import result_path
from fastpool import backend
from fastpool.backends import triton as triton_backend

TINY = Case("queries", 5, 24)


# ---- cases


def test_mixes_are_what_they_say() -> None:
    generator = random.Random(1)
    means = {name: sum(mix.draw(generator) for _ in range(20000)) / 20000 for name, mix in cases.MIXES.items()}
    assert means == pytest.approx({"queries": 8, "passages": 75, "chunks": 330, "documents": 1300}, rel=0.05)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_lengths_are_reproducible_and_in_range(case: Case) -> None:
    lengths = case.lengths()
    assert lengths == case.lengths()
    assert len(lengths) == case.batch
    assert min(lengths) >= 1
    if not (case.level or case.largest):
        cap = 8192 if case.mix == cases.SKEWED else case.mix if isinstance(case.mix, int) else cases.MIXES[case.mix].cap
        assert max(lengths) <= cap
    if case.twin is not None:
        assert sum(case.twin.lengths()) == sum(lengths)
        assert case.twin in cases.CASES
        assert case.twin.name != case.name


def test_names_are_unique_and_seeds_pinned() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert Case("queries", 6, 8).lengths() == [8, 9, 8, 12, 7, 5]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_cases_come_with_their_twins(device: str) -> None:
    """Or no target about the two could be judged."""
    here = [case for case in cases.CASES if device in case.devices]
    for case in here:
        assert case.twin is None or (case.twin in here and case.twin.quick == case.quick), case.name


def test_the_skewed_suite_moves_tokens_only() -> None:
    lengths = [case.lengths() for case in cases.SKEW]
    assert len({sum(one) for one in lengths}) == 1
    assert [max(one) / sum(one) for one in lengths] == pytest.approx([case.largest for case in cases.SKEW])


def test_the_same_tokens_in_both_layouts_and_in_another_order() -> None:
    batch = cases.build(TINY, "cpu")
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.diff().tolist() == TINY.lengths() == batch.mask.sum(1).tolist()
    assert torch.equal(batch.hidden[batch.mask.bool()], batch.packed)
    order = [4, 0, 0]
    other = cases.reorder(batch, order)
    assert torch.equal(other.hidden[other.mask.bool()], other.packed)
    assert torch.equal(cases.exact(other), cases.exact(batch)[order])
    half = cases.build(Case(4, 3, 8, rows=8), "cpu")
    assert half.hidden.shape == (3, 8, 8)
    assert half.mask.sum() == 12


def test_the_worst_text_is_the_error() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert cases.relative_error(exact + torch.tensor([[0.0, 0.0], [0.0, 0.5]]), exact) == 0.25
    assert cases.relative_error(exact * torch.nan, exact) != 0


# ---- providers

HERE = [p for p in providers.PROVIDERS if p.backend != "triton" and p.name != "segment_csr"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mix", ["queries", 3, 1])
@pytest.mark.parametrize("normalize", [False, True])
def test_providers_compute_the_mean(mix: str | int, dtype: str, normalize: bool) -> None:
    """Each formula against float64, with the engines' int32 offsets; torch.compile's by the function it compiles.

    SGLang's, which is wrong in 16 bits, in float32 alone."""
    batch = cases.build(Case(mix, 7, 32, dtype), "cpu")
    expected = cases.exact(batch) if normalize else torch.stack([one.double().mean(0) for one in _texts(batch)])
    for provider in HERE:
        if (provider.name, dtype) in {("bare C loop", "fp16"), ("SGLang", "fp16"), ("SGLang", "bf16")}:
            continue
        with backend(provider.backend):
            if provider is providers.COMPILED:
                result = providers.masked_mean(batch.hidden, batch.mask, normalize)
            else:
                result = provider.prepare(batch, normalize)()
        assert cases.relative_error(result, expected) <= WRONG_BEYOND[dtype], provider.name


def _texts(batch: cases.Batch) -> tuple[torch.Tensor, ...]:
    return batch.packed.split(batch.cu_seqlens.diff().tolist())


def test_vllm_adds_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = cases.build(TINY, "cpu")
    monkeypatch.setattr(providers, "_VLLM_CHUNK_BYTES", 3 * 4 * TINY.width)
    assert cases.relative_error(providers.vllm(batch, True)(), cases.exact(batch)) < 1e-5


def test_must_move() -> None:
    batch = cases.build(Case(2, 3, 8, rows=5), "cpu")
    moves = {p.name: providers.must_move(p, batch) for p in providers.FASTPOOL}
    tokens, result = 2 * 3 * 8 * 2, 3 * 8 * 2
    assert moves["fastpool native, mask"] == tokens + result + 3 * 5 * 8
    assert moves["fastpool native, lengths"] == moves["fastpool native, packed"] == tokens + result + 4 * 4


def test_a_backend_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "supports", lambda call: "no Triton today")
    batch = cases.build(TINY, "cpu")
    triton = next(p for p in providers.FASTPOOL if p.backend == "triton")
    with backend("triton"):
        served, reason = providers.backend_of(triton, batch)
    assert (served, reason) == ("", "no Triton today")
    assert providers.backend_of(providers.COMPILED, batch) == ("", "")


def test_readers_see_every_word() -> None:
    tensor = torch.randn(1003, 2).bfloat16()
    assert bandwidth_gpu.reads_all("torch.sum", tensor)
    bandwidth_gpu.READERS["torch.sum"](tensor)()


# ---- records


def outcome(us: float, **more: object) -> Outcome:
    return Outcome(us={"graph": Spread(us, us, us, us, 3)}, error=1e-3, launches=1, temporary_bytes=0, **more)


def result(case: Case, read_us: float, **us: float) -> Result:
    made = skipped(case)
    made.read, made.reader = Spread(read_us, read_us, read_us, read_us, 3), "torch.sum"
    made.outcomes = {name: outcome(one, must_move=made.real_bytes) for name, one in us.items()}
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
    assert again.over_read("vLLM") == 1.5
    assert again.share("SGLang") is None
    assert again.gigabytes_per_second("vLLM") == pytest.approx(made.real_bytes / 3e-6 / 1e9)


def test_wrong_is_also_what_is_no_number() -> None:
    made = result(TINY, 2.0)
    assert [made.is_wrong(Outcome(error=error)) for error in (1e-3, 0.1, float("nan"))] == [False, True, True]


def test_spreads() -> None:
    assert Spread.of([3e-6, 1e-6, 2e-6]) == Spread(2.0, 1.5, 2.5, 1.0, 3)
    assert Spread.of([1e-6]) == Spread(1.0, 1.0, 1.0, 1.0, 1)


def test_paths_name_the_machine_the_day_and_the_commit() -> None:
    path = result_path("nvidia-h200", "2027-01-02T03:04:05Z", "0123456789abcdef+changes")
    assert path.parts[-4:] == ("benchmarks", "results", "nvidia-h200", "2027-01-02-01234567-changes.json")
    assert result_path("cpu", "2027-01-02T03:04:05Z", "unknown").name == "2027-01-02-unknown.json"
    assert (
        result_path("cpu", "2027-01-02T03:04:05Z", "01234567", complete=False).name == "2027-01-02-01234567-part.json"
    )


# ---- targets


def verdict_on(found: list[targets.Verdict], start: str, backend: str) -> targets.Verdict:
    return next(v for v in found if v.goal.startswith(start) and v.backend == backend)


def test_verdicts_on_gpus() -> None:
    large, middle = Case(32768, 1, 4096), Case(512, 64, 768)
    skewed, half = Case("skewed", 256, 1024), Case(256, 256, 1024, rows=512)
    assert skewed.twin is not None
    assert half.twin is not None
    small = result(TINY, 1.0)
    small.outcomes["fastpool triton, mask"] = outcome(2.0)
    small.outcomes["fastpool triton, mask"].us["replay"] = Spread(4.0, 4.0, 4.0, 4.0, 3)
    small.outcomes["fastpool native, mask"] = outcome(2.0)
    small.outcomes["fastpool native, mask"].launches = 2
    small.outcomes["fastpool native, mask"].temporary_bytes = 2 * small.allowance
    name = "fastpool triton, mask"
    found = targets.verdicts(
        "cuda",
        [
            result(large, 50.0, **{name: 52.0}),  # 0.96
            result(middle, 10.0, **{name: 14.0}),  # 0.71
            result(skewed, 50.0, **{name: 60.0}),  # 0.83, and 1.2 times its twin's time
            result(skewed.twin, 50.0, **{name: 50.0}),
            result(half, 50.0, **{name: 50.0}),
            result(half.twin, 50.0, **{name: 49.0}),
            result(cases.FILL[-1], 50.0, **{name: 500.0}),  # no shape: does not count
            small,
        ],
        empty_replay_us=3.5,
    )
    share = verdict_on(found, "share of the read stream, 100 MB", "triton")
    assert (share.met, share.of, share.worst) == (4, 5, pytest.approx(0.8333))
    assert share.where == "skewed B256 H1024 bf16, mask"
    assert verdict_on(found, "share of the read stream, 30", "triton").met == 0
    assert verdict_on(found, "launches", "triton").met == 1
    assert verdict_on(found, "launches", "native").met == 0
    assert verdict_on(found, "replay", "triton").worst == pytest.approx(4 / 3.5, abs=1e-4)
    assert verdict_on(found, "skewed", "triton").met == 0
    assert verdict_on(found, "half padding", "triton").met == 1
    assert verdict_on(found, "temporaries", "native").worst == 2
    assert not [v for v in found if v.backend == "auto"]


def test_verdicts_on_cpus() -> None:
    large, small = Case(8192, 1, 4096), Case("queries", 32, 384, "fp32")
    ours, reference = "fastpool native, packed", "fastpool reference, packed"
    found = targets.verdicts(
        "cpu",
        [
            result(large, 10.0, **{ours: 12.0, reference: 90.0, "embedding_bag": 24.0, "bmm": 13.0}),
            result(small, 10.0, **{ours: 99.0}),
        ],
    )
    read = verdict_on(found, "time / one read", "native")
    assert (read.met, read.of, read.worst, read.where) == (0, 1, 1.2, "8192 B1 H4096 bf16, packed")
    faster = verdict_on(found, "times faster than embedding_bag", "native")
    assert (faster.met, faster.worst) == (1, 2.0)
    assert not [v for v in found if "bmm" in v.goal]  # it takes padded batches, and none of ours did here
    assert not [v for v in found if v.backend != "native"]
    tiny = targets.tiny_verdicts({"add": 1.0, "mean": 3.9, "normalized": 4.5})
    assert [(v.met, v.worst) for v in tiny] == [(1, 3.9), (0, 4.5)]


def test_verdicts_on_attention() -> None:
    """Of large cases alone, and of those where both calls have a time."""
    cases_ = [("a", 1 << 24, 1.2), ("b", 1 << 25, 1.4), ("small", 1 << 23, 9.0), ("half", 1 << 25, None)]
    us = {"mean": 10.0, "max": 20.0, "attention": 15.0, "weighted_mean": 12.0, "mean, max, cls": 21.0}
    rows = [
        {"case": name, "bytes": size, "us": us | ({"softmax_mean": 12 * ratio} if ratio else {}), "failures": {}}
        for name, size, ratio in cases_
    ]
    by_scores, by_query, several = targets.attention_verdicts(rows)
    assert (by_scores.goal, by_query.goal, several.goal) == (
        "softmax_mean / weighted_mean, 16 MiB and more ≤ 1.3", "attention / mean, 16 MiB and more ≤ 2",
        "mean, max, cls / mean or max, 16 MiB and more ≤ 1.1",
    )  # fmt: skip
    assert (by_scores.met, by_scores.of, by_scores.worst, by_scores.where) == (1, 2, 1.4, "b")
    assert (by_query.met, by_query.of, by_query.worst) == (3, 3, 1.5)
    assert (several.met, several.of, several.worst) == (3, 3, 1.05)


def test_a_provider_without_figures_does_not_count() -> None:
    failed = result(Case(32768, 1, 4096), 50.0)
    failed.outcomes["fastpool triton, mask"] = Outcome(failure="it broke", temporary_bytes=0)
    assert targets.verdicts("cuda", [failed], 1.0) == []
