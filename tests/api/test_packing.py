"""fastpool.segments: numbered masks and position_ids to starts and ends."""

import doctest
import random
from typing import Any

import pytest
import torch

import fastpool
from fastpool import packing
from fastpool.testing import same_bits

INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)

# ids, and the texts [start, end) that they number
NUMBERED: list[tuple[Any, list[tuple[int, int]]]] = [
    ([1, 1, 1, 2, 2, 3, 0, 0], [(0, 3), (3, 5), (5, 6)]),
    ([[1, 1, 1, 2, 2, 3, 0, 0]], [(0, 3), (3, 5), (5, 6)]),
    ([[1, 1, 2], [1, 2, 2]], [(0, 2), (2, 3), (3, 4), (4, 6)]),  # a text ends with its row, whatever comes next
    ([[1, 1, 1], [1, 1, 1]], [(0, 3), (3, 6)]),
    ([[0, 0, 1], [1, 0, 0]], [(2, 3), (3, 4)]),  # padding on either side
    ([[0, 1, 0, 2, 2, 0]], [(1, 2), (3, 5)]),  # and in between
    ([[0, 0], [4, 9]], [(2, 3), (3, 4)]),  # numbers may be left out
    ([5], [(0, 1)]),
    ([0, 0, 0], []),
    ([[0, 0], [0, 0]], []),
]
POSITIONS: list[tuple[Any, list[tuple[int, int]]]] = [
    ([0, 1, 2, 0, 1, 0, 1, 2], [(0, 3), (3, 5), (5, 8)]),
    ([[0, 1, 2], [0, 0, 1]], [(0, 3), (3, 4), (4, 6)]),
    ([0, 0, 0], [(0, 1), (1, 2), (2, 3)]),
    ([[-1, -1, 0, 1], [0, 1, -7, -1]], [(2, 4), (4, 6)]),
    ([[-1, 0, -1, 0, 1]], [(1, 2), (3, 5)]),
    ([[-1, -1]], []),
]


def pairs(starts: torch.Tensor, ends: torch.Tensor) -> list[tuple[int, int]]:
    assert starts.dtype == ends.dtype == torch.int64
    assert starts.dim() == ends.dim() == 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize(("ids", "texts"), NUMBERED, ids=str)
def test_numbered_masks(ids: Any, texts: list[tuple[int, int]], dtype: torch.dtype) -> None:
    assert pairs(*fastpool.segments(torch.tensor(ids, dtype=dtype))) == texts


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("ids", "texts"), POSITIONS, ids=str)
def test_positions(ids: Any, texts: list[tuple[int, int]], dtype: torch.dtype) -> None:
    assert pairs(*fastpool.segments(position_ids=torch.tensor(ids, dtype=dtype))) == texts


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("name", ["ids", "position_ids"])
def test_nothing(shape: tuple[int, ...], name: str) -> None:
    starts, ends = fastpool.segments(**{name: torch.zeros(shape, dtype=torch.int32)})
    assert pairs(starts, ends) == []
    assert fastpool.mean(torch.randn(0, 8), starts=starts, ends=ends).shape == (0, 8)


def test_any_strides() -> None:
    ids = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2], [0, 0, 3, 4]])
    texts = [(0, 2), (2, 3), (4, 5), (5, 8), (10, 11), (11, 12)]
    for given in (ids, ids.T.contiguous().T, ids.repeat_interleave(2, dim=1)[:, ::2]):
        assert pairs(*fastpool.segments(given)) == texts
    assert pairs(*fastpool.segments(torch.tensor([1]).expand(4))) == [(0, 4)]


def test_both_kinds_say_the_same_and_pooling_takes_them() -> None:
    """Random packed rows: what each text gives is what it gives alone."""
    drawn = random.Random(7)
    for _ in range(20):
        batch, rows = drawn.randint(1, 4), drawn.randint(1, 60)
        ids, positions = torch.zeros(batch, rows, dtype=torch.int64), torch.full((batch, rows), -1)
        expected = []
        for row in range(batch):
            at, number = drawn.randint(0, 3), 0
            while (length := drawn.randint(1, 20)) + at <= rows:
                number += drawn.randint(1, 3)
                ids[row, at : at + length] = number
                positions[row, at : at + length] = torch.arange(length)
                expected.append((row * rows + at, row * rows + at + length))
                at += length + drawn.choice([0, 0, 2])
        hidden = torch.randn(batch, rows, 8)
        starts, ends = fastpool.segments(ids)
        assert pairs(starts, ends) == pairs(*fastpool.segments(position_ids=positions)) == expected
        pooled = fastpool.mean(hidden.flatten(0, 1), starts=starts, ends=ends, normalize=True)
        alone = [
            fastpool.mean(hidden.flatten(0, 1)[None, start:end], normalize=True)
            for start, end in zip(starts, ends, strict=True)
        ]
        assert same_bits(pooled, torch.cat([*alone, torch.empty(0, 8)]))


IDS = "fastpool.segments: ids must number a row's texts upwards from 1, each in one piece, with 0 for padding, got "
COUNT = (
    "fastpool.segments: position_ids must count each text's tokens from 0 up by one, or be negative where padding is, "
    "got "
)
LARGE = torch.tensor([0, 1, 2**63 + 5], dtype=torch.uint64)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, TypeError, "fastpool.segments: give either ids or position_ids"),
    ({"ids": torch.ones(2).long(), "position_ids": torch.ones(2).long()}, TypeError, "give either ids or position_ids"),
    ({"ids": [1, 1, 2]}, TypeError, "fastpool.segments: ids must be a torch.Tensor, got list"),
    ({"ids": torch.ones(3)}, TypeError, "fastpool.segments: ids must be an integer type, got float32"),
    ({"ids": torch.ones(3).bool()}, TypeError, "ids must be an integer type, got bool"),
    ({"position_ids": torch.ones(3)}, TypeError, "position_ids must be an integer type, got float32"),
    ({"ids": torch.tensor(1)}, ValueError, "ids must be padded [B, S] or packed [T], got []"),
    ({"position_ids": torch.ones(3, 2, 2).long()}, ValueError, "position_ids must be padded [B, S] or packed [T], got [3, 2, 2]"),
    ({"ids": torch.tensor([1, 1, -1])}, ValueError, IDS + "ids[2] = -1 after [1, 1]"),
    ({"ids": torch.tensor([-1, 0, 0])}, ValueError, IDS + "ids[0] = -1"),
    ({"ids": torch.tensor([1, 0, 1])}, ValueError, IDS + "ids[2] = 1 after [1, 0]"),
    ({"ids": torch.tensor([[1, 2, 3], [1, 2, 1]])}, ValueError, IDS + "ids[1, 2] = 1 after [1, 2]"),
    ({"ids": torch.tensor([3, 2, 1])}, ValueError, IDS + "ids[1] = 2 after [3]"),
    ({"ids": torch.tensor([3, 0, 0, 0, 0, 2])}, ValueError, IDS + "ids[5] = 2 after [0, 0, 0]"),
    ({"position_ids": torch.tensor([1, 2, 3])}, ValueError, COUNT + "position_ids[0] = 1"),
    ({"position_ids": torch.tensor([[0, 1, 2], [0, 1, 3]])}, ValueError, COUNT + "position_ids[1, 2] = 3 after [0, 1]"),
    ({"position_ids": torch.tensor([0, 1, 1])}, ValueError, COUNT + "position_ids[2] = 1 after [0, 1]"),
    ({"position_ids": torch.tensor([-1, 1, 2])}, ValueError, COUNT + "position_ids[1] = 1 after [-1]"),
    ({"position_ids": torch.tensor([0, 1, -1, 2])}, ValueError, COUNT + "position_ids[3] = 2 after [0, 1, -1]"),
    ({"ids": LARGE}, ValueError, IDS + f"ids[2] = {2**63 + 5} after [0, 1]"),
    ({"position_ids": LARGE}, ValueError, COUNT + f"position_ids[2] = {2**63 + 5} after [0, 1]"),
    ({"position_ids": torch.tensor([2**63 - 1])}, ValueError, COUNT + f"position_ids[0] = {2**63 - 1}"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "words"), WRONG, ids=str)
def test_what_is_wrong(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        fastpool.segments(**given)
    assert words in str(caught.value)


def test_one_look_at_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each further one would wait again."""
    looks = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
                looks.append(str(op))
            return op(*args, **(kwargs or {}))

    with Watch():
        fastpool.segments(torch.tensor([[1, 1, 2], [0, 1, 2]]))
        fastpool.segments(position_ids=torch.tensor([0, 1, 0]))
    assert looks == ["aten.nonzero.default"] * 2


def test_the_docstring_is_true() -> None:
    found = doctest.DocTestFinder().find(packing.segments, globs={"torch": torch, "fastpool": fastpool})
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert results[0].attempted > 0
    assert all(result.failed == 0 for result in results)
