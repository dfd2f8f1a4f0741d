"""vLLM's embeddings of tokens by fastpool: its method ALL, its head, and late chunking."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastpool
from fastpool.integrations import vllm as plugin
from fastpool.testing import same_bits
from tests.helpers.vllm_batches import LENGTHS, WIDTH, Ops, metadata, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What requests want: (dimensions, use_activation).
WANTED: dict[str, list[tuple[int | None, bool | None]]] = {
    "all": [(None, True)] * 5,
    "truncated": [(16, True)] * 5,
    "plain": [(None, False)] * 5,
    "plain_truncated": [(16, None)] * 5,
    "sizes": [(16, True), (None, True), (7, True), (1, True), (1000, True)],
    "activation": [(16, True), (16, False), (16, True), (16, None), (16, True)],
    "everything": [(16, True), (None, True), (16, False), (3, True), (20, None)],
}
PROJECTORS = ("none", "linear", "dense")


def all_pool(engine: Any, kind: str = "AllPool", **options: Any) -> Any:
    """Without the configuration of an engine, which vLLM's own asks for."""
    made = getattr(engine, kind).__new__(getattr(engine, kind))
    nn.Module.__init__(made)
    vars(made).update({"output_sizes_fn": None, "enable_chunked_prefill": False, "clone_finished": True} | options)
    return made


def pooler(engine: Any, projector: Any = "none", pooling: Any = None, **head: Any) -> Any:
    """What vLLM makes for the task `token_embed`: a float32 head that normalises, unless told otherwise."""
    head = {"head_dtype": torch.float32, "activation": engine.PoolerNormalize()} | head
    torch.manual_seed(0)
    known = {
        "none": None,
        "linear": nn.Linear(WIDTH, 24, bias=False),
        "dense": nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 32), nn.Identity()),
    }
    head["projector"] = made = known[projector] if isinstance(projector, str) else projector
    if made is not None:
        made.to(head["head_dtype"]).requires_grad_(False)
    return engine.TokenPooler(pooling or all_pool(engine), engine.TokenEmbeddingPoolerHead(**head))


def ours(ops: Ops) -> list[str]:
    return [name for name in ops.names if name.startswith("fastpool::")]


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}


# A projector has the dtype of the head.
@pytest.mark.parametrize(
    ("projector", "head_dtype"), [("none", None), *itertools.product(PROJECTORS, (torch.float32, torch.bfloat16))]
)
@pytest.mark.parametrize("case", WANTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_vllm_gave(
    engine: SimpleNamespace, dtype: torch.dtype, projector: str, case: str, head_dtype: torch.dtype | None
) -> None:
    hidden, given = tokens(dtype), metadata(engine, wanted=WANTED[case])
    token_pooler = pooler(engine, projector, head_dtype=head_dtype)
    before = token_pooler(hidden, given)
    plugin.register()
    with Ops() as ops:
        after = token_pooler(hidden_states=hidden, pooling_metadata=given)
    normalizes = any(normalize for _, normalize in WANTED[case])
    assert ours(ops) == ["fastpool::l2_normalize"] * normalizes
    assert isinstance(after, list)
    for one, other in zip(after, before, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other, **close(one.dtype))


@pytest.mark.parametrize("case", WANTED)
@pytest.mark.parametrize("head_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(attached: SimpleNamespace, dtype: torch.dtype, head_dtype: torch.dtype | None, case: str) -> None:
    """A token has the bits of l2_normalize by itself, whatever else is asked for beside it."""
    hidden, given = tokens(dtype), metadata(attached, wanted=WANTED[case])
    result = pooler(attached, head_dtype=head_dtype)(hidden, given)
    for text, one, (dimensions, normalize) in zip(hidden.split(LENGTHS), result, WANTED[case], strict=True):
        out_dtype, size = head_dtype or dtype, min(dimensions or WIDTH, WIDTH)
        plain = text[:, :size].to(out_dtype)
        expected = fastpool.l2_normalize(text[:, :size], out_dtype=out_dtype) if normalize else plain
        assert same_bits(one.contiguous(), expected.contiguous())


@pytest.mark.parametrize("case", ["plain", "everything"])
@pytest.mark.parametrize("projector", [None, nn.Identity()], ids=str)
def test_results_outlive_hidden(attached: SimpleNamespace, projector: Any, case: str) -> None:
    """vLLM's next step overwrites hidden before results are copied to the host."""
    hidden, given = tokens(torch.float32), metadata(attached, wanted=WANTED[case])
    result = pooler(attached, head_dtype=None, projector=projector)(hidden, given)
    before = [one.clone() for one in result]
    hidden.zero_()
    assert all(same_bits(one, other) for one, other in zip(result, before, strict=True))


def test_a_head_without_activation(attached: SimpleNamespace) -> None:
    hidden, given, token_pooler = tokens(torch.bfloat16), metadata(attached), pooler(attached, activation=None)
    with Ops() as ops:
        result = token_pooler(hidden, given)
    assert ops.names == ["aten::_to_copy"]
    assert same_bits(torch.cat(result), hidden.float())


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("case", ["all", "sizes", "everything"])
def test_many_requests(attached: SimpleNamespace, projector: str, case: str) -> None:
    """Forty requests take as many ops as five."""
    token_pooler, counts = pooler(attached, projector), []
    for times in (1, 8):
        lengths = [3] * 5 * times
        hidden, given = tokens(torch.bfloat16, lengths), metadata(attached, lengths, WANTED[case] * times)
        with Ops() as ops:
            token_pooler(hidden, given)
        counts.append(ops.names)
    assert counts[0] == counts[1]


def test_chunked_prefill(attached: SimpleNamespace) -> None:
    """Parts of prompts are vLLM's to keep; a step of whole prompts is fastpool's."""
    token_pooler = pooler(attached, pooling=all_pool(attached, enable_chunked_prefill=True))
    hidden = tokens(torch.bfloat16, [3, 4])
    first = metadata(attached, [3, 4], prompts=[3, 9])
    first.pooling_cursor.finished_mask = [True, False]
    with Ops() as ops:
        whole, part = token_pooler(hidden, first)
    assert not ours(ops)
    assert part is None
    torch.testing.assert_close(whole, nn.functional.normalize(hidden[:3].float(), dim=-1))
    assert len(first.pooling_states[1].hidden_states_cache) == 1

    rest = tokens(torch.bfloat16, [5])
    second = metadata(attached, [5], prompts=[9])
    second.pooling_cursor.finished_mask, second.pooling_states = [True], first.pooling_states[1:]
    (joined,) = token_pooler(rest, second)
    expected = nn.functional.normalize(torch.cat([hidden[3:], rest]).float(), dim=-1)
    torch.testing.assert_close(joined, expected)
    assert not first.pooling_states[1].hidden_states_cache

    with Ops() as ops:
        token_pooler(hidden, metadata(attached, [3, 4]))
    assert ours(ops) == ["fastpool::l2_normalize"]


def test_what_is_vllms_own(attached: SimpleNamespace) -> None:
    """Another method, head, activation or projector; widths of each request's own."""

    class Doubled(attached.TokenEmbeddingPoolerHead):  # type: ignore[name-defined, misc]
        def forward_chunk(self, pooled_data: Any, pooling_param: Any) -> Any:
            return 2 * super().forward_chunk(pooled_data, pooling_param)

    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    hidden, ids = tokens(torch.float32), [torch.arange(length) % 3 for length in LENGTHS]
    given = metadata(attached, ids=ids)
    for one in given.pooling_params:
        one.step_tag_id = 0
    texts, normal = hidden.split(LENGTHS), nn.functional.normalize
    doubled = Doubled(head_dtype=None, activation=attached.PoolerNormalize())
    narrow = all_pool(attached, output_sizes_fn=lambda: [5] * len(LENGTHS))
    cases = [
        (attached.TokenPooler(all_pool(attached), doubled), [2 * normal(text, dim=-1) for text in texts]),
        (attached.TokenPooler(all_pool(attached), None), list(texts)),
        (pooler(attached, activation=attached.PoolerIdentity()), list(texts)),
        (pooler(attached, projector=Centred()), [normal(text - text.mean(0), dim=-1) for text in texts]),
        (
            pooler(attached, projector=nn.Sequential(nn.Identity(), Centred())),
            [normal(text - text.mean(0), dim=-1) for text in texts],
        ),
        (pooler(attached, pooling=all_pool(attached, "StepPool")), [normal(text[::3], dim=-1) for text in texts]),
        (pooler(attached, pooling=narrow), [normal(text[:, :5], dim=-1) for text in texts]),
    ]
    for token_pooler, expected in cases:
        if token_pooler.pooling is narrow and attached.vllm.__version__.startswith("0.32"):
            continue  # has no such widths
        with Ops() as ops:
            result = token_pooler(hidden, given)
        assert not ours(ops)
        torch.testing.assert_close(result, expected)


def test_no_requests(attached: SimpleNamespace) -> None:
    assert pooler(attached)(tokens(torch.float32, []), metadata(attached, [])) == []


def test_requests_must_match_sequences(attached: SimpleNamespace) -> None:
    given = metadata(attached)
    given.pooling_params.pop()
    with pytest.raises(ValueError, match="length"):
        pooler(attached)(tokens(torch.float32), given)


def test_inference_mode(attached: SimpleNamespace) -> None:
    expected = pooler(attached)(tokens(torch.bfloat16), metadata(attached))
    with torch.inference_mode():
        result = pooler(attached)(tokens(torch.bfloat16), metadata(attached))
    assert all(same_bits(one, other) for one, other in zip(result, expected, strict=True))


# ---- late chunking, since vLLM 0.33

# Sizes of chunks; None: every token.
CHUNKS: dict[str, list[int | None]] = {
    "same": [16] * 5,
    "different": [4, 1, 1000, 64, 7],
    "of_one": [1] * 5,
    "some": [4, None, 32, None, 2**63 - 1],
}
chunked = pytest.mark.parametrize("chunks", CHUNKS)


@pytest.fixture
def late(engine: SimpleNamespace) -> SimpleNamespace:
    if not hasattr(engine, "LateChunkingParams"):
        pytest.skip(f"vLLM {engine.vllm.__version__} has no late chunking")
    return engine


@pytest.mark.parametrize(
    ("projector", "head_dtype"), [("none", None), *itertools.product(PROJECTORS, (torch.float32, torch.bfloat16))]
)
@pytest.mark.parametrize("case", ["all", "plain_truncated", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@chunked
def test_late_chunking(
    late: SimpleNamespace, chunks: str, dtype: torch.dtype, case: str, projector: str, head_dtype: torch.dtype | None
) -> None:
    hidden, given = tokens(dtype), metadata(late, wanted=WANTED[case], chunks=CHUNKS[chunks])
    token_pooler = pooler(late, projector, head_dtype=head_dtype)
    before = token_pooler(hidden, given)
    plugin.register()
    with Ops() as ops:
        after = token_pooler(hidden, given)
    normalizes = any(normalize for _, normalize in WANTED[case])
    assert ours(ops) == ["fastpool::mean"] + ["fastpool::l2_normalize"] * normalizes
    for one, other in zip(after, before, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other, **close(one.dtype))


@chunked
def test_late_chunking_is_the_mean(late: SimpleNamespace, chunks: str) -> None:
    plugin.register()
    hidden, given = tokens(torch.bfloat16), metadata(late, chunks=CHUNKS[chunks])
    result = pooler(late)(hidden, given)
    for text, one, size in zip(hidden.split(LENGTHS), result, CHUNKS[chunks], strict=True):
        parts = text.split(min(size or 1, len(text)))
        cu_seqlens = torch.tensor([0, *map(len, parts)]).cumsum(0)
        expected = fastpool.mean(text, cu_seqlens=cu_seqlens, normalize=True, out_dtype=torch.float32)
        assert same_bits(one.contiguous(), expected)


def test_late_chunking_of_many_requests(late: SimpleNamespace) -> None:
    plugin.register()
    token_pooler, counts = pooler(late), []
    for requests in (2, 40):
        given = metadata(late, [9] * requests, chunks=[4, 5] * (requests // 2))
        with Ops() as ops:
            token_pooler(tokens(torch.bfloat16, [9] * requests), given)
        counts.append(ops.names)
    assert counts[0] == counts[1]


def test_late_chunking_of_parts(late: SimpleNamespace) -> None:
    """Chunks go across the parts in which vLLM computes a prompt."""
    plugin.register()
    token_pooler = pooler(late, pooling=all_pool(late, enable_chunked_prefill=True))
    hidden = tokens(torch.float32, [9])
    first, second = (metadata(late, [length], prompts=[9], chunks=[4]) for length in (3, 6))
    first.pooling_cursor.finished_mask, second.pooling_cursor.finished_mask = [False], [True]
    second.pooling_states = first.pooling_states
    assert token_pooler(hidden[:3], first) == [None]
    (result,) = token_pooler(hidden[3:], second)
    (expected,) = token_pooler(hidden, metadata(late, [9], chunks=[4]))
    torch.testing.assert_close(result, expected)
