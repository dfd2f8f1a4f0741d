"""Calls that look alike are checked and planned once; whatever checks and plans read makes them differ."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import dispatch, known
from fastpool.backends import native, reference
from fastpool.calls import NormalizeCall, PoolBackwardCall, PoolCall

MEMORY = torch.zeros(10_000)
HIDDEN = MEMORY[:960].view(2, 5, 96)
MASK = torch.ones(2, 5, dtype=torch.bool)
CALL = PoolCall("mean", HIDDEN, MASK)
PACKED = HIDDEN.view(10, 96)
CU = torch.tensor([0, 4, 10])


def test_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = PoolCall.check
    monkeypatch.setattr(PoolCall, "check", lambda self: (checked.append(self), check(self)))
    for _ in range(3):
        dispatch.check(PoolCall("mean", torch.zeros(2, 5, 8), torch.ones(2, 5).bool()))
    assert len(checked) == 1


def test_chosen_once_for_each_requested_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = dispatch._choose
    monkeypatch.setattr(dispatch, "_choose", lambda call, asked: (chosen.append(asked), choose(call, asked))[1])
    for _ in range(2):
        assert dispatch.choose(replace(CALL)) is native
        for name, module in (("reference", reference), ("native", native)):
            with fastpool.backend(name):
                assert dispatch.choose(replace(CALL)) is module
    assert chosen == ["auto", "reference", "native"]


DIFFERENT: list[dict[str, Any]] = [
    {"mode": "sum"},
    {"hidden": HIDDEN.bfloat16()},
    {"hidden": MEMORY[:1152].view(2, 6, 96), "mask": torch.ones(2, 6, dtype=torch.bool)},
    {"hidden": MEMORY[1:961].view(2, 5, 96)},  # another alignment
    {"hidden": MEMORY[:1920].view(2, 10, 96)[:, ::2]},  # another stride
    {"hidden": HIDDEN.to("meta"), "mask": MASK.to("meta")},
    {"mask": None},
    {"mask": MASK.long()},
    {"mask": torch.ones(5, 2, dtype=torch.bool).T},
    {"starts": torch.tensor([0, 1])},
    {"ends": torch.tensor([0, 1])},
    {"weights": torch.ones(2, 5)},
    {"scores": torch.ones(2, 5)},
    {"query": torch.ones(96)},
    {"query": torch.ones(3, 96)},
    {"query": torch.ones(2, 3, 96)},
    {"hidden": PACKED, "mask": None, "cu_seqlens": CU},
    {"hidden": PACKED, "mask": None, "cu_seqlens": CU.int()},
    {"truncate_dim": 3},
    {"normalize": True},
    {"out_dtype": torch.float64},
]


def test_what_differs_is_not_known() -> None:
    calls = [replace(CALL)] + [replace(CALL, **change) for change in DIFFERENT]
    calls.append(PoolBackwardCall(CALL, torch.zeros(2, 96)))
    calls += [PoolBackwardCall(CALL, torch.zeros(2, 96), of=of) for of in ("weights", "scores", "query")]
    calls += [
        NormalizeCall(HIDDEN),
        NormalizeCall(HIDDEN, eps=1.0),
        NormalizeCall(HIDDEN, truncate_dims=torch.ones(2, 5).int()),
    ]
    for i, call in enumerate(calls):
        assert "number" not in call.known, i
        call.known["number"] = i
    assert [replace(call).known["number"] for call in calls] == list(range(len(calls)))


def test_a_good_call_does_not_vouch_for_a_bad_one() -> None:
    dispatch.check(replace(CALL, ends=torch.tensor([1, 5])))
    with pytest.raises(ValueError, match=r"ends must lie between 0 and 5, got ends\[1\] = 6"):
        dispatch.check(replace(CALL, ends=torch.tensor([1, 6])))
    for _ in range(2):  # an error is not remembered as a check
        with pytest.raises(TypeError, match="mask must be bool or an integer type"):
            dispatch.check(replace(CALL, mask=torch.ones(2, 5)))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": HIDDEN.to_sparse()},
        {"mask": [1, 2]},
        {"truncate_dim": [3]},
    ],
    ids=["sparse", "list", "unhashable"],
)
def test_what_has_no_looks_is_checked_each_time(change: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(TypeError):
            dispatch.check(replace(CALL, **change))
    assert not known._young


def test_values_are_no_part_of_it() -> None:
    with fastpool.backend("reference"):
        results = [fastpool.mean(torch.full((2, 5, 8), float(i))) for i in range(3)]
    assert [result[0, 0].item() for result in results] == [0.0, 1.0, 2.0]


def test_it_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for again and again stays, whatever passes by."""
    monkeypatch.setattr(known, "_LIMIT", 10)
    replace(CALL).known["number"] = 1
    for n in range(1, 35):
        assert PoolCall("mean", torch.zeros(1, n, 8)).known == {}
        assert len(known._young) <= 10
        assert len(known._old) <= 10
        assert replace(CALL).known == {"number": 1}


def test_fakes_are_not_kept() -> None:
    """A fake tensor has no memory whose alignment could be asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden: Tensor = torch.zeros(2, 5, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert PoolCall("mean", hidden).known == {}
    assert not known._young
