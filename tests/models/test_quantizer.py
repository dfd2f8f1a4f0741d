"""Folders whose vectors are quantised at the end (pplx-embed-v1): what is read of them, and what engines do."""

from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, MEAN, model, modules, read

import fastpool
from fastpool import PoolingConfig
from fastpool.models import engines
from fastpool.models.files import Folder

QUANTIZER = "st_quantize.FlexibleQuantizer"
PPLX = {"architectures": ["PPLXQwen3Model"], "model_type": "bidirectional_pplx_qwen3", "hidden_size": 8,
        "use_bidirectional_attention": True}  # fmt: skip
FLAGS = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def files(*names: str, **more: Any) -> dict[str, Any]:
    """Modules of these names; the quantiser's is its whole type."""
    return {**model(FLAGS, **{"config": PPLX, **more}), "modules.json": modules(*names)}


def quantised(**more: Any) -> dict[str, Any]:
    return files("Transformer", "Pooling", QUANTIZER, **more)


def test_what_is_said(tmp_path):
    config = read(tmp_path, quantised(config_sentence_transformers={"similarity_fn_name": "cosine"}))
    assert (config.quantizer, config.modes, config.normalize, config.width) == ("int8_tanh", ("mean",), False, 8)
    assert config.decision("quantizer").certainty == "stated"
    assert [text for text in config.warnings if "fastpool.quantize(vectors, 'int8_tanh') the rest" in text]
    assert config.contradictions == ()  # what is not normalised is meant so
    assert engines.describe(config) == "mean, not normalised, quantised to round(127 * tanh(x))"
    assert read(tmp_path / "b", model(MEAN)).quantizer is None


def test_apply_gives_what_the_quantiser_takes(tmp_path):
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(tmp_path, quantised()).apply(hidden), fastpool.mean(hidden))


def test_behind_other_layers(tmp_path):
    config = read(tmp_path, files("Transformer", "Pooling", "Normalize", QUANTIZER))
    assert (config.normalize, config.quantizer) == (True, "int8_tanh")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((QUANTIZER, "Pooling"), r"modules\.json \[0\]: type must be what makes token states"),
        (("Transformer", QUANTIZER, "Pooling"), r"modules\.json \[1\]: type .*Quantizer reads 'sentence_embedding'"),
        (("Transformer", "Pooling", QUANTIZER, "Normalize"), r"modules\.json \[3\]: type must be nothing behind a qu"),
        (("Transformer", "Pooling", QUANTIZER, QUANTIZER), r"modules\.json \[3\]: type must be nothing behind a quant"),
        (("Transformer", "Pooling", "other.FlexibleQuantizer"), r"modules\.json \[2\]: .*; other code is not run"),
    ],
)
def test_malformed(tmp_path, names, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, files(*names))


def test_a_quantiser_that_is_none():
    with pytest.raises(ValueError, match=r"PoolingConfig: quantizer must be 'int8_tanh' or None, got 'int8'"):
        PoolingConfig(("mean",), quantizer="int8")


@pytest.mark.parametrize(
    ("config", "tei"),
    [(PPLX, '--pooling mean; in requests: {"normalize": false}'), ({**BERT, "model_type": "new"}, None)],
)
def test_engines(tmp_path, config, tei):
    wanted = read(tmp_path, quantised(config=config))
    found = {answer.engine: answer for answer in engines.answers(Folder(tmp_path), wanted)}
    settings = ["Pooling(8, 'mean'), FlexibleQuantizer()", None, None, tei, None]
    assert [answer.setting for answer in found.values()] == settings
    assert [answer.differs for answer in found.values()] == [False, True, True, True, True]
    quantising = [name for name, answer in found.items() if "quantised" in answer.by_itself]
    assert quantising == ["sentence-transformers", *(["text-embeddings-inference"] if tei else [])]
    told = [name for name, answer in found.items() if any("it quantises nothing" in note for note in answer.notes)]
    assert told == ["vLLM", "SGLang", *([] if tei else ["text-embeddings-inference"])]
    assert any("trust_remote_code" in note for note in found["sentence-transformers"].notes)


def test_a_family_that_text_embeddings_inference_quantises_unasked(tmp_path):
    wanted = read(tmp_path, {**files("Transformer", "Pooling", "Normalize"), "1_Pooling/config.json": FLAGS})
    answer = engines.answers(Folder(tmp_path), wanted)[3]
    assert (answer.by_itself, answer.setting) == ("mean, normalised, quantised to round(127 * tanh(x))", None)
