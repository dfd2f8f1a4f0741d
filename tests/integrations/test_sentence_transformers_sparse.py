"""sentence-transformers' SpladePooling and the normalisation of token vectors through fastpool: theirs to rounding,
fastpool's to the bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool

modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules", reason="needs sentence-transformers 5.4")

from fastpool.integrations import sentence_transformers as plugin  # noqa: E402  # it needs the package

LOGITS = torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(1)) - 0.5
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
CU = torch.tensor([0, 4, 10, 11], dtype=torch.int32)
ALL = [(pooling, activation) for pooling in ("max", "sum") for activation in ("relu", "log1p_relu")]


def features(layout: str, logits: Tensor = LOGITS) -> dict[str, Any]:
    if layout == "padded":
        return {"token_embeddings": logits, "attention_mask": MASK}
    return {"token_embeddings": logits[MASK.bool()][None], "cu_seq_lens_q": CU}


@pytest.fixture(params=["patch", "install"])
def ours(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that gives a module as it runs through fastpool."""
    if request.param == "patch":
        yield plugin.patch
        return
    plugin.install()
    yield lambda module: module
    plugin.uninstall()


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize(("pooling", "activation"), ALL)
def test_splade_pooling(pooling: str, activation: str, layout: str, ours: Any) -> None:
    theirs = modules.SpladePooling.__dict__["forward"]
    theirs = getattr(theirs, "fastpool_replaces", theirs)
    expected = theirs(modules.SpladePooling(pooling, activation).eval(), features(layout))["sentence_embedding"]
    module = ours(modules.SpladePooling(pooling, activation).eval())
    found = module(features(layout))["sentence_embedding"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(found, fastpool.splade(LOGITS, MASK, pooling=pooling, activation=activation))
    assert module.embedding_dimension == 50
    assert module.get_config_dict()["embedding_dimension"] == 50


def test_padding_reaches_nothing_and_training_works(ours: Any) -> None:
    logits = LOGITS.masked_fill(MASK[..., None] == 0, torch.nan).requires_grad_()
    module = ours(modules.SpladePooling().train())
    result = module(features("padded", logits))["sentence_embedding"]
    result.sum().backward()
    assert result.isfinite().all()
    assert logits.grad is not None
    assert not logits.grad[MASK == 0].any()
    assert logits.grad.isfinite().all()


def test_unpatch() -> None:
    model = torch.nn.Sequential(modules.SpladePooling())
    plugin.patch(model)
    assert "forward" in vars(model[0])
    plugin.unpatch(model)
    assert "forward" not in vars(model[0])


def test_token_vectors_are_normalised(ours: Any) -> None:
    """As the last module of a MultiVectorEncoder does."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    module = ours(Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings"))
    found = module({"token_embeddings": LOGITS})["token_embeddings"]
    assert torch.equal(found, fastpool.l2_normalize(LOGITS))


class _Words:
    """A tokenizer of a few words."""

    unk_token_id, unk_token = 1, "[UNK]"

    def convert_tokens_to_ids(self, word: str) -> int:
        return {".": 5, ",": 6}.get(word, self.unk_token_id)


@pytest.mark.parametrize("task", [None, "document", "query"])
@pytest.mark.parametrize("keep", [None, [5, 7, 9]])
@pytest.mark.parametrize("tasks", [None, ["query", "document"]])
@pytest.mark.parametrize("words", [[], [".", ",", "nowhere"]])
def test_multi_vector_mask(
    words: list[str], tasks: list[str] | None, keep: list[int] | None, task: str | None, ours: Any
) -> None:
    """Theirs, in every way that it has of leaving tokens out; padded, unpadded, and without ids."""
    package = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")
    ids = torch.tensor([[2, 5, 7, 6, 9, 3], [2, 9, 9, 3, 0, 0]])
    mask, expansion = (ids != 0).long(), torch.zeros(2, 6, dtype=torch.bool)
    expansion[1, 4:] = True
    flat = {"input_ids": ids[ids != 0][None], "cu_seq_lens_q": torch.tensor([0, 6, 10]), "seq_idx": None}
    given = [
        {"input_ids": ids, "attention_mask": mask, "query_expansion_positions": expansion},
        {**flat, "token_embeddings": torch.randn(1, 10, 4)},
        {"attention_mask": mask},
    ]
    theirs = package.MultiVectorMask.__dict__["forward"]
    theirs = getattr(theirs, "fastpool_replaces", theirs)

    def made() -> Any:
        module = package.MultiVectorMask(words, skiplist_tasks=tasks, keep_only_token_ids=keep)
        module.resolve_with_tokenizer(_Words())
        return module

    for features in given:
        expected, found = theirs(made(), dict(features), task=task), ours(made())(dict(features), task=task)
        assert expected.keys() == found.keys()
        assert torch.equal(expected["attention_mask"], found["attention_mask"])
        assert expected["attention_mask"].dtype == found["attention_mask"].dtype


def test_where_results_differ(ours: Any) -> None:
    """The page's rows: in 16 bits, and where padding holds NaN."""
    theirs = modules.SpladePooling.__dict__["forward"]
    theirs = getattr(theirs, "fastpool_replaces", theirs)
    logits = LOGITS.bfloat16()
    exact = fastpool.splade(logits.double(), MASK, pooling="sum")

    def error(found: Tensor) -> float:
        return float((found.double() - exact).norm())

    module = modules.SpladePooling("sum").eval()
    rounded = error(theirs(module, features("padded", logits))["sentence_embedding"])
    assert error(ours(module)(features("padded", logits))["sentence_embedding"]) < rounded / 1.3
    poisoned = LOGITS.masked_fill(MASK[..., None] == 0, torch.nan)
    module = modules.SpladePooling().eval()
    assert theirs(module, features("padded", poisoned))["sentence_embedding"].isnan().any()
    assert not ours(module)(features("padded", poisoned))["sentence_embedding"].isnan().any()
