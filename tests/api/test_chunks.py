"""fastpool.chunks: where chunks, spans of characters and windows lie, against plain loops over them."""

import doctest
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpool
from fastpool import chunks
from fastpool.testing import error, function_of, same_bits, variants

LENGTHS = st.lists(st.integers(0, 40), max_size=6)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Of a chunk, and of its overlap."""
    size = draw(st.integers(1, 45))
    return size, draw(st.integers(0, size - 1))


def cut(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """A text's chunks, one after another, until one reaches its end."""
    found: list[tuple[int, int]] = []
    start = 0
    while length > 0 and (not found or found[-1][1] < length):
        found.append((start, min(start + size, length)))
        start += size - overlap
    return found


def cuts(lengths: list[int], first: int = 0) -> Tensor:
    return torch.tensor([first, *lengths]).cumsum(0)


# ---- fixed


@settings(max_examples=300, deadline=None)
@given(LENGTHS, sizes(), st.integers(0, 9), st.none() | st.integers(0, 5), st.sampled_from([torch.int32, torch.int64]))
def test_fixed(lengths: list[int], sizes: tuple[int, int], first: int, spare: int | None, dtype: torch.dtype) -> None:
    cu_seqlens = cuts(lengths, first).to(dtype)
    expected = [
        (start + before, end + before, b)
        for b, (length, before) in enumerate(zip(lengths, cu_seqlens.tolist(), strict=False))
        for start, end in cut(length, *sizes)
    ]
    total = None if spare is None else len(expected) + spare
    found = chunks.fixed(cu_seqlens, *sizes, total=total)
    end = int(cu_seqlens[-1])
    assert all(one.dtype == torch.int64 and one.dim() == 1 for one in found)
    assert list(zip(*(one.tolist() for one in found), strict=True)) == expected + [(end, end, len(lengths))] * (
        spare or 0
    )


@settings(max_examples=100, deadline=None)
@given(LENGTHS, sizes())
def test_each_chunk_has_a_token_that_is_new(lengths: list[int], sizes: tuple[int, int]) -> None:
    starts, ends, of = (one.tolist() for one in chunks.fixed(cuts(lengths), *sizes))
    for b, (begin, end) in enumerate(pairwise(cuts(lengths).tolist())):
        mine = [i for i in range(len(of)) if of[i] == b]
        assert {row for i in mine for row in range(starts[i], ends[i])} == set(range(begin, end))
        assert all(ends[i] < ends[j] and ends[i] - starts[j] == sizes[1] for i, j in pairwise(mine))


def test_sizes_of_any_int() -> None:
    most = 2**63 - 1
    assert chunks.fixed(cuts([5, 0, 3]), most, most - 1, total=9).starts.tolist() == [0, 5] + [8] * 7
    assert chunks.windows(most, most, 0) == [(0, most, 0)]
    assert chunks.windows(5, most, most - 1) == [(0, 5, 0)]


def test_fixed_in_a_whole_graph() -> None:
    """With a total nothing looks at values, and chunks behind the last pool to zeros."""
    torch._dynamo.reset()

    def pooled(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        of_texts = fastpool.chunks.fixed(cu_seqlens, 4, 1, total=8)
        return fastpool.mean(hidden, starts=of_texts.starts, ends=of_texts.ends, normalize=True)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    for lengths in ([7, 0, 3, 9], [1, 1, 1, 16]):
        hidden = torch.randn(19, 6)
        found = compiled(hidden, cuts(lengths))
        assert same_bits(found, pooled(hidden, cuts(lengths)))
        real = sum(len(cut(length, 4, 1)) for length in lengths)
        assert found[:real].any(1).all()
        assert not found[real:].any()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Ops for which a GPU's caller would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
            self.looks.append(str(op))
        return op(*args, **(kwargs or {}))


OFFSETS = [(0, 0), (0, 5), (6, 10), (10, 11), (0, 0)]


@pytest.mark.parametrize(
    ("call", "looks"),
    [
        (lambda: chunks.fixed(cuts([7, 3]), 4), 1),
        (lambda: chunks.fixed(cuts([7, 3]), 4, total=8), 0),
        (lambda: chunks.from_spans(torch.tensor(OFFSETS), torch.tensor([(0, 5)])), 0),
    ],
)
def test_looks_at_the_data(call: Callable[[], Any], looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where values are not checked."""
    monkeypatch.setattr(chunks, "_looks", lambda values: False)
    with Watch() as watch:
        call()
    assert len(watch.looks) == looks, watch.looks


def test_a_total_that_is_too_small_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_looks", lambda values: False)
    found = chunks.fixed(torch.tensor([0, 7, 4, 12]), 4, total=3)  # and a text that runs backwards
    assert [one.tolist() for one in found] == [[0, 4, 4], [4, 7, 8], [0, 0, 2]]


# ---- windows


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), sizes())
def test_windows(length: int, sizes: tuple[int, int]) -> None:
    """Each row is kept once, with all of the overlap before it; they lie as chunks do."""
    found = chunks.windows(length, *sizes)
    assert [row for _, end, new_from in found for row in range(new_from, end)] == list(range(length))
    assert [(start, end) for start, end, _ in found] == cut(length, *sizes)
    assert all(new_from - start == (sizes[1] if i else 0) for i, (start, _, new_from) in enumerate(found))


# ---- from_spans


def tokens_of(offsets: list[tuple[int, int]], a: int, b: int) -> tuple[int, int] | None:
    """The first and one behind the last token that has a character of [a, b)."""
    having = [i for i, (start, end) in enumerate(offsets) if max(start, a) < min(end, b)]
    return (having[0], having[-1] + 1) if having else None


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Offsets of tokens that go up, with gaps, special tokens among them, and several tokens of one character; spans."""
    offsets, at = [], 0
    for kind in draw(st.lists(st.sampled_from(["special", "word", "blank", "again", "empty"]), max_size=12)):
        if kind == "word":
            offsets.append((at, at := at + draw(st.integers(1, 4))))
        elif kind == "blank":
            at += draw(st.integers(1, 2))
        elif kind == "again" and at > 0:
            offsets.append((at - 1, at))
        else:
            offsets.append((0, 0) if kind != "empty" else (at, at))
    bounds = st.integers(0, at + 2)
    spans = draw(st.lists(st.tuples(bounds, bounds).map(lambda ab: (min(ab), max(ab))), max_size=6))
    return offsets, spans


def check(
    starts: list[int], ends: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], base: int = 0
) -> None:
    for start, end, (a, b) in zip(starts, ends, spans, strict=False):
        expected = tokens_of(offsets, a, b)
        if expected is None:
            assert start == end
            assert base <= start <= base + len(offsets)
        else:
            assert (start - base, end - base) == expected


@settings(max_examples=300, deadline=None)
@given(texts(), st.integers(0, 9), st.booleans())
def test_spans_of_one_text(
    text: tuple[list[tuple[int, int]], list[tuple[int, int]]], base: int, as_tensors: bool
) -> None:
    given_ = [torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2) if as_tensors else pairs for pairs in text]
    starts, ends = chunks.from_spans(*given_, base=base)
    assert starts.shape == ends.shape == (len(text[1]),)
    assert starts.dtype == ends.dtype == torch.int64
    check(starts.tolist(), ends.tolist(), *text, base=base)


@settings(max_examples=100, deadline=None)
@given(st.lists(texts(), min_size=1, max_size=4), st.booleans())
def test_spans_of_several_texts(batch: list[Any], packed: bool) -> None:
    """Ragged lists; as segments of packed rows, and as spans of padded ones."""
    offsets, spans = [one[0] for one in batch], [one[1] for one in batch]
    base = cuts([len(one) for one in offsets])[:-1] if packed else torch.zeros(len(batch), dtype=torch.int32)
    starts, ends = chunks.from_spans(offsets, spans, base=base)
    n = max(map(len, spans))
    assert starts.shape == ends.shape == (len(batch), n)
    for b in range(len(batch)):
        rows = offsets[b] + [(0, 0)] * (max(map(len, offsets)) - len(offsets[b]))
        check(starts[b].tolist(), ends[b].tolist(), rows, spans[b], int(base[b]))
        assert (ends - starts)[b, len(spans[b]) :].eq(0).all()


def test_spans_in_a_whole_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(chunks.from_spans, fullgraph=True, backend="aot_eager")
    given_ = torch.tensor([OFFSETS]), torch.tensor([[(0, 5), (6, 11), (5, 6)]])
    assert all(map(torch.equal, compiled(*given_), chunks.from_spans(*given_)))


# ---- pooled


def test_means_are_those_of_slices() -> None:
    """In float64, as jina-ai's chunked_pooling has them: embeddings[start:end].sum(0) / (end - start)."""
    hidden, cu_seqlens = torch.randn(300, 24), cuts([100, 0, 1, 199])
    for size, overlap in ((16, 0), (16, 5), (200, 150), (1, 0)):
        starts, ends, _ = chunks.fixed(cu_seqlens, size, overlap)
        spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
        expected = torch.stack([hidden[start:end].double().sum(0) / (end - start) for start, end in spans])
        for found, exact in zip(fastpool.mean(hidden, starts=starts, ends=ends), expected, strict=True):
            assert error(found, exact) <= 1
        double = fastpool.mean(hidden.double(), starts=starts, ends=ends)
        torch.testing.assert_close(double, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("mode", [mode for mode, own in variants() if own is None])
def test_every_mode_gives_the_bits_of_chunks_alone(mode: str) -> None:
    hidden, cu_seqlens = torch.randn(90, 24).bfloat16(), cuts([40, 0, 50])
    pool = function_of(mode)
    starts, ends, _ = chunks.fixed(cu_seqlens, 17, 4)
    alone = [pool(hidden[None, start:end]) for start, end in zip(starts, ends, strict=True)]
    assert same_bits(pool(hidden, starts=starts, ends=ends), torch.cat(alone))


def test_windows_make_one_text_of_states() -> None:
    """What is kept of each window is the whole, in order."""
    hidden = torch.randn(101, 24)
    kept = [hidden[start:end][new_from - start :] for start, end, new_from in chunks.windows(101, 30, 12)]
    assert same_bits(torch.cat(kept), hidden)


# ---- errors

CUTS = torch.tensor([0, 7, 10])
FIXED, SPANS, WINDOWS = ("fastpool.chunks." + one for one in ("fixed", "from_spans", "windows"))
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: chunks.fixed([0, 7], 4), TypeError, f"{FIXED}: cu_seqlens must be a torch.Tensor, got list"),
    (lambda: chunks.fixed(CUTS.float(), 4), TypeError, f"{FIXED}: cu_seqlens must be int32 or int64, got float32"),
    (lambda: chunks.fixed(CUTS[None], 4), ValueError, "cu_seqlens must be [B + 1], got shape [1, 3]"),
    (lambda: chunks.fixed(CUTS[:0], 4), ValueError, "cu_seqlens must be [B + 1], got shape [0]"),
    (lambda: chunks.fixed(CUTS.flip(0), 4), ValueError, "cu_seqlens must not decrease, got cu_seqlens[0] = 10 before cu_seqlens[1] = 7"),
    (lambda: chunks.fixed(CUTS - 1, 4), ValueError, "cu_seqlens must begin at 0 or behind, got cu_seqlens[0] = -1"),
    (lambda: chunks.fixed(freed(), 4), ValueError, "cu_seqlens must have memory for its elements"),
    (lambda: chunks.fixed(CUTS, 0), ValueError, f"{FIXED}: size must be at least 1, got 0"),
    (lambda: chunks.fixed(CUTS, 4.0), TypeError, "size must be an int, got float"),
    (lambda: chunks.fixed(CUTS, 4, -1), ValueError, "overlap must be at least 0, got -1"),
    (lambda: chunks.fixed(CUTS, 4, 4), ValueError, "overlap must be less than size, or no chunk would end, got 4 of 4"),
    (lambda: chunks.fixed(CUTS, 4, total=2), ValueError, "total must be at least 3, the chunks there are, got 2"),
    (lambda: chunks.fixed(CUTS, 4, total=-1), ValueError, "total must be at least 0, got -1"),
    (lambda: chunks.fixed(CUTS, 4, total=True), TypeError, "total must be an int, got bool"),
    (lambda: chunks.windows(-1, 4), ValueError, f"{WINDOWS}: length must be at least 0, got -1"),
    (lambda: chunks.windows(9, 4, 5), ValueError, f"{WINDOWS}: overlap must be less than size"),
    (lambda: chunks.windows(torch.tensor(9), 4), TypeError, "length must be an int, got Tensor"),
    (lambda: chunks.from_spans("plain", []), TypeError, f"{SPANS}: offset_mapping must be a tensor or lists of pairs of ints, got str"),
    (lambda: chunks.from_spans(None, []), TypeError, "offset_mapping must be a tensor or lists of pairs of ints, got NoneType"),
    (lambda: chunks.from_spans(OFFSETS, [(0, 5), (6,)]), TypeError, "spans must be a tensor or lists of pairs of ints, got list"),
    (lambda: chunks.from_spans(OFFSETS, [(0.5, 1.0)]), TypeError, "spans must be int32 or int64, got float32"),
    (lambda: chunks.from_spans(OFFSETS, [(0, 5, 6)]), ValueError, "spans must be pairs of one text, [n, 2], or of several, [B, n, 2], got shape [1, 3]"),
    (lambda: chunks.from_spans(torch.tensor([0, 5]), []), ValueError, "offset_mapping must be pairs of one text, [n, 2], or of several, [B, n, 2], got shape [2]"),
    (lambda: chunks.from_spans([OFFSETS], [(0, 5)]), ValueError, "spans must have shape [1, n, 2], as offset_mapping has [1, 5, 2], got [1, 2]"),
    (lambda: chunks.from_spans(OFFSETS, [[(0, 5)]]), ValueError, "spans must have shape [n, 2], as offset_mapping has [5, 2], got [1, 1, 2]"),
    (lambda: chunks.from_spans([OFFSETS, OFFSETS], [[(0, 5)]]), ValueError, "spans must have shape [2, n, 2], as offset_mapping has [2, 5, 2], got [1, 1, 2]"),
    (lambda: chunks.from_spans(torch.tensor(OFFSETS), torch.zeros(1, 2, dtype=torch.int64, device="meta")), ValueError, "spans must be on offset_mapping's device, cpu, got meta"),
    (lambda: chunks.from_spans(OFFSETS, [(0, 5), (6, 4)]), ValueError, "spans must be [a, b) with 0 <= a <= b, got spans[1] = [6, 4]"),
    (lambda: chunks.from_spans([OFFSETS], [[(-1, 4)]]), ValueError, "got spans[0, 0] = [-1, 4]"),
    (lambda: chunks.from_spans(OFFSETS + OFFSETS, []), ValueError, "offset_mapping must go up along a text, got offset_mapping[6] that begins at 0, behind a token that begins at 10"),
    (lambda: chunks.from_spans(OFFSETS, [], base=1.0), TypeError, "base must be an int, got float"),
    (lambda: chunks.from_spans(OFFSETS, [], base=CUTS), ValueError, "base must be an int or of shape [] on cpu, got [3] on cpu"),
    (lambda: chunks.from_spans([OFFSETS], [[]], base=torch.ones(1)), TypeError, "base must be int32 or int64, got float32"),
]  # fmt: skip


def freed() -> Tensor:
    memory = torch.zeros(3, dtype=torch.int64)
    memory.untyped_storage().resize_(0)
    return memory


@pytest.mark.parametrize(("call", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_errors(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("function", [chunks.fixed, chunks.from_spans, chunks.windows])
def test_docstrings_are_true(function: Callable[..., Any]) -> None:
    (test,) = doctest.DocTestFinder().find(function, globs={"torch": torch, "fastpool": fastpool})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
