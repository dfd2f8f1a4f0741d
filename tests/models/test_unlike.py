"""Folders that want something else than pooling by a formula: an error that says what they are and what to do."""

import pytest
from helpers.model_folders import BERT, MEAN, OLD, model, modules, read


@pytest.mark.parametrize(
    ("type_", "words"),
    [
        (OLD + "Router", "a router between towers"),
        (OLD + "Asym", "a router between towers"),
        ("sentence_transformers.base.modules.router.Router", "a router between towers"),
        ("sentence_transformers.sparse_encoder.models.SparseAutoEncoder", "made for sparse vectors; .*SparseEncoder"),
        ("sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask", "late interaction"),
        ("sentence_transformers.multi_vector_encoder.modules.token_pooling.LambdaTokenPooling", "late interaction"),
        ("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", "a cross-encoder's"),
        ("pylate.models.Dense.Dense", "late interaction"),
        (OLD + "StaticEmbedding", "a table of word vectors"),
        (OLD + "CLIPModel", "a CLIP model"),
        (OLD + "CNN", "a convolution"),
        (OLD + "LSTM", "a recurrent network"),
        (OLD + "BoW", "a bag of words"),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_modules_that_want_something_else(tmp_path, type_, words, at):
    entries = modules("Transformer", "Pooling")
    entries.insert(at, {"type": type_, "path": ""})
    with pytest.raises(ValueError, match=rf"modules\.json \[{at}\]: type .* is .*{words}"):
        read(tmp_path, {**model(MEAN), "modules.json": entries})


@pytest.mark.parametrize("family", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"])
def test_families_that_want_something_else(tmp_path, family):
    files = model(MEAN, config_sentence_transformers={"model_type": family})
    with pytest.raises(ValueError, match=rf"config_sentence_transformers\.json: model_type {family} is .*{family}"):
        read(tmp_path, files)
    files["config_sentence_transformers.json"] = {"model_type": "SentenceTransformer"}
    assert read(tmp_path, files).modes == ("mean",)


def test_a_reranker(tmp_path):
    transformer = {**BERT, "architectures": ["BertForSequenceClassification"]}
    with pytest.raises(
        ValueError, match=r"config\.json: architectures: BertFor.* cross-encoder \(reranker\).*CrossEncoder"
    ):
        read(tmp_path / "a", {"config.json": transformer})
    assert read(tmp_path / "b", model(MEAN, config=transformer)).modes == ("mean",)  # as it says


def test_colbert(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: architectures: HF_ColBERT is made for several vectors"):
        read(tmp_path / "a", {"config.json": {**BERT, "architectures": ["HF_ColBERT"]}})
    with pytest.raises(ValueError, match=r"similarity_fn_name MaxSim is made for several vectors"):
        read(tmp_path / "b", model(MEAN, config_sentence_transformers={"similarity_fn_name": "MaxSim"}))


def test_matryoshka_by_matrices(tmp_path):
    files = {**model(MEAN), "projections.safetensors": "-"}
    config = read(tmp_path, files)
    assert any("projections.safetensors" in text and "leave truncate_dim" in text for text in config.warnings)
    files["config_sentence_transformers.json"] = {"truncate_dim": 4}
    with pytest.raises(ValueError, match=r"truncate_dim must be left out, .*projections\.safetensors.*got 4"):
        read(tmp_path, files)


def test_a_contextual_head(tmp_path):
    with pytest.raises(ValueError, match=r"contextual_head\.safetensors: .*spans"):
        read(tmp_path, {**model(MEAN), "contextual_head.safetensors": "-"})


def test_states_that_are_logits(tmp_path):
    files = model(MEAN, sentence_bert_config={"transformer_task": "fill-mask"})
    with pytest.raises(ValueError, match=r"sentence_bert_config\.json: transformer_task must be 'feature-extraction'"):
        read(tmp_path, files)
