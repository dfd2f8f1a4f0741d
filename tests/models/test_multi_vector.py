"""Folders of models that give a vector of each token: what is read of them, as sentence-transformers and PyLate write
them, and what engines do."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, DENSE, NEW, OLD, model, modules, read, write
from helpers.tiny_bert import tiny_bert

import fastpool
from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models import MultiVector, engines
from fastpool.models.files import Folder

MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
PYLATE = "pylate.models.Dense.Dense"
TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
NONE = {"skiplist_words": [], "skiplist_tasks": ["document"], "keep_only_token_ids": None}
SENTENCE, MODEL = "sentence_bert_config.json", "config_sentence_transformers.json"


def entries(*types: str) -> list[dict[str, Any]]:
    names = [type_.rpartition(".")[2] for type_ in types]
    return modules(*names, types=dict(zip(names, types, strict=True)))


def written(mask: dict[str, Any] = NONE, **files: Any) -> dict[str, Any]:
    """As sentence-transformers 6 writes it."""
    return {
        "modules.json": entries(NEW["Transformer"], NEW["Dense"], MASK, NEW["Normalize"]),
        "1_Dense/config.json": {**DENSE, **TOKENS},
        "2_MultiVectorMask/config.json": mask,
        "3_Normalize/config.json": TOKENS,
        MODEL: {"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim"},
        "config.json": BERT,
    } | {f"{name}.json": content for name, content in files.items()}


SAID = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 48, "document_length": 300,
        "attend_to_expansion_tokens": True, "skiplist_words": ["two"], "do_query_expansion": True}  # fmt: skip


def pylate(**said: Any) -> dict[str, Any]:
    """As PyLate writes it, which masks and normalises by itself."""
    return {
        "modules.json": entries(OLD + "Transformer", PYLATE),
        "1_Dense/config.json": {**DENSE, "use_residual": False},
        MODEL: {"model_type": "ColBERT", "similarity_fn_name": "MaxSim", **said},
        "config.json": BERT,
    }


def test_what_sentence_transformers_says(tmp_path):
    config = read(tmp_path, written())
    assert config.multi_vector == MultiVector()
    assert (config.modes, config.layers, config.normalize, config.width) == ((), (), True, 8)
    assert [str(layer) for layer in config.token_layers] == ["Dense to 4"]
    assert config.decision("multi_vector").source == "2_MultiVectorMask/config.json"
    assert config.decision("normalize").source == "modules.json [3]: type"
    assert (config.warnings, config.contradictions) == ((), ())
    assert engines.describe(config) == "each token Dense to 4, a vector of each token, normalised"


def test_without_normalisation_and_in_another_order(tmp_path):
    files = written()
    files["modules.json"] = entries(NEW["Transformer"], MASK, NEW["Dense"], NEW["Dense"])
    files |= {"1_MultiVectorMask/config.json": {}, "2_Dense/config.json": {**DENSE, **TOKENS},
              "3_Dense/config.json": {**DENSE, "in_features": 4, "out_features": 3, **TOKENS}}  # fmt: skip
    config = read(tmp_path, files)
    assert (config.multi_vector, config.normalize, len(config.token_layers)) == (MultiVector(), False, 2)
    assert engines.describe(config).endswith("each token Dense to 3, a vector of each token, not normalised")


def test_a_dense_layer_without_names_reads_tokens(tmp_path):
    config = read(tmp_path, {**written(), "1_Dense/config.json": DENSE})
    assert [str(layer) for layer in config.token_layers] == ["Dense to 4"]


@pytest.mark.parametrize(
    ("mask", "expected", "words"),
    [
        ({"skiplist_words": ["!", "?"]}, MultiVector(("!", "?")), "(2 words left out of document texts)"),
        ({"skiplist_words": ["!"], "skiplist_tasks": "query"}, MultiVector(("!",), ("query",)),
         "(1 words left out of query texts)"),
        ({"skiplist_words": ["!"], "skiplist_tasks": ["query", "document"]}, MultiVector(("!",), ("query", "document")),
         "(1 words left out of query and document texts)"),
        ({"skiplist_words": ["!"], "skiplist_tasks": []}, MultiVector(("!",), ()), ""),
        ({"keep_only_token_ids": [5, 7]}, MultiVector(keep_only_token_ids=(5, 7)),
         "(of ids 5, 7 alone, but in queries)"),
        ({"keep_only_token_ids": []}, MultiVector(), ""),
    ],
)  # fmt: skip
def test_which_tokens_count(tmp_path, mask, expected, words):
    config = read(tmp_path, written(mask))
    assert config.multi_vector == expected
    assert str(config.multi_vector) == f"a vector of each token {words}".rstrip()
    assert config.multi_vector.counts_all == (not words)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({SENTENCE: {"query_length": 20, "document_length": 200}},
         MultiVector(query_length=20, document_length=200)),
        ({SENTENCE: {"query_length": 20, "query_expansion": {"strategy": "min", "attend": True, "length": 32}}},
         MultiVector(query_length=32, query_expansion="min", attend_to_expansion_tokens=True)),
        ({SENTENCE: {"query_expansion": None}}, MultiVector()),
    ],
)  # fmt: skip
def test_lengths_and_expansion(tmp_path, files, expected):
    assert read(tmp_path, {**written(), **files}).multi_vector == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (SAID, MultiVector(("two",), ("document",), None, "[Q] ", "[D] ", 48, 300, "fixed", True)),
        ({**SAID, "do_query_expansion": False, "attend_to_expansion_tokens": False},
         MultiVector(("two",), ("document",), None, "[Q] ", "[D] ", 48, 300)),
        ({"query_prefix": "[Q] "}, MultiVector(tuple(string.punctuation), query_prefix="[Q] ", query_length=32,
                                               query_expansion="fixed")),
        ({"skiplist_words": []}, MultiVector(query_length=32, query_expansion="fixed")),
    ],
)  # fmt: skip
def test_what_pylate_says(tmp_path, said, expected):
    config = read(tmp_path, pylate(**said))
    assert config.multi_vector == expected
    assert (config.modes, config.normalize, config.contradictions) == ((), True, ())
    assert [str(layer) for layer in config.token_layers] == ["Dense to 4"]
    assert config.decision("multi_vector").source == MODEL
    assert config.decision("normalize").source == "PyLate normalises each vector"


def test_pylate_by_its_class_alone(tmp_path):
    files = pylate(**SAID)
    del files[MODEL]["model_type"]
    assert read(tmp_path, files).multi_vector == MultiVector(("two",), ("document",), None, "[Q] ", "[D] ", 48, 300,
                                                             "fixed", True)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"2_MultiVectorMask/config.json": {"skiplist_words": "!?"}},
         r"2_MultiVectorMask/config\.json: skiplist_words must be a list of strings, got '!\?'"),
        ({"2_MultiVectorMask/config.json": {"skiplist_words": [1]}}, r"skiplist_words must be a list of strings"),
        ({"2_MultiVectorMask/config.json": {"skiplist_tasks": {"a": 1}}}, r"skiplist_tasks must be a list of strings"),
        ({"2_MultiVectorMask/config.json": {"keep_only_token_ids": [-1]}}, r"keep_only_token_ids must be a list of"),
        ({"2_MultiVectorMask/config.json": {"keep_only_token_ids": [True]}}, r"keep_only_token_ids must be a list of"),
        ({SENTENCE: {"query_expansion": {"strategy": "max", "length": 3}}},
         r"sentence_bert_config\.json: query_expansion: strategy must be one of fixed, min, got 'max'"),
        ({SENTENCE: {"query_expansion": {"strategy": "min"}}}, r"query_expansion: length must be .*got nothing"),
        ({SENTENCE: {"query_expansion": True}}, r"query_expansion must be an object, got True"),
        ({SENTENCE: {"transformer_task": "retrieval"}}, r"transformer_task must be 'feature-extraction'"),
        ({"modules.json": entries(NEW["Transformer"], MASK, MASK), "1_MultiVectorMask/config.json": NONE},
         r"modules\.json \[2\]: type must be Dense or Normalize behind MultiVectorMask"),
        ({"modules.json": entries(NEW["Transformer"], MASK, OLD + "WordWeights"),
          "1_MultiVectorMask/config.json": NONE, "2_WordWeights/config.json": {"vocab": ["a"], "word_weights": {}}},
         r"modules\.json \[2\]: type must be Dense or Normalize behind MultiVectorMask"),
        ({"modules.json": entries(NEW["Transformer"], OLD + "WeightedLayerPooling", MASK),
          "1_WeightedLayerPooling/config.json": {}}, r"modules\.json \[2\]: type must be sentence-transf.* Pooling"),
        ({"modules.json": entries(NEW["Transformer"], MASK, MASK[:-15] + "HierarchicalTokenPooling")},
         r"modules\.json \[2\]: type .*HierarchicalTokenPooling is a reduction .* which is not done here"),
        ({"modules.json": entries(NEW["Transformer"], "pylate.models.Other", MASK)},
         r"modules\.json \[1\]: type must be .*; other code is not run"),
        ({"modules.json": entries("pylate.models.Other", MASK)}, r"modules\.json \[0\]: type must be .*is not run"),
        ({"modules.json": entries(PYLATE, MASK)}, r"modules\.json \[0\]: type must be what makes token states"),
        ({"modules.json": entries(NEW["Transformer"], OLD + "WordWeights"), MODEL: {"model_type": "ColBERT"},
          "1_WordWeights/config.json": {"vocab": ["a"], "word_weights": {}}},
         r"modules\.json: expected Pooling where token states are weighted"),
        ({"1_Dense/config.json": {**DENSE, **TOKENS, "in_features": 9}}, r"1_Dense/config\.json: in_features must be"),
    ],
)  # fmt: skip
def test_malformed(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, {**written(), **changed})


def test_no_token_states(tmp_path):
    files = {**pylate(), SENTENCE: {"module_output_name": "aside"}}
    files["1_Dense/config.json"] |= {"module_input_name": "aside"}
    with pytest.raises(ValueError, match=r"modules\.json: expected a module that gives token_embeddings, got 'aside'"):
        read(tmp_path, files)


def test_a_model_type_that_says_otherwise(tmp_path):
    files = written()
    files[MODEL]["model_type"] = "SentenceTransformer"
    assert any("model_type is 'SentenceTransformer', so that" in text for text in read(tmp_path, files).contradictions)
    with pytest.raises(ValueError, match="model_type ColBERT is made for several vectors"):
        read(tmp_path / "b", model({"pooling_mode": "mean"}, config_sentence_transformers={"model_type": "ColBERT"}))


def test_who_asks_for_pooled_vectors_is_told_what_there_is(tmp_path, capsys):
    config = read(tmp_path, written())
    words = (
        r"^fastpool\.PoolingConfig\.apply: the model gives a vector of each token \(2_MultiVectorMask/config\.json\)"
    )
    with pytest.raises(ValueError, match=words + ": fastpool.tokens makes them of what token_layers make .*keep_mask"):
        config.apply(torch.zeros(1, 2, 8))
    assert main(["doctor", str(tmp_path)]) == 2
    assert f"{tmp_path}: the model gives a vector of each token" in capsys.readouterr().err


# What engines do.

VLLM = '--runner pooling --pooler-config \'{"task": "token_embed", "use_activation": true}\''
THEIRS = (
    "Dense(8, 4, ..., module_input_name='token_embeddings'), MultiVectorMask(...), Normalize(module_input_name='tok"
)


@pytest.mark.parametrize(
    ("files", "vllm"),
    [
        (written(), VLLM),
        (pylate(skiplist_words=[], do_query_expansion=False), VLLM),
        (written({"skiplist_words": ["!"]}), None),
        (written({"keep_only_token_ids": [3]}), None),
        (written(**{"sentence_bert_config": {"query_expansion": {"strategy": "fixed", "length": 32}}}), None),
        ({**written(), "1_Dense/config.json": {**DENSE, **TOKENS, "use_residual": True}}, None),
    ],
)
def test_engines(tmp_path, files, vllm):
    config = read(tmp_path, files)
    found = engines.answers(Folder(tmp_path), config)
    assert found[0].setting.startswith(THEIRS)
    assert [answer.setting for answer in found[1:]] == [vllm, None, None, None]
    assert [answer.differs for answer in found] == [False, True, True, True, True]
    assert any("skips no words and fills up no queries" in note for note in found[1].notes)


def test_inspect(tmp_path, capsys):
    pytest.importorskip("rich")
    write(tmp_path, pylate(**SAID))
    assert main(["inspect", "--check", str(tmp_path)]) == 0
    words = "a vector of each token (1 words left out of document texts), normalised: nothing against it\n"
    assert capsys.readouterr().out == f"{tmp_path}: each token Dense to 4, {words}"
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    said = next(one for one in json.loads(capsys.readouterr().out)["decisions"] if one["what"] == "multi_vector")
    assert said["value"] == {
        "skiplist_words": ["two"], "skiplist_tasks": ["document"], "keep_only_token_ids": None, "query_prefix": "[Q] ",
        "document_prefix": "[D] ", "query_length": 48, "document_length": 300, "query_expansion": "fixed",
        "attend_to_expansion_tokens": True,
    }  # fmt: skip


# The real library.

TEXTS = ["one two three", "four", "five four three two one"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def check(root: Path, encoder: Any) -> PoolingConfig:
    """The vectors of documents, by what is read of the folder, are those of sentence-transformers."""
    config = PoolingConfig.from_pretrained(root)
    with torch.no_grad():
        states = encoder[0](encoder.preprocess(TEXTS, task="document"))
    hidden, ids, mask = (states[name] for name in ("token_embeddings", "input_ids", "attention_mask"))
    for layer in config.token_layers:
        hidden = layer(hidden)
    hidden = fastpool.l2_normalize(hidden) if config.normalize else hidden
    skipped = torch.tensor(encoder.tokenizer.convert_tokens_to_ids(list(config.multi_vector.skiplist_words)))
    counts = (mask != 0) & ~torch.isin(ids, skipped.long())
    expected = encoder.encode_document(TEXTS)
    for got, kept, their in zip(hidden, counts, expected, strict=True):
        torch.testing.assert_close(got[kept], their, rtol=1e-5, atol=1e-6)
    return config


def test_what_sentence_transformers_writes(tmp_path, bert):
    theirs = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    names = {"module_input_name": "token_embeddings"}
    steps = [Transformer(str(bert)), Dense(16, 5, bias=False, activation_function=torch.nn.Identity(), **names)]
    steps += [MultiVectorMask(["two"]), Normalize(**names)]
    encoder = theirs.MultiVectorEncoder(modules=steps, device="cpu")
    encoder.save_pretrained(str(tmp_path))
    config = check(tmp_path, theirs.MultiVectorEncoder(str(tmp_path), device="cpu"))
    assert (config.multi_vector, config.normalize, config.width) == (MultiVector(("two",)), True, 16)
    assert (config.warnings, len(config.token_layers)) == ((), 1)


def test_what_sentence_transformers_makes_of_pylate(tmp_path, bert):
    theirs = pytest.importorskip("sentence_transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    files = pylate(**SAID | {"query_prefix": "", "document_prefix": "", "query_length": 8, "document_length": 16})
    files["1_Dense/config.json"] |= {"in_features": 16, "bias": False}
    del files["config.json"]
    root = write(tmp_path / "model", files)
    for file in bert.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    safetensors.save_file({"linear.weight": weight}, root / "1_Dense/model.safetensors")
    encoder = theirs.MultiVectorEncoder(str(root), device="cpu")
    config = check(root, encoder)
    expansion = encoder[0].query_expansion
    assert config.multi_vector.query_expansion == expansion["strategy"]
    assert config.multi_vector.query_length == expansion["length"]
    assert config.multi_vector.attend_to_expansion_tokens == expansion["attend"]
    assert config.multi_vector.document_length == encoder[0].document_length
