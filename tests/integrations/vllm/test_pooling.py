"""vLLM's pooling by fastpool: its pooling methods and its head."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastpool
from fastpool.integrations import vllm as plugin
from fastpool.testing import same_bits
from tests.helpers.vllm_batches import LENGTHS, WIDTH, Ops, metadata, tokens

MODES = {"MEAN": "mean", "CLS": "cls", "LAST": "last"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
modes = pytest.mark.parametrize("kind", MODES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def embedder(engine: Any, kind: str, **head: Any) -> Any:
    """What vLLM makes for the task `embed`: a float32 head that normalises, unless told otherwise."""
    head = {"head_dtype": torch.float32, "activation": engine.PoolerNormalize()} | head
    return engine.SequencePooler(engine.get_seq_pooling_method(kind), engine.EmbeddingPoolerHead(**head))


def formula(kind: str, hidden: torch.Tensor, lengths: list[int] = LENGTHS) -> torch.Tensor:
    """The pooling itself, in float64."""
    texts = hidden.double().split(lengths)
    return torch.stack([{"MEAN": text.mean(0), "CLS": text[0], "LAST": text[-1]}[kind] for text in texts])


def directly(kind: str, hidden: torch.Tensor, lengths: list[int] = LENGTHS, **options: Any) -> torch.Tensor:
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]))
    return getattr(fastpool, MODES[kind])(hidden, cu_seqlens=cu_seqlens, **options)


# ---- the pooling methods


@dtypes
@modes
def test_methods(attached: SimpleNamespace, kind: str, dtype: torch.dtype) -> None:
    hidden = tokens(dtype)
    method = attached.get_seq_pooling_method(kind)
    assert isinstance(method, attached.SequencePoolingMethod)
    out_dtype = torch.float32 if kind == "MEAN" else dtype
    expected = directly(kind, hidden, out_dtype=out_dtype)
    for index in (torch.int32, torch.int64):
        assert same_bits(method(hidden, metadata(attached, index=index)), expected)
    torch.testing.assert_close(expected.double(), formula(kind, hidden), rtol=1e-6, atol=1e-7)


@dtypes
@modes
def test_methods_give_what_vllm_gave(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    # vLLM's own mean copies the lengths through pinned memory, which takes a GPU.
    monkeypatch.setattr(engine.methods, "async_tensor_h2d", lambda x, device, dtype: x.to(device, dtype), raising=False)
    hidden, given = tokens(dtype), metadata(engine)
    method = engine.get_seq_pooling_method(kind)
    before = method(hidden, given)
    plugin.register()
    after = method(hidden, given)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["MEAN", "CLS"])
def test_partial_prefill_is_refused(attached: SimpleNamespace, kind: str) -> None:
    given = metadata(attached, [3, 4], prompts=[3, 9])
    hidden = tokens(torch.bfloat16, [3, 4])
    for call in (attached.get_seq_pooling_method(kind), embedder(attached, kind)):
        with pytest.raises(RuntimeError, match=f"partial prefill.*{kind}"):
            call(hidden, given)


def test_last_of_a_part_of_a_prompt(attached: SimpleNamespace) -> None:
    hidden = tokens(torch.bfloat16, [3, 4])
    result = attached.LastPool()(hidden, metadata(attached, [3, 4], prompts=[3, 9]))
    assert same_bits(result, hidden[[2, 6]])


@modes
def test_no_sequences_and_no_tokens(attached: SimpleNamespace, kind: str) -> None:
    out_dtype = torch.float32 if kind == "MEAN" else torch.bfloat16
    for hidden in (tokens(torch.bfloat16, []), tokens(torch.bfloat16, [4])):
        pooled = attached.get_seq_pooling_method(kind)(hidden, metadata(attached, []))
        assert (pooled.shape, pooled.dtype) == ((0, WIDTH), out_dtype)
        assert embedder(attached, kind)(hidden, metadata(attached, [])).shape == (0, WIDTH)
    empty = attached.get_seq_pooling_method(kind)(tokens(torch.bfloat16, []), metadata(attached, [0, 0]))
    assert same_bits(empty, torch.zeros(2, WIDTH, dtype=out_dtype))


@modes
def test_a_group_of_a_batch(attached: SimpleNamespace, kind: str) -> None:
    """DispatchPooler hands on a slice of the tokens and moves the indices; rows of nobody may follow."""
    hidden = tokens(torch.bfloat16)
    group = metadata(attached)[1:3]
    shift = LENGTHS[0]
    cursor = replace(
        group.pooling_cursor,
        first_token_indices_gpu=group.pooling_cursor.first_token_indices_gpu - shift,
        last_token_indices_gpu=group.pooling_cursor.last_token_indices_gpu - shift,
    )
    result = embedder(attached, kind)(hidden[shift:], replace(group, pooling_cursor=cursor))
    assert same_bits(result, embedder(attached, kind)(hidden, metadata(attached))[1:3])


def test_what_vllm_patches_in_its_tests_stays(attached: SimpleNamespace) -> None:
    assert attached.methods._MEAN_POOL_ACCUMULATION_CHUNK_BYTES > 0


# ---- the pooling method and the head


@pytest.mark.parametrize("head_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dimensions", [None, 16, WIDTH, 1000])
@pytest.mark.parametrize("normalize", [True, False])
@modes
def test_requests_that_want_the_same(
    attached: SimpleNamespace, kind: str, normalize: bool, dimensions: int | None, head_dtype: torch.dtype | None
) -> None:
    hidden = tokens(torch.bfloat16)
    truncate_dim = dimensions and min(dimensions, WIDTH)
    out_dtype = head_dtype or (torch.float32 if kind == "MEAN" else torch.bfloat16)
    pooler = embedder(attached, kind, head_dtype=head_dtype)
    given = metadata(attached, wanted=[(dimensions, normalize)] * len(LENGTHS))
    with Ops() as ops:
        result = pooler(hidden, given)
    assert ops.names == ["aten::add", f"fastpool::{MODES[kind]}"]
    assert same_bits(
        result, directly(kind, hidden, truncate_dim=truncate_dim, normalize=normalize, out_dtype=out_dtype)
    )
    expected = formula(kind, hidden)[:, :truncate_dim]
    if normalize:
        expected /= expected.norm(dim=-1, keepdim=True)
    rounding = {"rtol": 2**-8, "atol": 0.0} if out_dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(result.double(), expected, **rounding)


def test_a_head_without_activation(attached: SimpleNamespace) -> None:
    hidden = tokens(torch.bfloat16)
    result = embedder(attached, "MEAN", activation=None)(hidden, metadata(attached))
    assert same_bits(result, directly("MEAN", hidden, out_dtype=torch.float32))


# What requests want, (dimensions, use_activation), and how many rows of it are normalised to sizes of their own.
MIXES: dict[str, tuple[list[tuple[int | None, bool | None]], bool]] = {
    "everything": ([(16, True), (None, True), (16, False), (16, True), (WIDTH, None)], True),
    "sizes": ([(16, True), (None, True), (7, True), (1, True), (1000, True)], True),
    "sizes_alone": ([(16, False), (None, False), (7, False), (1, False), (1000, False)], False),
    "activation": ([(16, True), (16, False), (16, True), (16, None), (16, True)], False),
    "others_sizes": ([(16, True), (None, False), (16, True), (3, False), (16, True)], False),
    "one_size_twice": ([(None, True), (WIDTH, True), (None, True), (1000, True), (None, True)], False),
}


@pytest.mark.parametrize("head_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
@dtypes
@modes
def test_requests_that_differ(
    attached: SimpleNamespace, kind: str, dtype: torch.dtype, mix: str, head_dtype: torch.dtype | None
) -> None:
    """Each request gets the bits that it gets among its likes, and its size, from one pooling and one normalisation."""
    hidden, (wanted, truncate_dims) = tokens(dtype), MIXES[mix]
    pooler, given = embedder(attached, kind, head_dtype=head_dtype), metadata(attached, wanted=wanted)
    with Ops() as ops:
        result = pooler(hidden, given)
    assert isinstance(result, list)
    for row, one in enumerate(wanted):
        assert result[row].shape == (min(one[0] or WIDTH, WIDTH),)
        assert same_bits(result[row], pooler(hidden, metadata(attached, wanted=[one] * len(LENGTHS)))[row])
    normalizes = [bool(normalize) for _, normalize in wanted]
    out_dtype = head_dtype or (torch.float32 if kind == "MEAN" else dtype)
    expected = ["aten::add", f"fastpool::{MODES[kind]}"]
    expected += ["aten::_to_copy"] * (not all(normalizes) and out_dtype != torch.float32)
    expected += ["fastpool::l2_normalize"] * any(normalizes)
    assert [name for name in ops.names if name != "aten::lift_fresh"] == expected
    assert ["truncate_dims" in options for options in ops.of("fastpool::l2_normalize")] == [truncate_dims] * any(
        normalizes
    )


def test_many_kinds_of_requests(attached: SimpleNamespace) -> None:
    """Forty kinds of requests take as many ops as two."""
    counts = []
    for kinds in (2, 40):
        wanted = [(1 + n % kinds, n % 3 > 0) for n in range(80)]
        hidden, given = tokens(torch.bfloat16, [2] * 80), metadata(attached, [2] * 80, wanted=wanted)
        with Ops() as ops:
            embedder(attached, "MEAN", head_dtype=torch.bfloat16)(hidden, given)
        counts.append(ops.names)
    assert counts[0] == counts[1]
    assert counts[0].count("fastpool::l2_normalize") == 1


def test_sizes_are_copied_without_waiting(attached: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pinned memory to a GPU; there is none here, so torch is only listened to."""
    made: list[dict[str, Any]] = []

    def tensor(values: list[int], **options: Any) -> Any:
        made.append(options)
        return SimpleNamespace(to=lambda device, **more: made.append({"device": device, **more}))

    monkeypatch.setattr(plugin, "torch", SimpleNamespace(tensor=tensor, int32=torch.int32))
    for device, pinned in (("cuda", True), ("cpu", False)):
        plugin._on_device([1, 2], torch.device(device))
        assert made == [
            {"dtype": torch.int32, "pin_memory": pinned},
            {"device": torch.device(device), "non_blocking": True},
        ]
        made.clear()


def test_the_batch_does_not_matter(attached: SimpleNamespace) -> None:
    hidden, pooler = tokens(torch.bfloat16), embedder(attached, "MEAN")
    together = pooler(hidden, metadata(attached))
    for row, text in enumerate(hidden.split(LENGTHS)):
        assert same_bits(pooler(text, metadata(attached, [len(text)]))[0], together[row])


@pytest.mark.parametrize("wanted", [None, [(8, True), (None, False), (8, True), (None, True), (20, True)]])
@modes
def test_other_heads_are_vllms_own(attached: SimpleNamespace, kind: str, wanted: Any) -> None:
    """A projector, another activation, a head or a pooling method of somebody else's: the head runs as it is."""
    hidden, given = tokens(torch.bfloat16), metadata(attached, wanted=wanted)
    pooled = directly(kind, hidden, out_dtype=torch.float32)

    class Doubled(attached.EmbeddingPoolerHead):  # type: ignore[name-defined, misc]
        def forward(self, pooled_data: Any, pooling_metadata: Any) -> Any:
            return [2 * one for one in super().forward(pooled_data, pooling_metadata)]

    class Halved(attached.MeanPool):  # type: ignore[name-defined, misc]
        def forward(self, hidden_states: Any, pooling_metadata: Any) -> Any:
            return super().forward(hidden_states, pooling_metadata) / 2

    def finish(rows: torch.Tensor, normalize: bool = True, factor: float = 1.0) -> list[torch.Tensor]:
        wants = [(p.dimensions, p.use_activation) for p in given.pooling_params]
        cut = [row[:d] for row, (d, _) in zip(rows, wants, strict=True)]
        return [
            factor * (torch.nn.functional.normalize(row, dim=-1) if a and normalize else row)
            for row, (_, a) in zip(cut, wants, strict=True)
        ]

    linear = torch.nn.Linear(WIDTH, 24).requires_grad_(False)
    head = attached.EmbeddingPoolerHead(None, torch.float32, attached.PoolerNormalize())
    doubled = Doubled(None, torch.float32, attached.PoolerNormalize())
    method = attached.get_seq_pooling_method(kind)
    cases = [
        (embedder(attached, kind, projector=linear), finish(linear(pooled))),
        (embedder(attached, kind, activation=attached.PoolerIdentity()), finish(pooled, normalize=False)),
        (attached.SequencePooler(method, doubled), finish(pooled, factor=2.0)),
        (attached.SequencePooler(Halved(), head), finish(directly("MEAN", hidden, out_dtype=torch.float32) / 2)),
        (attached.SequencePooler(lambda h, m: pooled, head), finish(pooled)),
    ]
    for pooler, expected in cases:
        for got, want in zip(pooler(hidden, given), expected, strict=True):
            assert same_bits(got, want)


def test_requests_must_match_sequences(attached: SimpleNamespace) -> None:
    given = metadata(attached)
    given.pooling_params.pop()
    with pytest.raises(ValueError, match="length"):
        embedder(attached, "MEAN")(tokens(torch.bfloat16), given)


def test_inference_mode(attached: SimpleNamespace) -> None:
    expected = directly("MEAN", tokens(torch.bfloat16), normalize=True, out_dtype=torch.float32)
    with torch.inference_mode():
        hidden, given = tokens(torch.bfloat16), metadata(attached)
        mixed = metadata(attached, wanted=[(None, True), (8, True), *[(None, True)] * 3])
        pooler = embedder(attached, "MEAN")
        assert same_bits(pooler(hidden_states=hidden, pooling_metadata=given), expected)
        assert same_bits(pooler(hidden, mixed)[2], expected[2])
