"""fastpool.PoolingConfig: what a model's folder says about its pooling, and how sure that is."""

import re
import warnings

import pytest
from helpers.model_folders import BERT, DENSE, MEAN, NEW, OLD, QWEN, STRINGS, dense, model, modules, steps, write

from fastpool import PoolingConfig
from fastpool.models.files import Folder

FLAGS = (
    *(("cls_token", "cls"), ("max_tokens", "max"), ("mean_tokens", "mean"), ("lasttoken", "last")),
    *(("mean_sqrt_len_tokens", "mean_sqrt_len"), ("weightedmean_tokens", "weighted_mean")),
)


@pytest.mark.parametrize(("key", "mode"), FLAGS)
def test_boolean_form(tmp_path, key, mode):
    flags = {f"pooling_mode_{other}": other == key for other, _ in FLAGS}
    write(tmp_path, model({"word_embedding_dimension": 8, **flags}, "Normalize"))
    config = PoolingConfig.from_pretrained(tmp_path)
    assert (config.modes, config.normalize, config.width) == ((mode,), True, 8)
    decision = config.decision("modes")
    assert (decision.source, decision.certainty) == (f"1_Pooling/config.json: pooling_mode_{key}", "stated")


@pytest.mark.parametrize(("name", "mode"), STRINGS)
def test_string_form(tmp_path, name, mode):
    write(tmp_path, model({"embedding_dimension": 8, "pooling_mode": name, "include_prompt": False}))
    config = PoolingConfig.from_pretrained(str(tmp_path))
    assert (config.modes, config.normalize, config.width, config.include_prompt) == ((mode,), False, 8, False)
    assert {config.decision(what).certainty for what in ("modes", "normalize", "width", "include_prompt")} == {"stated"}


def test_several_modes(tmp_path):
    """The boolean form has an order of its own, in which sentence-transformers concatenates; the list has the given."""
    flags = {f"pooling_mode_{key}": True for key, _ in reversed(FLAGS)}
    config = PoolingConfig.from_pretrained(write(tmp_path / "a", model(flags)))
    assert config.modes == ("cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last")
    config = PoolingConfig.from_pretrained(write(tmp_path / "b", model({"pooling_mode": ["mean", "cls"]})))
    assert config.modes == ("mean", "cls")


def test_newer_module_types(tmp_path):
    files = model(MEAN, "Dense", "Normalize", **{"2_Dense__config": DENSE})
    files["modules.json"] = modules("Transformer", "Pooling", "Dense", "Normalize", types=NEW)
    config = PoolingConfig.from_pretrained(write(tmp_path, files))
    assert (config.modes, config.normalize) == (("mean",), True)
    assert [(layer.name, layer.inputs, layer.outputs, layer.activation) for layer in config.dense] == [
        ("2_Dense", 8, 4, "Identity")
    ]


def test_what_surrounds_it(tmp_path):
    said = {
        "prompts": {"query": "query: ", "document": ""},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
        "truncate_dim": 4,
    }
    tokenizer = {"padding_side": "left", "model_max_length": 77}
    files = model(MEAN, config_sentence_transformers=said, tokenizer_config=tokenizer)
    config = PoolingConfig.from_pretrained(write(tmp_path, files))
    assert (config.prompts, config.default_prompt_name) == (said["prompts"], "query")
    assert (config.similarity, config.truncate_dim, config.padding_side, config.max_length) == ("dot", 4, "left", 77)
    assert config.decision("truncate_dim").source == "config_sentence_transformers.json: truncate_dim"
    write(tmp_path, {"sentence_bert_config.json": {"max_seq_length": 33}})
    assert PoolingConfig.from_pretrained(tmp_path).max_length == 33


@pytest.mark.parametrize("limit", [10**30, 1e30])
def test_a_tokenizer_without_a_limit(tmp_path, limit):
    files = model(MEAN, tokenizer_config={"model_max_length": limit})
    assert PoolingConfig.from_pretrained(write(tmp_path, files)).max_length is None


@pytest.mark.parametrize("limit", [-1, 0, "512", 512.5, True, float("nan")])
def test_a_limit_that_is_none_stops_nobody(tmp_path, limit):
    """Pooling does not depend on it."""
    config = PoolingConfig.from_pretrained(write(tmp_path, model(MEAN, tokenizer_config={"model_max_length": limit})))
    assert config.max_length is None
    words = f"tokenizer_config.json: model_max_length must be a whole number above 0, got {limit!r}; it is left out"
    assert config.warnings == (words,)


def test_a_limit_as_a_float(tmp_path):
    config = PoolingConfig.from_pretrained(write(tmp_path, model(MEAN, tokenizer_config={"model_max_length": 512.0})))
    assert (config.max_length, type(config.max_length), config.warnings) == (512, int, ())


@pytest.mark.parametrize(
    ("transformer", "mode", "certainty"),
    [
        (QWEN, "last", "implied"),
        ({**QWEN, "architectures": ["MistralModel"], "model_type": "mistral"}, "last", "implied"),
        ({**QWEN, "is_causal": False}, "mean", "guessed"),
        ({**BERT, "architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}, "mean", "guessed"),
        (BERT, "mean", "guessed"),
        ({"model_type": "bert"}, "mean", "guessed"),
        ({**BERT, "pooling_type": "CLS"}, "cls", "stated"),
    ],
)
def test_without_modules(tmp_path, transformer, mode, certainty):
    write(tmp_path, {"config.json": transformer})
    with pytest.warns(UserWarning, match="guess") as caught:
        config = PoolingConfig.from_pretrained(tmp_path)
    assert (config.modes, config.decision("modes").certainty) == ((mode,), certainty)
    assert (config.normalize, config.decision("normalize").certainty) == (False, "guessed")
    told = [str(warning.message) for warning in caught]
    assert any("search worse" in text for text in told) == (certainty == "guessed")
    assert caught[0].filename == __file__  # whoever asked
    assert {text.removeprefix(f"{tmp_path}: ") for text in told} <= set(config.warnings)


CAUSAL = (
    *(("GraniteModel", "granite"), ("CohereModel", "cohere"), ("Glm4Model", "glm4"), ("SmolLM3Model", "smollm3")),
    *(("Qwen3NextModel", "qwen3_next"), ("GptOssModel", "gpt_oss"), ("DeepseekV3Model", "deepseek_v3")),
    *(("OpenAIGPTLMHeadModel", "openai-gpt"), ("Qwen3VLForConditionalGeneration", "qwen3_vl"), ("NewLMHeadModel", "x")),
)


@pytest.mark.parametrize(
    ("name", "family", "mode", "words"),
    [
        *((name, family, "last", None) for name, family in CAUSAL),
        ("MPNetModel", "mpnet", "mean", "MPNetModel may have been trained for mean or for cls"),
        ("NewModel", "new", "mean", "NewModel may have been trained for mean or for cls"),
        ("T5EncoderModel", "t5", "mean", "T5EncoderModel may have been trained for mean or for cls"),
        ("XLMWithLMHeadModel", "xlm", "mean", "XLMWithLMHeadModel may have been trained for mean or for cls"),
        ("OtherModel", "other", "mean", "OtherModel is not known here"),
        ("OtherModel", None, "mean", "OtherModel is not known here"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_architectures(tmp_path, name, family, mode, words):
    """Nothing is said about an architecture that is not known."""
    transformer = {"architectures": [name], "model_type": family, "hidden_size": 8}
    config = PoolingConfig.from_pretrained(write(tmp_path, {"config.json": transformer}))
    assert config.modes == (mode,)
    guess = [text for text in config.warnings if text.startswith("the pooling is a guess")]
    assert bool(guess) == (words is not None)
    assert words is None or words in guess[0]


@pytest.mark.parametrize(
    ("said", "mode"), [(True, "mean"), ("all", "mean"), ("vision", "last"), (False, "last"), (None, "last")]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bidirectional_attention(tmp_path, said, mode):
    """A bool in Gemma 3, a word in Gemma 4, where "vision" leaves text causal."""
    transformer = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
    write(tmp_path, {"config.json": {**transformer, "use_bidirectional_attention": said}})
    assert PoolingConfig.from_pretrained(tmp_path).modes == (mode,)


@pytest.mark.parametrize("flags", [{}, {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": False}])
def test_no_mode_is_mean(tmp_path, flags):
    """Without a flag that is set, the mode is mean, as in sentence-transformers."""
    config = PoolingConfig.from_pretrained(write(tmp_path, model({"word_embedding_dimension": 8, **flags})))
    assert (config.modes, config.decision("modes").certainty) == (("mean",), "implied")
    assert config.warnings == (
        "1_Pooling/config.json: it names no pooling mode: mean, as sentence-transformers takes it",
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_poolings_left_over(tmp_path):
    poolings = {"1_Pooling/config.json": {"pooling_mode": "cls"}, "2_Pooling/config.json": MEAN}
    config = PoolingConfig.from_pretrained(write(tmp_path, {"config.json": BERT, **poolings}))
    assert config.modes == ("cls",)
    assert any("1_Pooling, 2_Pooling are all there: the first is followed" in text for text in config.warnings)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pooling_left_over_without_modules(tmp_path):
    config = PoolingConfig.from_pretrained(
        write(tmp_path, {"config.json": BERT, "1_Pooling/config.json": {"pooling_mode": "cls"}})
    )
    assert (config.modes, config.decision("modes").certainty) == (("cls",), "implied")
    assert any("modules.json is missing: 1_Pooling/config.json" in text for text in config.warnings)


COSINE = {"similarity_fn_name": "cosine"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (model({"pooling_mode": "mean"}, config=QWEN), "mean pooling of a causal model (Qwen2ForCausalLM)"),
        (model(MEAN, config_sentence_transformers=COSINE), "no Normalize"),
        (model(MEAN, "Normalize", config_sentence_transformers={"truncate_dim": 4}), "truncates what was normalised"),
        (model({"pooling_mode": "cls"}, tokenizer_config={"padding_side": "left"}), "padding on the left"),
        (model({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}), "the older pooling_mode_* keys say mean"),
    ],
)
def test_contradictions(tmp_path, files, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no guess
        config = PoolingConfig.from_pretrained(write(tmp_path, files))
    assert len(config.warnings) == 1
    assert words in config.warnings[0]


@pytest.mark.parametrize(
    "files",
    [
        model(MEAN, "Normalize", config_sentence_transformers=COSINE),
        model({"pooling_mode": "weightedmean"}, config=QWEN),  # made for causal models
        model(MEAN, config={**QWEN, "is_causal": False}),
        model({"pooling_mode": "lasttoken"}, config=QWEN, tokenizer_config={"padding_side": "left"}),
    ],
)
def test_no_contradiction(tmp_path, files):
    assert PoolingConfig.from_pretrained(write(tmp_path, files)).warnings == ()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({**model(MEAN), "modules.json": "{not json"}, r"modules\.json: expected JSON, got "),
        ({**model(MEAN), "modules.json": {}}, r"modules\.json: expected a list, got dict"),
        ({**model(MEAN), "modules.json": [1]}, r"modules\.json \[0\]: expected an object, got 1"),
        ({**model(MEAN), "modules.json": [{"path": ""}]}, r"modules\.json \[0\]: type must be a string, got nothing"),
        (steps("Transformer"), r"modules\.json: type must be .*Pooling .*Transformer"),
        (steps("Transformer", "my.Pooling"), r"modules\.json \[1\]: type must be .*got 'my\.Pooling'"),
        (steps("Pooling", "Transformer"), r"modules\.json \[0\]: type must be what makes token states"),
        (steps("Transformer", "Pooling", "Transformer"), r"modules\.json \[2\]: type must be .*Transformer \(first\)"),
        (steps("Transformer", "Dropout", "Pooling"), r"modules\.json \[1\]: type .*Dropout reads 'sentence_embedding'"),
        (
            {**model(MEAN), "modules.json": [{"type": "a.Transformer"}, {"type": OLD + "Pooling", "path": "../x"}]},
            r"modules\.json \[1\]: path must be a folder inside the model's, got '\.\./x'",
        ),
        (
            {**model(MEAN), "modules.json": [{"type": "a.Transformer"}, {"type": OLD + "Pooling", "path": "x" * 256}]},
            r"modules\.json \[1\]: path must be at most 255 bytes .*got 'x+\.\.\.x+'",
        ),
        (
            {**model(MEAN), "modules.json": [{"type": "a.Transformer"}, {"type": OLD + "Pooling", "path": "\ud800\a"}]},
            r"modules\.json \[1\]: path must be .*printable characters, got '\\ud800\\x07'",
        ),
        (model({"pooling_mode": "median"}), r"1_Pooling/config\.json: pooling_mode must be one of cls, .*got 'median'"),
        (model({"pooling_mode": []}), r"1_Pooling/config\.json: pooling_mode must be .*got \[\]"),
        (model({"pooling_mode": 3}), r"1_Pooling/config\.json: pooling_mode must be .*got 3"),
        (model({"pooling_mode_mean_tokens": 1}), r"pooling_mode_mean_tokens must be true or false, got 1"),
        (model({"pooling_mode_median": True}), r"1_Pooling/config\.json: pooling_mode_median is no pooling mode"),
        (model({**MEAN, "embedding_dimension": "8"}), r"embedding_dimension must be a whole number, got '8'"),
        (model({**MEAN, "embedding_dimension": True}), r"embedding_dimension must be a whole number, got True"),
        (model({**MEAN, "include_prompt": "no"}), r"include_prompt must be true or false, got 'no'"),
        (model(MEAN, config={"architectures": "BertModel"}), r"config\.json: architectures must be a list"),
        (model(MEAN, config={"hidden_size": 0}), r"config\.json: hidden_size must be a whole number above 0, got 0"),
        (model(MEAN, tokenizer_config={"padding_side": "up"}), r"tokenizer_config\.json: padding_side .*got 'up'"),
        (model(MEAN, config={"use_bidirectional_attention": 1}), r"use_bidirectional_attention must be .*got 1"),
        (model(MEAN, config={"use_bidirectional_attention": "x"}), r"use_bidirectional_attention must be .*got 'x'"),
        (model(MEAN, config_sentence_transformers={"truncate_dim": 9}), r"truncate_dim must be at most 8.*got 9"),
        (model(MEAN, config_sentence_transformers={"truncate_dim": 0}), r"truncate_dim must be .*above 0, got 0"),
        (model(MEAN, config_sentence_transformers={"prompts": {"a": 1}}), r"prompts must be an object of strings"),
        (model(MEAN, config_sentence_transformers={"default_prompt_name": "q"}), r"default_prompt_name .*got 'q'"),
        (dense(activation_function="os.system"), r"2_Dense/config\.json: activation_function .*got 'os\.system'"),
        (dense(activation_function="torch.nn.modules.activation.Softmax"), r"activation_function must be one of"),
        (dense(activation_function="torch.nnevil.ReLU"), r"activation_function must be .*got 'torch\.nnevil\.ReLU'"),
        (dense(in_features=9), r"2_Dense/config\.json: in_features must be 8, .*got 9"),
        (dense(out_features=None), r"2_Dense/config\.json: out_features must be .*got nothing"),
        (dense(module_input_name="logits"), r"modules\.json \[2\]: type .*Dense reads 'logits', which .* got 'token"),
        ({"config.json": {**BERT, "pooling_type": "BEST"}}, r"config\.json: pooling_type must be .*got 'BEST'"),
    ],
)  # fmt: skip
def test_malformed(tmp_path, files, words):
    with pytest.raises(ValueError, match=words):
        PoolingConfig.from_pretrained(write(tmp_path, files))


def test_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PoolingConfig.from_pretrained(tmp_path / "no" / "model")
    with pytest.raises(FileNotFoundError, match=r"modules\.json and config\.json are missing"):
        PoolingConfig.from_pretrained(tmp_path)
    write(tmp_path, {"modules.json": modules("Transformer", "Pooling")})
    with pytest.raises(FileNotFoundError, match=r"1_Pooling/config\.json is missing"):
        PoolingConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        PoolingConfig.from_pretrained(tmp_path / "modules.json")


@pytest.mark.parametrize("name", ["modules.json", "tokenizer_config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize(("what", "words"), [("link", "a broken link"), ("folder", "a folder")])
def test_what_is_no_file(tmp_path, name, what, words):
    """It is not taken for missing: a guess would follow."""
    write(tmp_path, model(MEAN))
    (tmp_path / name).unlink(missing_ok=True)
    if what == "link":
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a file, got {words}"):
        PoolingConfig.from_pretrained(tmp_path)


def test_names_stay_in_the_folder(tmp_path):
    folder = Folder(write(tmp_path / "model", model(MEAN)))
    write(tmp_path, {"other.json": {}})
    for name in (str(tmp_path / "other.json"), "../other.json", "1_Pooling/../../other.json"):
        for ask in (folder.has, folder.path):
            with pytest.raises(ValueError, match="expected a name inside the model's folder"):
                ask(name)
    assert folder.path("") == folder.root


def test_is_a_value(tmp_path):
    """Frozen, comparable, hashable; two readings are one."""
    write(tmp_path, model(MEAN, config_sentence_transformers={"prompts": {"query": "q: "}}))
    first, second = PoolingConfig.from_pretrained(tmp_path), PoolingConfig.from_pretrained(tmp_path)
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(AttributeError):
        first.modes = ("cls",)  # type: ignore[misc]
