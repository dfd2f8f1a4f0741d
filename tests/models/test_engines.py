"""What each engine makes of folders of its own taste: keys of config.json, its own classes, where it does not start."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.model_folders import BERT, DENSE, NEW, OLD, QWEN, model, modules, write

from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models import engines
from fastpool.models.files import Folder

FLAGS = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MPNET = {"architectures": ["MPNetModel"], "model_type": "mpnet", "hidden_size": 8}
POOLER = '--pooler-config \'{"seq_pooling_type": "MEAN", "use_activation": true}\''


def answer(root: Path, engine: str, files: dict[str, Any]) -> engines.EngineReport:
    write(root, files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # guesses are not the point
        found = engines.answers(Folder(root), PoolingConfig.from_pretrained(root))
    return next(one for one in found if one.engine == engine)


@pytest.mark.parametrize(
    ("said", "vllm", "sglang"),
    [
        ({}, '{"is_matryoshka": true}', '{"is_matryoshka": true}'),
        ({"is_matryoshka": False}, '{"is_matryoshka": true}', '{"is_matryoshka": true}'),
        ({"is_matryoshka": True}, None, None),
        ({"matryoshka_dimensions": [2, 4]}, None, None),
        ({"matryoshka_dimensions": [2, 3]}, '{"matryoshka_dimensions": [4]}', '{"matryoshka_dimensions": [4]}'),
        # An empty list allows none in vLLM; here the same is asked for in SGLang, where it would allow all.
        ({"is_matryoshka": True, "matryoshka_dimensions": []}, '{"matryoshka_dimensions": [4]}', None),
    ],
)
def test_columns_that_requests_ask_for(tmp_path, said, vllm, sglang):
    """Both refuse `dimensions`, unless the model says that it may be truncated, and to which sizes."""
    pooling = {"pooling_mode": "cls"}
    cut = {"config_sentence_transformers": {"truncate_dim": 4}}
    files = model(pooling, "Normalize", config={**BERT, **said}, **cut)
    setting = answer(tmp_path, "vLLM", files).setting
    assert setting is not None
    assert setting.endswith('; in requests: {"dimensions": 4}')
    assert ("--hf-overrides" in setting) == (vllm is not None)
    assert vllm is None or f"--hf-overrides '{vllm}'" in setting
    setting = answer(tmp_path, "SGLang", files).setting
    assert setting is not None
    assert sglang is None or f"--json-model-override-args '{sglang}'" in setting


@pytest.mark.parametrize(
    "name", ["Qwen2ForCausalLM", "GPT2LMHeadModel", "Qwen2VLForConditionalGeneration", "QChatModel"]
)
def test_vllm_takes_a_language_model_for_a_generator(tmp_path, name):
    files: dict[str, Any] = {"config.json": {**QWEN, "architectures": [name]}}
    found = answer(tmp_path / "a", "vLLM", files)
    assert (found.by_itself, found.differs) == ("no sentence vectors", True)
    assert found.setting == '--runner pooling --pooler-config \'{"seq_pooling_type": "LAST", "use_activation": false}\''
    files = model({"pooling_mode": "lasttoken"}, "Normalize", config=files["config.json"])
    assert not answer(tmp_path / "b", "vLLM", files).differs  # a Pooling module says enough


def test_vllm_gives_logits_for_bert_for_masked_lm(tmp_path):
    files = model(FLAGS, "Normalize", config={**BERT, "architectures": ["BertForMaskedLM"]})
    found = answer(tmp_path, "vLLM", files)
    assert found.by_itself == "no sentence vectors"
    assert found.setting == f'{POOLER} --hf-overrides \'{{"architectures": ["BertModel"]}}\''


@pytest.mark.parametrize(
    ("said", "by_itself"),
    [("avg", "mean, normalised"), ("last", "last, normalised"), (None, "no sentence vectors")],
)
def test_vllm_follows_a_key_of_nemotron_s_own(tmp_path, said, by_itself):
    transformer = {"architectures": ["LlamaBidirectionalModel"], "model_type": "llama_bidirec", "pooling": said}
    found = answer(tmp_path, "vLLM", model(FLAGS, "Normalize", config={**transformer, "hidden_size": 8}))
    assert found.by_itself == by_itself
    pooler, overrides = '{"use_activation": true}', '{"pooling": "avg"}'
    assert found.setting == f"--trust-remote-code --pooler-config '{pooler}' --hf-overrides '{overrides}'"


@pytest.mark.parametrize(
    ("changes", "applied"),
    [
        ({}, True),
        ({"activation_function": "torch.nn.modules.activation.Tanh"}, True),
        ({"activation_function": "torch.nn.modules.activation.Mish"}, False),  # then it drops all Dense layers
        ({"activation_function": None}, False),  # none to it, Tanh to sentence-transformers
    ],
)
def test_vllm_s_dense_layers(tmp_path, changes, applied):
    files = model(FLAGS, "Dense", "Normalize", **{"2_Dense__config": {**DENSE, **changes}})
    assert answer(tmp_path, "vLLM", files).differs == (not applied)


def test_what_stands_between_dense_layers_is_nobody_else_s(tmp_path):
    types = {name: OLD + name for name in (*NEW, "LayerNorm")}
    files = {**model(FLAGS), "2_LayerNorm/config.json": {"dimension": 8}}
    files["modules.json"] = modules("Transformer", "Pooling", "LayerNorm", "Normalize", types=types)
    for engine in engines.NAMES:
        found = answer(tmp_path, engine, files)
        ours = engine == "sentence-transformers"
        assert (found.differs, found.setting is None) == (not ours, not ours), engine
    found = answer(tmp_path, "sentence-transformers", files)
    assert found.setting == "Pooling(8, 'mean'), LayerNorm(8), Normalize()"
    assert found.by_itself == "mean, LayerNorm, normalised"


def test_layers_on_tokens(tmp_path):
    files = {**model(FLAGS), "1_Dense/config.json": {**DENSE, "module_input_name": "token_embeddings"}}
    files["modules.json"] = modules("Transformer", "Dense", "Pooling", "Normalize")
    files["2_Pooling/config.json"] = FLAGS
    found = answer(tmp_path, "sentence-transformers", files)
    words = "Dense(8, 4, ..., module_input_name='token_embeddings'), Pooling(4, 'mean'), Normalize()"
    assert (found.setting, found.by_itself) == (words, "each token Dense to 4, mean, normalised")
    assert answer(tmp_path, "vLLM", files).by_itself == "mean, Dense to 4, normalised"  # it pools first


def test_a_transformer_in_a_folder_of_its_own(tmp_path):
    """Only sentence-transformers finds it there."""
    files = model(FLAGS, "Normalize")
    files["modules.json"][0]["path"] = "0_Transformer"
    files["0_Transformer/config.json"] = files.pop("config.json")
    for engine in engines.NAMES:
        found = answer(tmp_path, engine, files)
        alone = engine == "sentence-transformers"
        assert (found.setting is None) != alone, engine
        assert any("config.json at its top" in note for note in found.notes) != alone, engine


def test_modules_without_paths(tmp_path):
    files = model(FLAGS, "Normalize")
    for entry in files["modules.json"]:
        del entry["path"]
    for engine in ("sentence-transformers", "vLLM", "llama.cpp"):
        found = answer(tmp_path, engine, files)
        assert (found.setting, found.by_itself) == (None, "no sentence vectors"), engine
        assert found.notes[0].startswith("modules.json [0] has no path"), engine


@pytest.mark.parametrize("said", [None, False])
def test_sentence_transformers_asks_whether_a_model_is_causal(tmp_path, said):
    files: dict[str, Any] = {"config.json": {**QWEN, "is_causal": said}}
    assert answer(tmp_path, "sentence-transformers", files).by_itself == "mean, not normalised"


@pytest.mark.parametrize(
    ("said", "by_itself", "wanted", "setting"),
    [
        ({}, "last, normalised", "cls", "--is-embedding --json-model-override-args '{\"pooling_type\": \"CLS\"}'"),
        ({"pooling_type": "cls"}, "cls, normalised", "cls", "--is-embedding"),
        ({"pooling_type": "MEAN"}, "last, normalised", "mean", None),
        ({"normalize": False}, "last, not normalised", "lasttoken",
         "--is-embedding --json-model-override-args '{\"normalize\": true}'"),
    ],
)  # fmt: skip
def test_sglang_reads_keys_where_it_has_no_class(tmp_path, said, by_itself, wanted, setting):
    files = model({"pooling_mode": wanted}, "Normalize", config={**MPNET, **said})
    found = answer(tmp_path, "SGLang", files)
    assert (found.by_itself, found.setting) == (by_itself, setting)
    native = answer(tmp_path, "SGLang", {**files, "config.json": {**BERT, **said}})
    assert native.by_itself == "cls, normalised"  # its class decides


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config.json": {**BERT, "architectures": ["BertForSequenceClassification"]}}, "is a classifier to it"),
        (
            {"2_Dense/config.json": {**DENSE, "activation_function": "torch.nn.modules.activation.GELU"}},
            "no activation",
        ),
    ],
)
def test_where_text_embeddings_inference_does_not_start(tmp_path, changes, words):
    files = {**model(FLAGS, "Dense", "Normalize"), "2_Dense/config.json": DENSE, **changes}
    found = answer(tmp_path, "text-embeddings-inference", files)
    assert (found.setting, found.by_itself) == (None, "no sentence vectors")
    assert words in found.notes[0]


@pytest.mark.parametrize(
    ("said", "by_itself"),
    [
        ({"pooling_mode": "mean"}, "mean, normalised"),
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": False}, "last, normalised"),
        ({"pooling_mode": "max"}, "no sentence vectors"),
        ({"pooling_mode": ["mean", "cls"]}, "no sentence vectors"),
    ],
)
def test_llama_cpp_reads_the_newer_form(tmp_path, said, by_itself):
    files = model(said, "Normalize")
    files["modules.json"] = modules("Transformer", "Pooling", "Normalize", types=NEW)
    assert answer(tmp_path, "llama.cpp", files).by_itself == by_itself


@pytest.mark.parametrize(
    ("family", "written"), [("bert", True), ("qwen3", True), ("gemma2", False), ("smollm3", False)]
)
def test_whose_pooling_llama_cpp_converts(tmp_path, family, written):
    files = model(FLAGS, "Normalize", config={**BERT, "model_type": family})
    found = answer(tmp_path, "llama.cpp", files)
    assert found.by_itself == ("mean, normalised" if written else "no sentence vectors")
    assert found.setting == "--pooling mean"


def test_a_prompt_in_front_does_nothing_to_the_last_token(tmp_path):
    files = model({"pooling_mode": "lasttoken", "include_prompt": False}, "Normalize", config=QWEN)
    assert not answer(tmp_path, "vLLM", files).differs
    files["1_Pooling/config.json"]["pooling_mode"] = "cls"
    assert answer(tmp_path, "vLLM", files).differs


@pytest.mark.parametrize("engine", engines.NAMES)
def test_no_engine_makes_a_decoder_bidirectional_as_llm2vec_does(tmp_path, engine):
    files = {"config.json": QWEN, "llm2vec_config.json": {"pooling_mode": "last_token"}}
    found = answer(tmp_path, engine, files)
    assert (found.setting, found.differs) == (None, True)
    assert found.notes[0].startswith("LLM2Vec's own code makes the model bidirectional")


def test_a_pooling_that_is_not_where_vllm_looks(tmp_path):
    """Without a folder of its own, in the model's config.json."""
    files = {**model({}, "Normalize"), "config.json": {**BERT, **FLAGS}}
    files["modules.json"][1]["path"] = ""
    assert answer(tmp_path, "vLLM", files).by_itself == "cls, normalised"


def test_a_family_that_sentence_transformers_converts(tmp_path):
    """It then reads neither modules.json nor prompts."""
    files = model({"pooling_mode": "cls"}, "Normalize", config_sentence_transformers={"model_type": "Foo"})
    found = answer(tmp_path, "sentence-transformers", files)
    assert (found.by_itself, found.differs) == ("mean, not normalised", True)
    (told,) = PoolingConfig.from_pretrained(tmp_path).contradictions
    assert told.startswith(
        "config_sentence_transformers.json: model_type is 'Foo', so that sentence-transformers reads"
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [({"pooling_mode": "mean"}, "no embedding_dimension"), ({**FLAGS, "embedding_dimension": 8, "x": 1}, "has ['x']")],
)
def test_what_sentence_transformers_does_not_load(tmp_path, said, words):
    (note,) = answer(tmp_path, "sentence-transformers", model(said)).notes
    assert words in note


def test_text_embeddings_inference_asks_for_an_architecture(tmp_path):
    files = model(FLAGS, "Normalize", config={"model_type": "bert", "hidden_size": 8})
    found = answer(tmp_path, "text-embeddings-inference", files)
    assert (found.setting, found.notes) == (None, ("config.json has no architectures: it does not start",))


def test_a_file_that_only_an_engine_reads_stops_no_other_answer(tmp_path, capsys):
    """What PoolingConfig.from_pretrained accepts, inspect does."""
    files = model(FLAGS, "Normalize")
    files["modules.json"][1]["path"] = "elsewhere"
    files["elsewhere/config.json"], files["1_Pooling/config.json"] = files["1_Pooling/config.json"], "no JSON"
    found = answer(tmp_path, "text-embeddings-inference", files)
    assert (found.setting, found.differs) == (None, True)
    assert found.notes[0].startswith("it cannot read 1_Pooling/config.json: expected JSON, got ")
    assert main(["inspect", "--check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: mean, normalised: nothing against it\n"


def test_nemotron_s_parts(tmp_path):
    inner = {"model_type": "llama_bidirec", "pooling": "last", "hidden_size": 8}
    config = {"architectures": ["LlamaNemotronVLModel"], "llm_config": inner}
    assert answer(tmp_path / "a", "vLLM", {"config.json": config}).by_itself == "last, normalised"
    config["llm_config"] = {}
    assert answer(tmp_path / "b", "vLLM", {"config.json": config}).by_itself == "mean, normalised"  # its default
    config["pooling"] = "weighted_avg"
    assert "unless `pooling`" in answer(tmp_path / "c", "vLLM", {"config.json": config}).notes[0]
    config["pooling"] = "avg"
    assert answer(tmp_path / "d", "vLLM", model(FLAGS, config=config)).by_itself == "mean, not normalised"


@pytest.mark.parametrize(
    ("said", "refused"),
    [({}, True), ({"is_matryoshka": True}, False), ({"matryoshka_dimensions": [4, 8]}, False),
     ({"matryoshka_dimensions": []}, True), ({"is_matryoshka": False}, True)],
)  # fmt: skip
def test_where_vllm_takes_fewer_columns(tmp_path, said, refused):
    found = answer(tmp_path, "vLLM", model(FLAGS, config={**BERT, **said}))
    assert any(note.startswith("it refuses requests with `dimensions`") for note in found.notes) == refused
