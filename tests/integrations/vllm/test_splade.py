"""vLLM's SPLADE pooling by fastpool."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastpool
from fastpool.integrations import vllm as plugin
from fastpool.testing import same_bits
from tests.helpers.vllm_batches import LENGTHS, WIDTH, Ops, metadata, tokens

WORDS = 1500
CLS, SEP = 101, 102
poolings = pytest.mark.parametrize("pooling", ["max", "sum"])
# The ids that the first and the last token of each text have; which it loses.
ENDS: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "both": ([(CLS, SEP)] * 5, {}),
    "neither": ([(7, 8)] * 5, {}),
    "some": ([(CLS, 8), (CLS, CLS), (7, SEP), (SEP, CLS), (CLS, SEP)], {}),
    "kept": ([(CLS, SEP)] * 5, {"remove_cls_sep": False}),
    "unknown": ([(CLS, SEP)] * 5, {"cls_token_id": None, "sep_token_id": None}),
    "only_cls": ([(CLS, SEP)] * 5, {"sep_token_id": None}),
    "alike": ([(7, 7)] * 5, {"cls_token_id": 7, "sep_token_id": 7}),
    "others": ([(7, 8)] * 5, {"cls_token_id": 7, "sep_token_id": 8}),
}


def token_ids(ends: list[tuple[int, int]], lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    """Of texts of one token the id of the last."""
    made = [torch.full((length,), 9) for length in lengths]
    for ids, (first, last) in zip(made, ends, strict=True):
        ids[0], ids[-1] = first, last
    return made


def head(engine: Any, dtype: torch.dtype = torch.float32, words: int = WORDS) -> Any:
    torch.manual_seed(0)
    return engine.BertMLMHead(WIDTH, words).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ENDS)
@poolings
def test_what_vllm_gave(engine: SimpleNamespace, pooling: str, case: str, dtype: torch.dtype) -> None:
    ends, options = ENDS[case]
    pooler = engine.SPLADESparsePooler(head(engine, dtype), pooling=pooling, **options)
    hidden, given = tokens(dtype), metadata(engine, ids=token_ids(ends))
    before = pooler(hidden, given)
    plugin.register()
    with Ops() as ops:
        after = pooler(hidden_states=hidden, pooling_metadata=given)
    assert f"fastpool::splade_{pooling}_relu" in ops.names
    assert (after.shape, after.dtype, after.is_contiguous()) == (before.shape, before.dtype, True)
    assert (before > 0).any(1).tolist() == (after > 0).any(1).tolist()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(after, before, **close)


@poolings
def test_every_row_in_one_call(attached: SimpleNamespace, pooling: str) -> None:
    mlm_head, ends = head(attached), ENDS["both"][0]
    pooler = attached.SPLADESparsePooler(mlm_head, pooling=pooling)
    hidden = tokens(torch.float32)
    result = pooler(hidden, metadata(attached, ids=token_ids(ends)))
    begins = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    starts, ends_at = begins + torch.tensor([1, 0, 1, 1, 1]), begins + torch.tensor(LENGTHS) - 1
    logits = mlm_head(hidden)
    assert same_bits(result, fastpool.splade(logits, starts=starts, ends=ends_at, pooling=pooling))
    assert not result[1].any()  # of [SEP] alone nothing is left


@poolings
def test_the_logits_never_exist(attached: SimpleNamespace, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than a chunk has: the decoder runs once for each chunk, whatever the number of requests."""
    monkeypatch.setattr("fastpool.sparse._CHUNK_BYTES", 0)
    pooler = attached.SPLADESparsePooler(head(attached), pooling=pooling)
    counts = []
    for requests in (1, 40):
        given = metadata(attached, [4] * requests, ids=token_ids([(CLS, SEP)] * requests, [4] * requests))
        with torch.inference_mode(), Ops() as ops:
            result = pooler(tokens(torch.float32, [4] * requests), given)
        assert result.shape == (requests, WORDS)
        counts.append(ops.names)
    assert counts[0] == counts[1]
    assert counts[0].count(f"fastpool::splade_{pooling}_relu") == 2
    assert not {"aten::item", "aten::_local_scalar_dense"} & set(counts[0])  # nothing waits for a GPU


@poolings
def test_other_heads_are_vllms_own(attached: SimpleNamespace, pooling: str) -> None:
    class Doubled(attached.BertMLMHead):  # type: ignore[name-defined, misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.transform(hidden_states))

        def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * hidden_states

    class Linear(torch.nn.Linear):
        pass

    ends, hidden = ENDS["both"][0], tokens(torch.float32)
    doubled = Doubled(WIDTH, WORDS).requires_grad_(False)
    quantized = head(attached)
    quantized.decoder = Linear(WIDTH, WORDS).requires_grad_(False)
    for other in (doubled, quantized):
        pooler = attached.SPLADESparsePooler(other, pooling=pooling)
        with Ops() as ops:
            result = pooler(hidden, metadata(attached, ids=token_ids(ends)))
        assert not [name for name in ops.names if name.startswith("fastpool::")]
        text = other(hidden[1 : LENGTHS[0] - 1])
        expected = fastpool.splade(text, cu_seqlens=torch.tensor([0, len(text)]), pooling=pooling)[0]
        torch.testing.assert_close(result[0], expected)


def test_a_part_of_the_tokens_is_vllms_own(attached: SimpleNamespace) -> None:
    pooler = attached.SPLADESparsePooler(head(attached))
    given = metadata(attached, ids=token_ids(ENDS["neither"][0]))
    with Ops() as ops:
        pooler(tokens(torch.float32, [*LENGTHS, 3]), given)
    assert not [name for name in ops.names if name.startswith("fastpool::")]


def test_no_requests_are_refused_as_before(attached: SimpleNamespace) -> None:
    pooler = attached.SPLADESparsePooler(head(attached))
    given = metadata(attached, [])
    given.prompt_token_ids_cpu = torch.zeros(0, 0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="non-empty"):
        pooler(tokens(torch.float32, []), given)


def test_token_ids_are_needed(attached: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="prompt_token_ids is required"):
        attached.SPLADESparsePooler(head(attached))(tokens(torch.float32), metadata(attached))
