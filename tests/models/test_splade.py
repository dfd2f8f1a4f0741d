"""Folders of SPLADE models: what is read of them, as sentence-transformers 6 and 5 write them, and what engines do."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, MEAN, NEW, OLD, modules, read, write
from helpers.tiny_bert import sparse_encoder, tiny_masked_bert

import fastpool
from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models import Splade, engines
from fastpool.models.files import Folder

SPARSE = "sentence_transformers.sparse_encoder."
MASKED = {**BERT, "architectures": ["BertForMaskedLM"], "vocab_size": 9}
SPLADE = {"pooling_strategy": "max", "activation_function": "relu", "embedding_dimension": None}


def entries(*types: str) -> list[dict[str, Any]]:
    names = [type_.rpartition(".")[2] for type_ in types]
    return modules(*names, types=dict(zip(names, types, strict=True)))


def newer(config: dict[str, Any] = MASKED, **said: Any) -> dict[str, Any]:
    """As sentence-transformers writes it from 5.4 on."""
    return {
        "modules.json": entries(NEW["Transformer"], SPARSE + "modules.splade_pooling.SpladePooling"),
        "1_SpladePooling/config.json": {**SPLADE, **said},
        "sentence_bert_config.json": {"transformer_task": "fill-mask", "module_output_name": "token_embeddings"},
        "config_sentence_transformers.json": {"model_type": "SparseEncoder", "similarity_fn_name": "dot"},
        "config.json": config,
    }


def older(**said: Any) -> dict[str, Any]:
    """The same before 5.4."""
    return {
        **newer(),
        "modules.json": entries(SPARSE + "models.MLMTransformer", SPARSE + "models.SpladePooling"),
        "1_SpladePooling/config.json": {"pooling_strategy": "max", "word_embedding_dimension": 9, **said},
        "sentence_bert_config.json": {"max_seq_length": 7, "do_lower_case": False},
    }


@pytest.mark.parametrize("layout", [newer, older])
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_what_is_said(tmp_path, layout, pooling, activation):
    files = layout(pooling_strategy=pooling, activation_function=activation)
    config = read(tmp_path, files)
    assert config.sparse == Splade(pooling, activation)
    assert (config.modes, config.layers, config.normalize, config.truncate_dim) == ((), (), False, None)
    assert (config.width, config.architecture, config.warnings) == (9, "BertForMaskedLM", ())
    decision = config.decision("sparse")
    assert (decision.source, decision.certainty) == ("1_SpladePooling/config.json", "stated")


def test_what_is_left_out_is_sentence_transformers_default(tmp_path):
    files = {**newer(), "1_SpladePooling/config.json": {}}
    assert read(tmp_path, files).sparse == Splade("max", "relu")


def test_how_many_weights_are_kept(tmp_path):
    files = newer()
    files["config_sentence_transformers.json"]["max_active_dims"] = 64
    config = read(tmp_path, files)
    assert config.sparse == Splade(max_active_dims=64)
    assert engines.describe(config) == "sparse, max over tokens of log1p(relu(logit)), the 64 largest"


@pytest.mark.parametrize(
    ("config", "said", "width", "words"),
    [
        ({}, 9, 9, None),
        ({}, None, None, None),
        (MASKED, 8, 9, "1_SpladePooling/config.json says 8 columns, but config.json: vocab_size says 9"),
    ],
)
def test_the_width_is_that_of_the_logits(tmp_path, config, said, width, words):
    found = read(tmp_path, newer(config, embedding_dimension=said))
    assert found.width == width
    assert [words in text for text in found.warnings] == ([True] if words else [])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"1_SpladePooling/config.json": {"pooling_strategy": "mean"}},
         r"1_SpladePooling/config\.json: pooling_strategy must be one of max, sum, got 'mean'"),
        ({"1_SpladePooling/config.json": {"activation_function": ["relu"]}},
         r"activation_function must be one of relu, log1p_relu, got \['relu'\]"),
        ({"1_SpladePooling/config.json": {**SPLADE, "embedding_dimension": 0}}, r"embedding_dimension must be .*got 0"),
        ({"config_sentence_transformers.json": {"max_active_dims": -1}}, r"max_active_dims must be .*got -1"),
        ({"sentence_bert_config.json": {}}, r"transformer_task must be 'fill-mask', .*logits.*got nothing"),
        ({"sentence_bert_config.json": {"transformer_task": "feature-extraction"}}, r"got 'feature-extraction'"),
        ({"modules.json": entries(SPARSE + "models.SpladePooling")},
         r"modules\.json \[0\]: type .*SpladePooling is SPLADE's, which must stand alone behind what gives logits"),
        ({"modules.json": entries(NEW["Transformer"], SPARSE + "models.SpladePooling", OLD + "Normalize")},
         r"modules\.json \[1\]: type .*SpladePooling is SPLADE's, which must stand alone behind what gives logits"),
        ({"modules.json": entries(NEW["Transformer"], OLD + "Pooling", SPARSE + "models.SpladePooling"),
          "1_Pooling/config.json": MEAN}, r"modules\.json \[2\]: type .*SpladePooling is SPLADE's, which must stand"),
        ({"modules.json": entries(SPARSE + "models.MLMTransformer", OLD + "Pooling"), "1_Pooling/config.json": MEAN,
          "config_sentence_transformers.json": {}},
         r"modules\.json \[0\]: type must be sentence-transformers' Transformer, which gives token states and not log"),
    ],
)  # fmt: skip
def test_malformed(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, {**newer(), **changed})


def test_a_file_is_missing(tmp_path):
    files = newer()
    del files["1_SpladePooling/config.json"]
    with pytest.raises(FileNotFoundError, match=r"1_SpladePooling/config\.json is missing"):
        read(tmp_path, files)


def test_a_model_type_that_says_otherwise(tmp_path):
    files = newer()
    files["config_sentence_transformers.json"]["model_type"] = "SentenceTransformer"
    assert any("model_type is 'SentenceTransformer', so that" in text for text in read(tmp_path, files).contradictions)


def test_who_asks_for_pooled_vectors_is_told_what_there_is(tmp_path):
    config = read(tmp_path, newer(pooling_strategy="sum", activation_function="log1p_relu"))
    words = (
        r"^fastpool\.PoolingConfig\.apply: the model gives sparse vectors \(1_SpladePooling/config\.json\): "
        r"fastpool\.splade\(logits, mask, pooling='sum', activation='log1p_relu'\) makes them of the logits of its "
        r"language model's head$"
    )
    with pytest.raises(ValueError, match=words):
        config.apply(torch.zeros(1, 2, 9))


# What engines do.


def answers(root: Path, files: dict[str, Any]) -> dict[str, engines.EngineReport]:
    config = read(root, files)
    return {answer.engine: answer for answer in engines.answers(Folder(root), config)}


VLLM = '{"architectures": ["BertSpladeSparseEmbeddingModel"]'


@pytest.mark.parametrize(
    ("files", "theirs", "vllm", "tei"),
    [
        (newer(), "SpladePooling('max', 'relu')", f"--hf-overrides '{VLLM}}}'", "--pooling splade; POST /embed_sparse"),
        (newer(pooling_strategy="sum"), "SpladePooling('sum', 'relu')", None, None),
        (newer(activation_function="log1p_relu"), "SpladePooling('max', 'log1p_relu')", None, None),
        (newer({**MASKED, "architectures": ["DistilBertForMaskedLM"], "model_type": "distilbert"}),
         "SpladePooling('max', 'relu')", None, "--pooling splade; POST /embed_sparse"),
        (newer({**MASKED, "architectures": ["MPNetForMaskedLM"], "model_type": "mpnet"}),
         "SpladePooling('max', 'relu')", None, None),
        (newer({**MASKED, "cls_token_id": 101, "sep_token_id": 102}), "SpladePooling('max', 'relu')",
         f"--hf-overrides '{VLLM}, \"cls_token_id\": null, \"sep_token_id\": null}}'",
         "--pooling splade; POST /embed_sparse"),
        ({**newer(), "config_sentence_transformers.json": {"model_type": "SparseEncoder", "max_active_dims": 8}},
         "SpladePooling('max', 'relu'); encode(..., max_active_dims=8)", None, None),
    ],
)  # fmt: skip
def test_engines(tmp_path, files, theirs, vllm, tei):
    found = answers(tmp_path, files)
    settings = [theirs, vllm, None, tei, None]
    assert [answer.setting for answer in found.values()] == settings
    assert [answer.differs for answer in found.values()] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({}, "(here neither)"),
        ({"cls_token_id": 101, "sep_token_id": None}, "(here cls_token_id)"),
        ({"cls_token_id": 0, "sep_token_id": 2}, "(here cls_token_id and sep_token_id)"),
    ],
)
def test_who_leaves_cls_and_sep_out(tmp_path, ids, words):
    found = answers(tmp_path, newer({**MASKED, **ids}))
    assert any("leaves CLS and SEP out where" in note and words in note for note in found["vLLM"].notes)
    for engine in ("sentence-transformers", "text-embeddings-inference"):
        assert any("keeps CLS and SEP" in note for note in found[engine].notes)


def test_what_sentence_transformers_does_not_load(tmp_path):
    files = newer(top_k=3)
    del files["config_sentence_transformers.json"]
    notes = answers(tmp_path, files)["sentence-transformers"].notes
    assert any("['top_k']: it does not load a folder with other keys" in note for note in notes)
    assert any("untrained SparseAutoEncoder" in note for note in notes)


def test_inspect(tmp_path, capsys):
    pytest.importorskip("rich")
    write(tmp_path, newer())
    assert main(["inspect", "--check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}: sparse, max over tokens of log1p(relu(logit)): nothing against it\n"
    )
    assert main(["inspect", str(tmp_path)]) == 0
    assert "activation: 'relu'" in capsys.readouterr().out


# The real library.

TEXTS = ["one two three", "four", "five four three two one"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    return tiny_masked_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(("pooling", "activation"), [("max", "relu"), ("sum", "relu"), ("max", "log1p_relu")])
def test_what_sentence_transformers_writes(tmp_path, masked, pooling, activation):
    """And by what is read of it, its vectors."""
    theirs = pytest.importorskip("sentence_transformers")
    sparse_encoder(masked, pooling, activation).save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PoolingConfig.from_pretrained(tmp_path)
    assert (config.sparse, config.width) == (Splade(pooling, activation), 10)
    encoder = theirs.SparseEncoder(str(tmp_path), device="cpu")
    expected = encoder.encode(TEXTS, convert_to_sparse_tensor=False)
    with torch.no_grad():
        states = encoder[0](encoder.preprocess(TEXTS))
    logits, mask = states["token_embeddings"], states["attention_mask"]
    assert logits.shape[-1] == config.width
    assert config.sparse is not None
    got = fastpool.splade(logits, mask, pooling=config.sparse.pooling, activation=config.sparse.activation)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert expected.count_nonzero() > 0
