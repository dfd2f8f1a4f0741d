"""Model folders as people have them: what they state where, what they imply, and what they want instead of pooling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, DENSE, MEAN, NEW, OLD, QWEN, model, modules, read, steps, write

from fastpool import PoolingConfig

T5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 1024}
ADAPTER = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}


def about(config: PoolingConfig) -> tuple[Any, str, str]:
    decision = config.decision("modes")
    return config.modes, decision.certainty, decision.source


# Columns.


@pytest.mark.parametrize(
    ("number", "transformer", "dense", "width", "words"),
    [
        (768, T5, 1024, 1024, "word_embedding_dimension says 768, but config.json: d_model says 1024, which is follow"),
        (8, {**BERT, "hidden_size": 9}, 8, 8, "config.json: hidden_size says 9, but 1_Pooling/config.json"),
        (7, BERT, None, 8, "word_embedding_dimension says 7, but config.json: hidden_size says 8, which is followed"),
        (768, {}, 1024, 1024, "says 768, but 2_Dense/config.json: in_features says 1024, which is followed"),
        (None, {}, 1024, 1024, None),
        (768, {}, None, 768, None),
        (None, {}, None, None, None),
        (8, {"text_config": BERT}, None, 8, None),
        (None, {"text_config": {"n_embd": 5}}, None, 5, None),
        (768, {"model_type": "embedding_gemma2", "text_config": {"model_type": "embedding_gemma2_text",
               "hidden_size": 512, "embedding_dim": 768}}, None, 768, None),
        (768, {"model_type": "embedding_gemma2_text", "hidden_size": 512, "embedding_dim": 768}, None, 768, None),
        (768, {"hidden_size": 512, "word_embed_proj_dim": 768}, None, 768, None),
    ],
)  # fmt: skip
def test_the_width(tmp_path, number, transformer, dense, width, words):
    """What the transformer says, unless a layer takes what the Pooling module says; what nobody reads is a warning."""
    pooling = {"pooling_mode": "mean"} | ({} if number is None else {"word_embedding_dimension": number})
    files = model(pooling, *(["Dense"] if dense else []), config=transformer)
    if dense:
        files["2_Dense/config.json"] = {**DENSE, "in_features": dense, "out_features": 4}
    config = read(tmp_path, files)
    assert (config.modes, config.width) == (("mean",), width)
    assert [words in text for text in config.warnings] == ([True] if words else [])
    assert config.contradictions == ()


def test_two_facts_against_a_layer_are_an_error(tmp_path):
    files = {**model(MEAN, "LayerNorm"), "2_LayerNorm/config.json": {"dimension": 9}}
    files["modules.json"][2]["type"] = OLD + "LayerNorm"
    with pytest.raises(
        ValueError, match=r"2_LayerNorm/config\.json: dimension must be 8, the columns before it, got 9"
    ):
        read(tmp_path, files)


# Pooling that is stated elsewhere.


@pytest.mark.parametrize(
    ("said", "mode", "include_prompt"),
    [
        ({"pooling_mode": "mean", "max_length": 512, "skip_instruction": True}, "mean", False),
        ({"pooling_mode": "mean", "skip_instruction": False}, "mean", True),
        ({"pooling_mode": "weighted_mean"}, "weighted_mean", False),
        ({"pooling_mode": "eos_token"}, "last", False),
        ({"pooling_mode": "last_token"}, "last", False),
        ({"pooling_mode": "bos_token"}, "cls", True),  # the first token, whatever is skipped
        ({}, "mean", False),  # LLM2Vec's defaults
    ],
)
@pytest.mark.parametrize("files", [{"config.json": QWEN}, {"adapter_config.json": ADAPTER}])
def test_llm2vec(tmp_path, said, mode, include_prompt, files):
    config = read(tmp_path, {**files, "llm2vec_config.json": said})
    assert about(config) == ((mode,), "stated", "llm2vec_config.json: pooling_mode")
    assert (config.include_prompt, config.prompt_counts) == (include_prompt, include_prompt)
    assert (config.normalize, config.padding_side, config.max_length) == (False, "left", said.get("max_length"))
    assert {config.decision(what).certainty for what in ("normalize", "padding_side", "include_prompt")} == {"stated"}
    assert config.contradictions == ()  # LLM2Vec's code makes it bidirectional, and knows where it pads
    assert any("behind the first token (BOS)" in text for text in config.warnings) == (not include_prompt)


def test_llm2vec_counts_from_behind_the_instruction(tmp_path):
    """Its weights do; sentence-transformers' do not."""
    config = read(tmp_path, {"config.json": {}, "llm2vec_config.json": {"pooling_mode": "weighted_mean"},
                             "adapter_config.json": ADAPTER})  # fmt: skip
    hidden, starts = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 3])
    expected = [
        (torch.arange(1.0, 7 - start)[:, None] * hidden[i, start:]).sum(0) / torch.arange(1.0, 7 - start).sum()
        for i, start in enumerate(starts.tolist())
    ]
    torch.testing.assert_close(config.apply(hidden, starts=starts), torch.stack(expected), rtol=1e-6, atol=1e-6)


NEMOTRON = {"architectures": ["LlamaBidirectionalModel"], "model_type": "llama_bidirec", "hidden_size": 8,
            "auto_map": {"AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel"}}  # fmt: skip


@pytest.mark.parametrize(
    ("transformer", "mode", "key"),
    [
        ({**NEMOTRON, "pooling": "avg"}, "mean", "pooling"),
        ({**NEMOTRON, "pooling": "cls"}, "cls", "pooling"),
        ({**NEMOTRON, "pooling": "last"}, "last", "pooling"),
        ({**NEMOTRON, "pooling": "weighted_avg"}, "weighted_mean", "pooling"),
        ({**QWEN, "pooling_type": "MEAN"}, "mean", "pooling_type"),
        ({**BERT, "emb_pooler": "mean", "auto_map": {"AutoModel": "x.Y"}}, "mean", "emb_pooler"),
        ({**QWEN, "single_vector_pool_strategy": "mean"}, "mean", "single_vector_pool_strategy"),
        ({**QWEN, "sentence_pooling_method": "last_token"}, "last", "sentence_pooling_method"),
        ({"text_config": {**QWEN, "pooling": "eos"}}, "last", "text_config: pooling"),
    ],
)
def test_keys_of_the_model_s_own_code(tmp_path, transformer, mode, key):
    assert about(read(tmp_path, {"config.json": transformer})) == ((mode,), "stated", f"config.json: {key}")


@pytest.mark.parametrize(
    "transformer",
    [
        {"architectures": ["FunnelModel"], "model_type": "funnel", "pooling_type": "max"},  # between its blocks
        {"architectures": ["CohereCompassModel"], "model_type": "cohere_compass", "pooling": "bos"},  # of a classifier
        {**BERT, "pooler_type": "first_token_transform"},  # of models tuned from Google's BERT, whatever they pool
        {**BERT, "classifier_pooling": "cls"},
        {**BERT, "emb_pooler": None},
    ],
)
def test_keys_that_say_something_else(tmp_path, transformer):
    assert about(read(tmp_path, {"config.json": transformer}))[:2] == (("mean",), "guessed")


def test_a_word_that_is_no_pooling_by_a_formula(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: pooling must be one of mean, avg, .*got 'colbert'"):
        read(tmp_path, {"config.json": {**NEMOTRON, "pooling": "colbert"}})


def test_statements_that_contradict_each_other(tmp_path):
    config = read(tmp_path / "a", model(MEAN, config={**BERT, "pooling": "cls"}))
    assert about(config)[:2] == (("mean",), "stated")
    assert [text.startswith("config.json: pooling says cls, 1_Pooling/config.json: pooling_mode says mean")
            for text in config.contradictions] == [True]  # fmt: skip
    config = read(tmp_path / "b", {"config.json": {**BERT, "pooling": "cls", "emb_pooler": "mean"}})
    assert config.modes == ("cls",)
    assert config.contradictions == (
        "config.json: emb_pooler says mean, config.json: pooling says cls, which is followed",
    )
    assert read(tmp_path / "c", model(MEAN, config={**BERT, "pooling": "avg"})).contradictions == ()


@pytest.mark.parametrize(
    ("files", "mode", "words"),
    [
        ({"adapter_config.json": ADAPTER}, "mean", "the folder is an adapter of some/base"),
        ({"adapter_config.json": ADAPTER, "config.json": QWEN}, "last", "the folder is an adapter of some/base"),
        ({"adapter_config.json": {**ADAPTER, "auto_mapping": {"base_model_class": "MistralModel",
          "parent_library": "transformers.models.mistral.modeling_mistral"}}}, "last", "adapter of some/base"),
        ({"config.json": {**QWEN, "auto_map": {"AutoModel": "modeling_x.XModel"}}}, "last", "code (modeling_x.XModel)"),
        ({"config.json": {**BERT, "auto_map": {"AutoModel": "modeling_x.XModel"}}}, "mean", "code (modeling_x.XModel)"),
    ],
)  # fmt: skip
def test_what_the_architecture_does_not_imply(tmp_path, files, mode, words):
    """Of an adapter and of a model with code of its own, the pooling is a guess."""
    config = read(tmp_path, files)
    assert about(config)[:2] == ((mode,), "guessed")
    assert any(text.startswith("the pooling is a guess") and words in text for text in config.warnings)
    with pytest.warns(UserWarning, match="the pooling is a guess"):
        PoolingConfig.from_pretrained(tmp_path)


def test_code_of_its_own_beside_a_pooling_that_is_left_over(tmp_path):
    transformer = {**BERT, "auto_map": {"AutoModel": "modeling_x.XModel"}}
    config = read(tmp_path, {"config.json": transformer, "1_Pooling/config.json": MEAN})
    assert about(config)[:2] == (("mean",), "implied")
    assert "the model's own code (modeling_x.XModel), which is not run here, may pool in its own way" in config.warnings
    write(tmp_path, {"modules.json": modules("Transformer", "Pooling")})
    assert PoolingConfig.from_pretrained(tmp_path).warnings == ()


def test_a_class_for_the_configuration_alone_pools_nothing(tmp_path):
    config = read(tmp_path, {"config.json": {**QWEN, "auto_map": {"AutoConfig": "configuration_x.XConfig"}}})
    assert about(config)[:2] == (("last",), "implied")


def test_an_adapter_with_a_pooling_module(tmp_path):
    files = {**model(MEAN), "adapter_config.json": ADAPTER}
    del files["config.json"]
    config = read(tmp_path, files)
    assert about(config)[:2] == (("mean",), "stated")
    assert [text for text in config.warnings if "adapter of some/base, which is not read" in text] == list(
        config.warnings
    )


# modules.json.


def test_modules_without_modules_json(tmp_path):
    """Their folders tell what they were; what has none, as Normalize may, is a guess."""
    files = {**model(MEAN, "Dense"), "2_Dense/config.json": DENSE}
    del files["modules.json"]
    config = read(tmp_path / "a", {**files, "2024_results/x.json": {}})
    assert (config.modes, [str(layer) for layer in config.layers]) == (("mean",), ["Dense to 4"])
    assert (config.decision("layers").certainty, config.decision("normalize").certainty) == ("implied", "guessed")
    assert any("1_Pooling/config.json, 2_Dense is followed here" in text for text in config.contradictions)
    config = read(tmp_path / "b", {**files, "3_Normalize/config.json": {}})
    assert (config.normalize, config.decision("normalize").certainty) == (True, "implied")
    assert config.decision("normalize").source == "modules.json is missing, 3_Normalize: type"
    with pytest.raises(ValueError, match=r"modules\.json is missing, 1_SpladePooling: type .* is SPLADE's"):
        read(tmp_path / "c", {**files, "1_SpladePooling/config.json": {}})
    (tmp_path / "a/1_Pooling/config.json").unlink()
    (tmp_path / "a/1_Pooling/config.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json: expected a file, got a broken link"):
        PoolingConfig.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("home", ["0_Transformer", "a/b"])
def test_a_transformer_in_a_folder_of_its_own(tmp_path, home):
    entries = modules("Transformer", "Pooling")
    entries[0]["path"] = home
    files = {
        "modules.json": entries,
        "1_Pooling/config.json": {"pooling_mode": "mean"},
        f"{home}/config.json": QWEN,
        f"{home}/tokenizer_config.json": {"padding_side": "left", "model_max_length": 99},
        f"{home}/sentence_xlnet_config.json": {"max_seq_length": 33},
        "config.json": {**BERT, "hidden_size": 9},  # of something else
        "tokenizer_config.json": {"padding_side": "up"},
    }
    config = read(tmp_path, files)
    assert (config.width, config.architecture, config.padding_side) == (8, "Qwen2ForCausalLM", "left")
    assert config.max_length == 33
    assert config.decision("max_length").source == f"{home}/sentence_xlnet_config.json: max_seq_length"
    assert config.decision("width").source == f"{home}/config.json: hidden_size"
    assert any("mean pooling of a causal model" in text for text in config.contradictions)


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({"sentence_bert_config": {"max_seq_length": 20}, "config": {**BERT, "max_position_embeddings": 8}}, 20),
        ({"sentence_bert_config": {"max_seq_length": 20, "processor_kwargs": {"model_max_length": 7}}}, 7),
        ({"tokenizer_config": {"model_max_length": 99}, "config": {**BERT, "max_position_embeddings": 32}}, 32),
        ({"tokenizer_config": {"model_max_length": 9}, "config": {**BERT, "max_position_embeddings": 32}}, 9),
        ({"config": {**BERT, "max_position_embeddings": 32}}, 32),
        ({"config": {**BERT, "max_position_embeddings": -1}}, None),  # XLNet's
    ],
)
def test_how_long_a_text_may_be(tmp_path, files, length):
    config = read(tmp_path, model(MEAN, **files))
    assert (config.max_length, config.warnings) == (length, ())


def test_prompts_that_are_always_there(tmp_path):
    files = model(MEAN, config_sentence_transformers={"default_prompt_name": "document"})
    assert read(tmp_path, files).default_prompt_name == "document"


@pytest.mark.parametrize("name", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_old_names_of_the_sentence_file(tmp_path, name):
    files = {**model(MEAN), f"sentence_{name}_config.json": {"max_seq_length": 44}}
    assert read(tmp_path, files).max_length == 44


@pytest.mark.parametrize("home", ["", "0_Transformer"])
def test_modules_without_paths(tmp_path, home):
    """Their folders are where sentence-transformers would have put them; it loads none of them, which is said."""
    files = {
        "modules.json": [{"type": OLD + "Transformer"}, {"type": NEW["Pooling"]}, {"type": OLD + "Normalize"}],
        str(Path(home, "config.json")): BERT,
        "1_Pooling/config.json": {"pooling_mode": "cls"},
    }
    config = read(tmp_path, files)
    assert (config.modes, config.normalize, config.width) == (("cls",), True, 8)
    assert [f"modules.json [{i}]: path is missing: " in text for i, text in enumerate(config.warnings)] == [True] * 3
    del files["1_Pooling/config.json"]
    (tmp_path / "1_Pooling/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1_Pooling/config\.json is missing"):
        read(tmp_path, files)


def test_layers_around_the_pooling(tmp_path):
    files = steps("Transformer", "Dense", "Pooling", "Normalize", "Dense", "Normalize", "Normalize")
    entries: list[dict[str, Any]] = files["modules.json"]
    tokens = {"module_input_name": "token_embeddings"}
    files |= {
        "1_Dense/config.json": {**DENSE, **tokens, "out_features": 5},
        "2_Pooling/config.json": {"embedding_dimension": 5, "pooling_mode": ["mean", "max"]},
        "4_Dense/config.json": {**DENSE, "in_features": 10, "out_features": 3},
    }
    config = read(tmp_path, files)
    assert [str(layer) for layer in config.token_layers] == ["Dense to 5"]
    assert [str(layer) for layer in config.layers] == ["normalised", "Dense to 3"]
    assert (config.normalize, config.width, [layer.name for layer in config.dense]) == (True, 8, ["4_Dense"])
    assert config.decision("normalize").source == "modules.json [5]: type"
    assert config.warnings == ()
    entries.append({"type": OLD + "Dense", "path": "7_Dense"})
    files["7_Dense/config.json"] = {**DENSE, "in_features": 5}
    with pytest.raises(ValueError, match=r"7_Dense/config\.json: in_features must be 3, the columns before it, got 5"):
        read(tmp_path, files)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("Transformer", "LayerNorm", "Pooling"), r"\[1\]: type .*LayerNorm reads 'sentence_embedding', which must"),
        (("Transformer", "Normalize"), r"type must be sentence-transformers' Pooling for one module"),
        (("Pooling",), r"\[0\]: type must be what makes token states"),
        ((), r"Pooling for one module, which gives sentence_embedding, got nothing"),
    ],
)
def test_modules_that_do_not_run(tmp_path, names, words):
    types = {name: OLD + name for name in ("Transformer", "Pooling", "LayerNorm", "Normalize")}
    files = {**model(MEAN), "modules.json": modules(*names, types=types), "1_LayerNorm/config.json": {"dimension": 8}}
    with pytest.raises(ValueError, match=rf"modules\.json.*{words}"):
        read(tmp_path, files)


def test_pooling_what_is_pooled_is_an_error(tmp_path):
    files = {**steps("Transformer", "Pooling", "Normalize", "Pooling"), "3_Pooling/config.json": MEAN}
    files["2_Normalize/config.json"] = {
        "module_input_name": "sentence_embedding",
        "module_output_name": "token_embeddings",
    }
    with pytest.raises(ValueError, match=r"modules\.json \[3\]: type must be something else, .*one vector already"):
        read(tmp_path, files)
