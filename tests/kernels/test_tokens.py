"""Token outputs: the real tokens of every layout against a plain loop, bit for bit, on every backend."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.token_outputs import LENGTHS, MORE, SERVING
from torch import Tensor

import fastpool
from fastpool import reference
from fastpool.backends import native
from fastpool.calls import TokensBackwardCall, TokensCall
from fastpool.testing import DTYPES, LAYOUTS, Sequence, same_bits, sequences, special_values


@pytest.fixture(params=SERVING, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpool.backend(request.param):
        yield request.param


def looped(batch: list[Sequence], truncate_dim: int | None = None, normalize: bool = False, **more: Any) -> Tensor:
    """The real tokens one after another."""
    tokens = [state[:truncate_dim] for one in batch for state, real in zip(one.states, one.real, strict=True) if real]
    values = torch.stack(tokens)
    return fastpool.l2_normalize(values, **more) if normalize else values.to(more.get("out_dtype", values.dtype))


def offsets_of(batch: list[Sequence]) -> Tensor:
    return torch.tensor([0, *(int(one.real.sum()) for one in batch)]).cumsum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """NaN stands wherever no token is."""
    batch = sequences(LENGTHS, 21, dtype, holes=LAYOUTS[layout].holes)
    arguments = LAYOUTS[layout].make(batch, None)
    for more in MORE:
        expected = looped(batch, **more)
        values, cu_seqlens = fastpool.tokens(**arguments, **more)
        assert same_bits(values, expected), more
        assert values.is_contiguous()
        assert torch.equal(cu_seqlens, offsets_of(batch))
        assert cu_seqlens.dtype == torch.int64
        for extra in (0, 1, 40):
            values, cu_seqlens = fastpool.tokens(**arguments, **more, total=len(expected) + extra)
            zeros = expected.new_zeros(extra, expected.shape[1])
            assert same_bits(values, torch.cat([expected, zeros])), (more, extra)
            assert torch.equal(cu_seqlens, offsets_of(batch))


def test_a_total_that_is_too_small() -> None:
    hidden, mask = torch.ones(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for given in (hidden, hidden.clone().requires_grad_()):
        for call in (fastpool.tokens, torch.ops.fastpool.tokens):
            with pytest.raises(
                ValueError, match=r"^fastpool.tokens: total must be at least the number of real tokens, 7, got 6$"
            ):
                call(given, mask, total=6)
            with pytest.raises(ValueError, match=r"^fastpool.tokens: total must be at least 0, got -1$"):
                call(given, mask, total=-1)


def test_overlapping_segments_in_any_order() -> None:
    hidden, mask = torch.randn(50, 11), torch.rand(50) > 0.4
    starts, ends = torch.tensor([20, 0, 5, 9, 49, 50]), torch.tensor([50, 30, 5, 41, 50, 50])
    for given in (None, mask):
        real = torch.ones_like(mask) if given is None else given
        rows, offsets = [], [0]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            rows += [i for i in range(start, end) if real[i]]
            offsets.append(len(rows))
        values, cu_seqlens = fastpool.tokens(hidden, given, starts=starts, ends=ends, normalize=True)
        assert same_bits(values, fastpool.l2_normalize(hidden[rows]))
        assert cu_seqlens.tolist() == offsets


@pytest.mark.parametrize("columns", [0, 4])
def test_nothing(columns: int) -> None:
    """No texts, no rows, no real tokens, no columns."""
    index = torch.zeros(0, dtype=torch.int64)
    for arguments, batch in (
        ({"hidden": torch.ones(0, 5, columns)}, 0),
        ({"hidden": torch.ones(3, 0, columns)}, 3),
        ({"hidden": torch.ones(3, 0, columns), "mask": torch.ones(3, 0)[:].bool()}, 3),
        ({"hidden": torch.ones(3, 5, columns), "mask": torch.zeros(3, 5, dtype=torch.int64)}, 3),
        ({"hidden": torch.ones(0, columns), "cu_seqlens": torch.zeros(1, dtype=torch.int32)}, 0),
        ({"hidden": torch.ones(7, columns), "cu_seqlens": torch.full((4,), 7)}, 3),
        ({"hidden": torch.ones(7, columns), "starts": index, "ends": index}, 0),
    ):
        for more in ({}, {"normalize": True}):
            values, cu_seqlens = fastpool.tokens(**arguments, **more)
            assert (values.shape, cu_seqlens.tolist()) == ((0, columns), [0] * (batch + 1))
            values, cu_seqlens = fastpool.tokens(**arguments, **more, total=2)
            assert same_bits(values, torch.zeros(2, columns))
            assert cu_seqlens.tolist() == [0] * (batch + 1)
    assert fastpool.tokens(torch.ones(2, 3, 0))[0].shape == (6, 0)


@pytest.mark.parametrize("dtype", fastpool.checks.MASK_DTYPES, ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    hidden, mask = torch.randn(3, 70, 5), torch.rand(3, 70) > 0.4
    values, cu_seqlens = fastpool.tokens(hidden, mask.to(dtype))
    assert same_bits(values, hidden[mask])
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    if dtype != torch.bool:
        numbered = mask.int()
        numbered[1, 40] = 2
        with pytest.raises(ValueError, match=r"^fastpool.tokens: mask must hold 0 and 1 alone, got mask\[1, 40\] = 2;"):
            fastpool.tokens(hidden, numbered.to(dtype))
        outside = torch.tensor([0, 0, 0]), torch.tensor([70, 40, 70])  # what stands there is nobody's
        got, _ = fastpool.tokens(hidden, numbered.to(dtype), starts=outside[0], ends=outside[1])
        numbered[1, 40:] = 0
        assert same_bits(got, hidden[numbered.bool()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    """As l2_normalize has them; without it a token stays as it is."""
    hidden = special_values(6, 40, 37).to(dtype)
    hidden[0, :, 7:] = 1.0
    mask = torch.rand(6, 40) > 0.3
    assert same_bits(fastpool.tokens(hidden, mask)[0], hidden[mask])
    for more in ({}, {"out_dtype": torch.float64}, {"truncate_dim": 5, "out_dtype": torch.float16}):
        expected = fastpool.l2_normalize(hidden[mask], **more)
        assert same_bits(fastpool.tokens(hidden, mask, normalize=True, **more)[0], expected), more


@pytest.mark.parametrize("view", ["rows", "columns", "batch", "expanded"])
def test_strides(view: str) -> None:
    hidden, mask = torch.randn(6, 80, 24), torch.rand(6, 80) > 0.3
    hidden, mask = {
        "rows": lambda: (hidden[:, ::2], mask[:, ::2]),
        "columns": lambda: (hidden[..., ::2], mask),
        "batch": lambda: (hidden.transpose(0, 1)[:20], mask.T[:20]),
        "expanded": lambda: (hidden[:1].expand(6, -1, -1), mask[:1].expand(6, -1)),
    }[view]()
    for normalize in (False, True):
        expected = fastpool.l2_normalize(hidden[mask]) if normalize else hidden[mask]
        assert same_bits(fastpool.tokens(hidden, mask, normalize=normalize)[0], expected)


@pytest.mark.skipif("native" not in SERVING, reason="no native tokens here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_and_threads(dtype: torch.dtype) -> None:
    hidden, mask = torch.randn(9, 500, 67).to(dtype), torch.rand(9, 500) > 0.3
    mask[2:5], mask[5] = True, False
    assert native.info is not None
    with fastpool.backend("native"):
        for more in MORE:
            expected = fastpool.l2_normalize if more.get("normalize") else None
            options = {name: value for name, value in more.items() if name not in ("normalize", "truncate_dim")}
            rows = hidden[mask][:, : more.get("truncate_dim")]
            wanted = expected(rows, **options) if expected else rows.to(more.get("out_dtype", dtype))
            for isa in native.info.isas():
                native.info.use_isa(isa)
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    values, _ = fastpool.tokens(hidden, mask, **more)
                    assert same_bits(values, wanted), (more, isa, threads)


def test_validation_names_what_is_not_finite() -> None:
    hidden, mask = torch.ones(2, 4, 3), torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    hidden[1, 2, 1], hidden[0, 0], hidden[1, 1] = float("nan"), float("inf"), float("nan")
    fastpool.tokens(hidden, mask)
    fastpool.validate()
    for more in ({}, {"normalize": True}, {"total": 9}):
        for given in (hidden, hidden.clone().requires_grad_()):
            with pytest.raises(
                ValueError, match=r"^fastpool.tokens: a token of segment 1 is not finite: hidden\[1, 2, 1\] is nan$"
            ):
                fastpool.tokens(given, mask, **more)
    assert fastpool.tokens(hidden, mask, truncate_dim=1)[0].shape == (5, 1)
    nested = torch.nested.nested_tensor_from_jagged(hidden.flatten(0, 1), torch.tensor([0, 6, 8]))
    with pytest.raises(ValueError, match=r"a token of segment 0 is not finite: hidden\.values\(\)\[0, 0\] is inf$"):
        fastpool.tokens(nested)
    hidden = torch.ones(1, 2, 3).mul(1e30)
    with pytest.raises(ValueError, match=r"hidden\[0, 0, 0\] is 1.0+\d*e\+30, so the result overflowed float16$"):
        fastpool.tokens(hidden, out_dtype=torch.float16)


def test_the_definition_of_a_cut() -> None:
    """Where nobody has counted first, as on a GPU."""
    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    for total in (0, 2, 5):
        call = TokensCall(hidden, mask, total=total)
        values, cu_seqlens = reference.tokens(call)
        assert same_bits(values, hidden[mask][:total])
        assert cu_seqlens.tolist() == [0, min(3, total), total]
        gradient = reference.tokens_backward(TokensBackwardCall(call, torch.ones(total, 3)))
        assert same_bits(gradient[mask], (torch.arange(7) < total).float()[:, None].expand(7, 3))
        assert not gradient[~mask].any()
