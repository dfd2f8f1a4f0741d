"""docs/benchmarks.md and README's figures are what the committed result files say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import render_markdown, report
from benchmarks.case_results import Outcome, Result, Spread
from benchmarks.plots import FIGURES, digest
from benchmarks.record import RESULTS, Record, load
from benchmarks.render_markdown import Run, between, markdown

HEAD = {
    "date": "2027-01-02T03:04:05Z",
    "commit": "0123456789abcdef",
    "device": "cpu",
    "machine": {"cpu": "A CPU", "cores": 2, "caches_bytes": {"L2": 1 << 20}},
    "versions": {"torch": "2.13.0", "triton": "unknown"},
    "method": ["How."],
    "complete": True,
}
OURS, PEER = "fastpool native, packed", "embedding_bag"


def spread(us: float) -> Spread:
    return Spread(us, us, us, us, 3)


def case(name: str, suite: str, us: dict[str, float], tokens: int = 8192, error: float = 1e-7) -> Result:
    outcomes = {one: Outcome(us={"cpu": spread(taken)}, error=error, same_bits=True) for one, taken in us.items()}
    size = tokens * 4096
    return Result(
        name, suite, "fp32", 1, 1024, tokens, tokens, size, 2 * size, 0, read=spread(100.0), outcomes=outcomes
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(render_markdown, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_the_report_is_up_to_date() -> None:
    for path, text in report.wanted().items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.report"


def test_results_are_committed_with_a_clean_commit_and_their_plots() -> None:
    for run in report.newest_of_each(RESULTS):
        assert re.fullmatch("[0-9a-f]{40}", run.record["commit"]), run.file
        assert (run.record["quality"] and run.record["end_to_end"] is not None) or run.device == "cuda", run.file
        for name in FIGURES:
            for suffix in ("svg", "png"):
                figure = run.path.with_suffix("") / f"{name}.{suffix}"
                assert figure.exists() or (name == "end_to_end" and not run.record["end_to_end"]), figure
                if suffix == "svg" and figure.exists():
                    assert digest(load(run.path)) in figure.read_text(), f"{figure} is another record's"


def test_the_newest_result_of_each_machine_counts_and_gpus_come_first(folder: Path) -> None:
    for name, date, device, complete in (
        ("cpu/a.json", "2027-01-02T00:00:00Z", "cpu", True),
        ("cpu/b.json", "2027-01-01T00:00:00Z", "cpu", True),
        ("cpu/part.json", "2027-01-03T00:00:00Z", "cpu", False),
        ("nvidia/c.json", "2026-01-01T00:00:00Z", "cuda", True),
        ("other/part.json", "2026-01-01T00:00:00Z", "cuda", False),
    ):
        Record(folder / name, {**HEAD, "date": date, "device": device, "complete": complete}).set()
    assert [run.path.name for run in report.newest_of_each(folder)] == ["c.json", "a.json"]


def test_a_run_of_one_part_is_a_report_of_one_part(folder: Path) -> None:
    record = Record(folder / "cpu" / "a.json", HEAD)
    record.set(cases=[case("one", "fill", {OURS: 120.0, PEER: 240.0})])
    text = report.render("report.md", runs=[Run(record.path)])
    assert "| 50 % | 100 µs | 120 µs | 240 µs |" in text
    assert "no complete result of a GPU yet" in text
    assert "triton" not in text  # of an unknown version
    for heading in ("### Shapes", "### Cost", "### Pooling by scores", "### Gradients", "### Quality", "None"):
        assert heading not in text


def test_pooling_by_scores(folder: Path) -> None:
    record = Record(folder / "cpu" / "a.json", HEAD)
    failures = {"flex_attention": "it broke"}
    record.set(
        attention=[
            {"case": "one", "bytes": 1 << 24, "us": {"mean": 100.0, "attention": 150.0, "SDPA": 300.0}, "failures": {}},
            {"case": "two", "bytes": 1 << 25, "us": {"mean": 200.0, "attention": 220.0}, "failures": failures},
            {"case": "three", "bytes": 1 << 25, "us": {"mean": 200.0, "SDPA": 2200.0}, "failures": failures},
        ]
    )
    text = report.render("report.md", runs=[Run(record.path)])
    assert "| case | states | mean | attention | SDPA |" in text
    assert "| one | 16.8 MB | 100 µs | 1.50 | 3.00 |" in text
    assert "| two | 33.6 MB | 200 µs | 1.10 |  |" in text
    assert "| three | 33.6 MB | 200 µs |  | 11 |" in text
    assert text.count("flex_attention: it broke") == 1


def test_figures_are_those_of_the_file(folder: Path) -> None:
    record = Record(folder / "cpu" / "a.json", HEAD)
    small = case("small", "shapes", {OURS: 900.0, PEER: 910.0}, tokens=64)  # below 16 MiB: not in the headline
    wrong = case("large", "shapes", {OURS: 110.0, PEER: 330.0})
    wrong.outcomes[PEER].error = 1.0
    mask = {"fastpool native, mask": 125.0, **dict.fromkeys(("bmm", "torch.compile", "sentence-transformers"), 1e3)}
    padded = case("larger", "shapes", {**mask, OURS: 120.0, PEER: 240.0, "vLLM": 130.0})
    calls = {"add": 1.0, "mean": 3.21, "normalized": 4.56}
    steps = [
        {"tokens": tokens, "bytes": tokens * 768, "us": {OURS: tokens * ns / 1e3}}
        for tokens, ns in ((1000, 5), (3000, 2), (10**6, 7))
    ]
    quality = {OURS: {"sums": {"fine": True, "gave": "right"}}, PEER: {"sums": {"fine": False, "gave": "inf"}}}
    record.set(
        cases=[small, wrong, padded],
        tiny_us={"inference mode": calls},
        growth=steps,
        quality=quality,
        quality_about={"sums": "are sums"},
    )
    run = Run(record.path)
    headline = report.render("readme.md", run=run)
    assert "1.10 to 1.20 packed, 1.25 padded" in headline
    assert "`F.embedding_bag` on the same packed tokens, as a multiple of fastpool's time | 2.0 to 3.0 |" in headline
    assert "3.2; 4.6 with `normalize=True`" in headline
    assert "2 batches" in headline
    assert "(commit 01234567," in headline
    text = report.render("report.md", runs=[run])
    assert "| large | 33.6 MB | 336 | 1.10 | 3.30 (wrong) |" in text.replace("|  |", "|").replace("  ", " ")
    assert "| 1,000,000 | 768 MB | 7 ms | 7 ns |" in text
    assert "**inf**" in text
    assert "- sums: are sums" in text
    bends = run.bends()
    assert bends is not None
    assert [bends[key] for key in ("first_cost", "cheapest", "least")] == ["5", "3,000", "2"]
    assert [bends[key] for key in ("before", "after", "outside")] == ["3,000", "1,000,000", "7.0"]
    run.record["growth"] = steps[:2]
    assert run.bends() is None  # all of it in the cache


def test_words() -> None:
    assert between([1.234, 1.111]) == "1.11 to 1.23"
    assert between([125.4, 2.31]) == "2.3 to 125"
    assert between([3.0, 3.0]) == "3.0"
    assert markdown(["a", "b"], [(1, 2)]) == "| a | b |\n|---|---:|\n| 1 | 2 |"


def test_the_readme_needs_its_block() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_headline(text, "new\n") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="one block"):
        report.with_headline("nothing", "new")


def test_what_was_written_is_what_is_read(folder: Path) -> None:
    record = Record(folder / "cpu" / "a.json", HEAD)
    record.set(cases=[], more=float("inf"))
    assert json.loads(record.path.read_text())["more"] == "inf"
