"""`fastpool inspect` of several folders, and --check, which people put into their deployment pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.model_folders import BERT, QWEN, model, write

from fastpool.cli import main
from fastpool.models import engines

FLAGS = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.fixture
def good(tmp_path) -> Path:
    """One that every reader but SGLang pools as it says."""
    return write(tmp_path / "good", model(FLAGS, "Normalize"))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_nothing_against_it(good, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # needs nothing but fastpool
    assert main(["inspect", "--check", str(good)]) == 0
    assert lines(capsys) == [f"{good}: mean, normalised: nothing against it"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config.json": BERT}, ["a guess: modes mean, as config.json: architectures (BertModel)",
                                 "a guess: normalize no, as modules.json is missing"]),
        (model(FLAGS, "Normalize", config=QWEN), ["a contradiction: mean pooling of a causal model"]),
        # Only some readers look at it, and none when it pools.
        (model({**FLAGS, "word_embedding_dimension": 7}, "Normalize"), []),
    ],
)  # fmt: skip
def test_guesses_and_contradictions(tmp_path, capsys, files, told):
    root = write(tmp_path, files)
    assert main(["inspect", "--check", str(root)]) == (1 if told else 0)
    found = lines(capsys)
    assert len(found) == 1 + len(told)
    for line, words in zip(found[1:], told, strict=True):
        assert line.startswith(f"  {words}")


@pytest.mark.parametrize(
    ("names", "status", "told"),
    [
        (["vLLM"], 0, []),
        (["vllm", "TEXT-embeddings-inference"], 0, []),
        (["SGLang"], 1, ["  SGLang differs: cls, normalised; no setting gives the folder's pooling"]),
        (["sentence-transformers", "sglang"], 1, ["  SGLang differs: cls, normalised; no setting"]),
    ],
)
def test_engines_that_are_named(good, capsys, names, status, told):
    arguments = [word for name in names for word in ("--engine", name)]
    assert main(["inspect", "--check", str(good), *arguments]) == status
    found = lines(capsys)[1:]
    assert len(found) == len(told)
    assert all(line.startswith(words) for line, words in zip(found, told, strict=True))


def test_the_setting_that_an_engine_needs(tmp_path, capsys):
    root = write(tmp_path, model(FLAGS))  # not normalised
    assert main(["inspect", "--check", str(root), "--engine", "llama.cpp"]) == 1
    assert lines(capsys)[1] == "  llama.cpp differs: mean, normalised; needs --pooling mean --embd-normalize -1"


def test_an_engine_that_nobody_knows(good, capsys):
    assert main(["inspect", "--check", str(good), "--engine", "vLMM"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"fastpool inspect: --engine: expected one of {', '.join(engines.NAMES)}, got 'vLMM'\n")


def test_several_folders(good, tmp_path, capsys):
    """One that cannot be read stops no other, and 2 outdoes 1."""
    guess, none = write(tmp_path / "guess", {"config.json": BERT}), tmp_path / "none"
    assert main(["inspect", "--check", str(good), str(none), str(guess)]) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line[0] != " "] == [
        f"{good}: mean, normalised: nothing against it",
        f"{guess}: mean, not normalised",
    ]
    assert err.startswith(f"fastpool inspect: {none}: {none} does not exist; expected the folder of a model")
    assert main(["inspect", "--check", str(good), str(guess)]) == 1


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_json(good, tmp_path, capsys, check):
    """An object, of several a list; problems where they are asked for."""
    guess, none = write(tmp_path / "guess", {"config.json": BERT}), tmp_path / "none"
    assert main(["inspect", "--json", *check, str(good), "--engine", "vllm"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert [engine["engine"] for engine in one["engines"]] == ["vLLM"]
    assert main(["inspect", "--json", *check, str(good), str(none), str(guess)]) == 2
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [each["model"] for each in found] == [str(good), str(none), str(guess)]
    assert "does not exist" in found[1]["error"]
    assert [len(each["problems"]) for each in (one, found[0], found[2])] == [0, 0, 2] if check else True
    assert ("problems" in one) == bool(check)
    assert main(["inspect", "--json", *check, str(none)]) == 2
    assert capsys.readouterr().out == ""


def test_tables_of_several(good, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(good), str(good), "--engine", "sglang"]) == 0
    out = capsys.readouterr().out
    assert (out.count("SGLang"), out.count("vLLM")) == (2, 0)


def test_what_a_folder_says_does_nothing_to_the_terminal(tmp_path, capsys):
    root = write(tmp_path, {"config.json": {**BERT, "architectures": ["\033[2JBert\ud800"]}})
    assert main(["inspect", "--check", str(root)]) == 1
    assert r"architectures (\x1b[2JBert\ud800)" in lines(capsys)[1]
    write(tmp_path, {"config.json": {**BERT, "pooling": "\033[2J"}})
    assert main(["inspect", "--check", str(root)]) == 2
    assert "\033" not in capsys.readouterr().err
