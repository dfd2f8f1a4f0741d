"""Folders that weigh words or layers: apply gives what sentence-transformers' encode gives."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, DENSE, MEAN, OLD, model, read, write
from helpers.tiny_bert import tiny_bert

import fastpool
from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.doctor.embed import vectors
from fastpool.models import engines
from fastpool.models.files import Folder
from fastpool.models.layers import Normalize

TEXTS = ["one two three", "four", "five four three two one", "two two query"]
WORDS = {"vocab": ["a", "B", "c"], "word_weights": {"a": 2, "b": 0.5, "other": 9}, "unknown_word_weight": 3}
LAYERS = {"embedding_dimension": 8, "layer_start": 1, "num_hidden_layers": 2}


def weighed(name: str, config: dict[str, Any], pooling: dict[str, Any] = MEAN, *after: str) -> dict[str, Any]:
    """A folder with that module between Transformer and Pooling."""
    files = model(pooling, *after, config={**BERT, "output_hidden_states": True})
    entries = [("Transformer", ""), *((one, f"{i}_{one}") for i, one in enumerate((name, "Pooling", *after), 1))]
    files["modules.json"] = [{"type": OLD + one, "path": path} for one, path in entries]
    return files | {f"1_{name}/config.json": config, "2_Pooling/config.json": pooling}


def states_of(x: torch.Tensor) -> torch.Tensor:
    """Its tokens in a row, whatever its layout."""
    return x.values() if x.is_nested else x.flatten(0, 1) if x.shape[:2] == (2, 3) else x


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    folder = tiny_bert(tmp_path_factory.mktemp("bert"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "output_hidden_states": True}))
    return folder


@pytest.mark.parametrize("tail", ["nothing", "dense", "normalize"])
@pytest.mark.parametrize("what", ["words", "layers", "both"])
def test_agrees_with_sentence_transformers(bert, tmp_path, what, tail):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as st

    torch.manual_seed(1)
    first = st.Transformer(str(shutil.copytree(bert, tmp_path / "bert")))
    parts, vocabulary = [first], first.tokenizer.get_vocab()
    if what != "words":
        parts.append(st.WeightedLayerPooling(16, num_hidden_layers=2, layer_start=1))
        torch.nn.init.uniform_(parts[-1].layer_weights, 0.5, 2)
    if what != "layers":
        words = sorted(vocabulary, key=lambda word: vocabulary[word])
        parts.append(st.WordWeights(words, {"one": 0.25, "two": 3.0, "[SEP]": 0.0}, unknown_word_weight=1.5))
    parts.append(st.Pooling(16, ("mean", "lasttoken") if what == "layers" else "mean"))
    parts += [st.Dense(16 * (1 + (what == "layers")), 12)] if tail == "dense" else []
    parts += [st.Normalize()] if tail != "nothing" else []
    theirs = SentenceTransformer(modules=parts, device="cpu")
    theirs.save(str(tmp_path / "saved"), create_model_card=False)
    config = PoolingConfig.from_pretrained(tmp_path / "saved")
    assert not any("output_hidden_states" in text for text in config.contradictions)
    expected = theirs.encode(TEXTS, convert_to_tensor=True)
    features = theirs.preprocess(TEXTS)
    with torch.no_grad():
        states = first(dict(features))
    mask, ids = states["attention_mask"], features["input_ids"] if what != "layers" else None
    hidden = states["token_embeddings"] if what == "words" else states["all_layer_embeddings"]
    got = config.apply(hidden, mask, input_ids=ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    lengths = mask.sum(1)  # their tokenizer pads on the right
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    kept = mask != 0
    packed = hidden[kept] if what == "words" else [layer[kept] for layer in hidden]
    got = config.apply(packed, cu_seqlens=offsets, input_ids=None if ids is None else ids[kept])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_word_weights(tmp_path, capsys):
    config = read(tmp_path, weighed("WordWeights", WORDS))
    assert (config.modes, str(config.word_weights)) == (("mean",), "words weighted")
    assert config.word_weights.table.tolist() == [2, 0.5, 3]  # also of a word in small letters; else the unknown's
    assert config.decision("word_weights").source == "1_WordWeights/config.json"
    hidden, ids = torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [1, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = fastpool.weighted_mean(hidden, mask, weights=torch.tensor([[2, 0.5, 3], [0.5, 2, 2]]))
    assert torch.equal(config.apply(hidden, mask, input_ids=ids), expected)
    narrow = fastpool.weighted_mean(hidden.bfloat16(), mask, weights=config.word_weights.table[ids])
    assert torch.equal(config.apply(hidden.bfloat16(), mask, input_ids=ids.int()), narrow)
    nested = torch.nested.nested_tensor_from_jagged
    offsets = torch.tensor([0, 3, 4])
    result = config.apply(nested(hidden[mask != 0], offsets), input_ids=nested(ids[mask != 0], offsets))
    assert torch.equal(result, expected)
    source = r"as 1_WordWeights/config\.json weighs words"
    with pytest.raises(TypeError, match=rf"apply: input_ids must be int32 or int64, {source}, got nothing"):
        config.apply(hidden, mask)
    with pytest.raises(TypeError, match=rf"input_ids must be .*{source}, got torch\.float32"):
        config.apply(hidden, mask, input_ids=ids.float())
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"input_ids must lie between 0 and 2, .*got {wrong}"):
            config.apply(hidden, mask, input_ids=ids.where(ids != 2, wrong))
    with pytest.raises(ValueError, match="input_ids must have hidden's shape"):
        config.apply(hidden, mask, input_ids=ids[:, :2])
    with pytest.raises(ValueError, match="input_ids must be on hidden's device, cpu, got meta"):
        config.apply(hidden, mask, input_ids=ids.to("meta"))
    with pytest.raises(TypeError, match=r"input_ids must be dense, or nested and jagged, got layout torch\.sparse"):
        config.apply(hidden, mask, input_ids=ids.to_sparse())
    freed = ids.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="input_ids must have memory for its elements"):
        config.apply(hidden, mask, input_ids=freed)
    for one in (config, read(tmp_path / "plain", model(MEAN))):
        with pytest.raises(TypeError, match=r"input_ids must be .*got str"):
            one.apply(hidden, mask, input_ids="rubbish")
    assert config.apply(hidden[:0], mask[:0], input_ids=ids[:0]).shape == (0, 8)
    found = {one.engine: one for one in engines.answers(Folder(tmp_path), config)}
    assert found["sentence-transformers"].setting == "WordWeights(...), Pooling(8, 'mean')"
    assert found["vLLM"].differs
    assert found["vLLM"].setting is None
    assert engines.describe(config) == "words weighted, mean, not normalised"
    pytest.importorskip("rich")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "WordWeights" in capsys.readouterr().out


@pytest.mark.parametrize(("weights", "share"), [((-1, -3), 0.75), ((1e-12, 3e-12), 0.75), ((1, -1), 0), ((0, 0), 0)])
def test_words_whose_weights_are_tiny_or_negative(tmp_path, weights, share):
    """Where sentence-transformers divides by 1e-9."""
    config = read(tmp_path, weighed("WordWeights", {**WORDS, "word_weights": dict(zip("ab", weights, strict=True))}))
    got = config.apply(torch.tensor([[[0.0] * 8, [1.0] * 8]]), input_ids=torch.tensor([[0, 1]]))
    torch.testing.assert_close(got, torch.full((1, 8), float(share)))


@pytest.mark.parametrize("wrong", [-100, 3, 2**31 - 1])
@pytest.mark.parametrize("layout", ["mask", "lengths", "ends", "packed", "nested"])
def test_ids_that_are_not_read(tmp_path, layout, wrong):
    config = read(tmp_path, weighed("WordWeights", WORDS))
    hidden, ids = torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [1, wrong, wrong]])
    lengths, real = torch.tensor([3, 1]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    given = {"lengths": lengths} if layout == "lengths" else {"mask": real} if layout == "mask" else {"ends": lengths}
    if layout in ("packed", "nested"):  # the row between two texts is none's
        hidden, ids = hidden.flatten(0, 1), ids.flatten()
        given = {"starts": torch.tensor([0, 3]), "ends": torch.tensor([3, 4])}
    if layout == "nested":
        offsets = torch.tensor([0, 3, 6])
        hidden, ids = (torch.nested.nested_tensor_from_jagged(x, offsets, lengths) for x in (hidden, ids))
        given = {}
    table = torch.tensor([2, 0.5, 3])
    expected = fastpool.weighted_mean(torch.nested.nested_tensor_from_jagged(states_of(hidden)[:4],
                                      torch.tensor([0, 3, 4])), weights=table[torch.tensor([0, 1, 2, 1])])  # fmt: skip
    assert torch.equal(config.apply(hidden, input_ids=ids, **given), expected)
    with pytest.raises(ValueError, match=rf"input_ids must lie between 0 and 2, .*got {wrong}$"):
        config.apply(states_of(hidden)[:4], input_ids=states_of(ids)[:4].where(torch.arange(4) != 1, wrong),
                     cu_seqlens=torch.tensor([0, 3, 4]))  # fmt: skip


def test_ids_in_a_graph(tmp_path):
    """No values are read while it is made; what is out of range takes a word's weight, and never one from the end."""
    config = read(tmp_path, weighed("WordWeights", WORDS))
    hidden, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    ids = torch.tensor([[0, 1, 2], [1, 0, 0]])
    config.apply(hidden, mask, input_ids=ids)  # tables are placed outside of graphs
    graph = torch.compile(lambda ids: config.apply(hidden, mask, input_ids=ids), backend="eager", fullgraph=True)
    assert torch.equal(graph(ids), config.apply(hidden, mask, input_ids=ids))
    assert torch.equal(graph(ids.where(ids != 0, -2)), graph(ids))
    assert torch.equal(graph(ids.where(ids != 2, 9)), graph(ids))


def test_weighted_layers(tmp_path):
    write(tmp_path, weighed("WeightedLayerPooling", LAYERS, {**MEAN, "pooling_mode": "cls"}))
    config = read(tmp_path, {})
    states = [torch.randn(2, 4, 8) for _ in range(3)]
    with pytest.raises(FileNotFoundError, match=r"1_WeightedLayerPooling/model\.safetensors and .* are missing"):
        config.apply(states)
    torch.save({"layer_weights": torch.tensor([1.0, 3.0])}, tmp_path / "1_WeightedLayerPooling/pytorch_model.bin")
    expected = states[1][:, 0] * 0.25 + states[2][:, 0] * 0.75
    torch.testing.assert_close(config.apply(states), expected)
    assert config.apply([layer.bfloat16() for layer in states]).dtype == torch.bfloat16
    assert str(config.layer_weights) == "layers 1 to 2 weighted"
    for unread in (None, "", states[0].int(), states[0][0, 0], states[0].double()):
        assert torch.equal(config.apply([unread, *states[1:]]), config.apply(states))
    for wrong, kind, words in (
        ([states[0], None, states[2]], TypeError, r"hidden must be a torch\.Tensor, got NoneType"),
        ([*states[:2], None], TypeError, r"hidden must be a torch\.Tensor, got NoneType"),
        ([states[0], states[1].int(), states[2]], TypeError, "hidden must be float16, .*got int32"),
        ([states[0], states[1][0, 0], states[2]], ValueError, "hidden must be "),
        ("abc", TypeError, r"hidden must be a torch\.Tensor, got str"),
        (None, TypeError, "hidden_states must be a sequence of a model's layers, got NoneType"),
        ([], ValueError, "hidden_states must be 3 layers, the embedding layer first, got 0"),
        ([None], ValueError, "hidden_states must be 3 layers, the embedding layer first, got 1"),
    ):
        with pytest.raises(kind, match=words):
            config.apply(wrong)
    with pytest.raises(TypeError, match="hidden_states must be a sequence of a model's layers, got Tensor"):
        config.apply(states[0])
    with pytest.raises(ValueError, match="hidden_states must be 3 layers, the embedding layer first, got 2"):
        config.apply(states[1:])
    with pytest.raises(ValueError, match=r"hidden must have 8 columns, as the model says .*, got 7"):
        config.apply([layer[..., 1:] for layer in states])
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor, got list"):
        read(tmp_path / "plain", model(MEAN)).apply(states)
    write(tmp_path, {"config.json": BERT})
    words = "1_WeightedLayerPooling weighs the model's layers, but output_hidden_states is not true in config.json"
    assert any(text.startswith(words) for text in read(tmp_path, {}).contradictions)
    assert (
        read(tmp_path, {"sentence_bert_config.json": {"config_args": {"output_hidden_states": True}}}).contradictions
        == ()
    )


def test_weighted_layers_in_a_graph(tmp_path):
    config = read(tmp_path, weighed("WeightedLayerPooling", LAYERS))
    torch.save({"layer_weights": torch.tensor([1.0, 3.0])}, tmp_path / "1_WeightedLayerPooling/pytorch_model.bin")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    graph = torch.compile(config.apply, backend="eager", fullgraph=True)
    first, second = ([torch.randn(2, 4, 8) for _ in range(3)] for _ in range(2))
    config.apply(first, mask)  # weights are read outside of graphs
    for states in (first, second, [None, *second[1:]]):
        assert torch.equal(graph(states, mask), config.apply(states, mask))


@pytest.mark.parametrize("stored", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_layers_whose_weights_do_not_divide(tmp_path, stored):
    config = read(tmp_path, weighed("WeightedLayerPooling", LAYERS))
    torch.save({"layer_weights": torch.tensor(stored)}, tmp_path / "1_WeightedLayerPooling/pytorch_model.bin")
    words = r"^1_WeightedLayerPooling/pytorch_model\.bin: layer_weights must add up to a finite number other than 0, "
    with pytest.raises(ValueError, match=words):
        config.apply([torch.zeros(2, 4, 8)] * 3)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("WeightedLayerPooling", {"num_hidden_layers": 2}, None),
        ("WeightedLayerPooling", {}, None),
        (
            *("WeightedLayerPooling", {"num_hidden_layers": 3}),
            "1_WeightedLayerPooling/config.json: num_hidden_layers says 2, but config.json: num_hidden_layers says 3",
        ),
        (
            *("WeightedLayerPooling", {"text_config": {"num_hidden_layers": 1}}),
            "1_WeightedLayerPooling/config.json: num_hidden_layers says 2, but config.json: text_config: num_hidden_l",
        ),
        ("WordWeights", {"vocab_size": 3}, None),
        ("WordWeights", {"vocab_size": 4}, None),  # a model may have more than its tokenizer
        (
            *("WordWeights", {"vocab_size": 2}),
            "1_WordWeights/config.json: vocab has 3 words, but config.json: vocab_size says 2",
        ),
    ],
)
def test_weights_of_another_model(tmp_path, name, config, words):
    files = weighed(name, {**WORDS, **LAYERS})
    files["config.json"] |= config
    found = read(tmp_path, files).contradictions
    assert found == () if words is None else [text.startswith(words) for text in found] == [True]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            weighed("WordWeights", {**WORDS, "vocab": []}),
            r"1_WordWeights/config\.json: vocab must be a list of strings",
        ),
        (weighed("WordWeights", {**WORDS, "vocab": [1]}), r"vocab must be a list of strings, got \[1\]"),
        (
            weighed("WordWeights", {**WORDS, "word_weights": {"a": "1"}}),
            r"word_weights: a must be a number from .*, got '1'",
        ),
        (weighed("WordWeights", {**WORDS, "word_weights": None}), "word_weights must be an object, got nothing"),
        (
            weighed("WordWeights", {**WORDS, "unknown_word_weight": True}),
            "unknown_word_weight must be a number from .*, got True",
        ),
        *(
            (
                weighed("WordWeights", {**WORDS, key: value}),
                rf"1_WordWeights/config\.json: {words} must be a number from",
            )
            for weight in (10**400, -(10**400), 1e300, float("inf"), float("nan"))
            for key, value, words in (
                ("word_weights", {"a": weight}, "word_weights: a"),
                ("unknown_word_weight", weight, "unknown_word_weight"),
            )
        ),
        (
            weighed("WordWeights", WORDS, {"pooling_mode": "max"}),
            r"2_Pooling/config\.json: pooling_mode must be 'mean' .*got 'max'",
        ),
        (weighed("WordWeights", WORDS, {**MEAN, "include_prompt": False}), "include_prompt must be true .*got False"),
        (
            weighed("WeightedLayerPooling", {**LAYERS, "layer_start": 3}),
            "layer_start must be a whole number from 0 to num_hid",
        ),
        (
            weighed("WeightedLayerPooling", {**LAYERS, "num_hidden_layers": 0}),
            "num_hidden_layers must be .*above 0, got 0",
        ),
        (
            weighed("WeightedLayerPooling", LAYERS, {"pooling_mode": "max"}),
            "pooling_mode must be none but 'max' .*got 'max'",
        ),
    ],
)
def test_what_is_malformed(tmp_path, files, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, files)


@pytest.mark.parametrize(("given", "unknown"), [({}, 1), ({"unknown_word_weight": 0}, 0)])
def test_which_weight_a_word_has(tmp_path, given, unknown):
    """Its own, else that of the word in small letters, else the unknown's, which is 1 where it is left out."""
    words = {"vocab": ["a", "A", "B", "c"], "word_weights": {"a": 2, "A": 7, "b": 0.5, "C": 9}, **given}
    config = read(tmp_path, weighed("WordWeights", words))
    assert config.word_weights.weights == (2, 7, 0.5, unknown)


def test_other_weights_are_another_pooling(tmp_path):
    one, same, other = (
        read(tmp_path / name, weighed("WordWeights", {**WORDS, "unknown_word_weight": unknown}))
        for name, unknown in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one.word_weights == same.word_weights
    assert hash(one.word_weights) == hash(same.word_weights)
    assert one.word_weights != other.word_weights
    assert one != other


def test_what_weights_go_with(tmp_path):
    words = read(tmp_path / "a", weighed("WordWeights", WORDS))
    for changes, got in (
        ({"modes": ("max",)}, r"\('max',\)"),
        ({"modes": ("mean", "cls")}, r"\('mean', 'cls'\)"),
        ({"include_prompt": False}, r"\('mean',\) without the prompt"),
    ):
        with pytest.raises(ValueError, match=rf"word_weights need modes \('mean',\) of all tokens, got {got}$"):
            replace(words, **changes)
    files = weighed("WeightedLayerPooling", LAYERS)
    layers = read(tmp_path / "b", files)
    with pytest.raises(ValueError, match="so token_layers must be empty, got 1"):
        replace(layers, token_layers=(Normalize(),))
    files["config.json"] |= {"latent_attention_config": {"latent_dim": 8, "hidden_dim": 8}}
    with pytest.raises(ValueError, match=r"^config\.json: latent_attention_config must not stand beside 1_Weighted"):
        read(tmp_path / "b", files)


@pytest.mark.parametrize("name", ["WordWeights", "WeightedLayerPooling"])
def test_layers_on_tokens_that_are_weighted(tmp_path, name):
    files = weighed(name, {**WORDS, **LAYERS})
    dense = {"type": OLD + "Dense", "path": "3_Dense"}
    said = {**DENSE, "outputs": 8, "module_input_name": "token_embeddings"}
    files = files | {"3_Dense/config.json": {**said, "out_features": 8}}
    entries = files["modules.json"]
    with pytest.raises(ValueError, match=r"modules\.json \[2\]: type must be .*Pooling, which follows"):
        read(tmp_path / "a", {**files, "modules.json": [*entries[:2], dense, *entries[2:]]})
    before = {**files, "modules.json": [entries[0], dense, *entries[1:]]}
    if name == "WordWeights":
        assert len(read(tmp_path / "b", before).token_layers) == 1
    else:
        with pytest.raises(ValueError, match=r"modules\.json \[2\]: type must be something else here, as it takes the"):
            read(tmp_path / "b", before)


@pytest.mark.parametrize(("name", "words"), [("WordWeights", "words"), ("WeightedLayerPooling", "layers 1 to 2")])
def test_doctor_compares_no_such_pooling(tmp_path, name, words):
    config = read(tmp_path, weighed(name, {**WORDS, **LAYERS}))
    with pytest.raises(
        ValueError, match=f"^1_{name}: {words} weighted; expected a model whose token states are pooled"
    ):
        vectors(None, config, ["a text"], print)
