"""Gradients of token outputs: against numerical ones, against plain indexing, and of every backend bit for bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.token_outputs import LENGTHS, MORE, SERVING
from torch import Tensor

import fastpool
from fastpool.testing import DTYPES, LAYOUTS, gradients, same_bits, sequences

OPS = torch.ops.fastpool


@pytest.fixture(params=SERVING, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpool.backend(request.param):
        yield request.param


def values(**arguments: Any) -> Tensor:
    return fastpool.tokens(**arguments)[0]


def plain(hidden: Tensor) -> Tensor:
    return hidden.values() if hidden.is_nested else hidden


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    """NaN in padding must not show, although gradcheck nudges it too."""
    arguments = LAYOUTS[layout].make(sequences([3, 0, 5], 4, torch.float64, holes=LAYOUTS[layout].holes), None)
    hidden = arguments.pop("hidden")
    leaf = plain(hidden).detach().requires_grad_()
    for more in ({}, {"truncate_dim": 3, "normalize": True}, {"total": 12, "normalize": True}):

        def called(leaf: Tensor, more: dict[str, Any] = more) -> Tensor:
            x = torch.nested.nested_tensor_from_jagged(leaf, hidden.offsets()) if hidden.is_nested else leaf
            return values(hidden=x, **arguments, **more)

        assert torch.autograd.gradcheck(called, (leaf,), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_of_plain_indexing(layout: str, dtype: torch.dtype) -> None:
    """A token of one text takes its own gradient, rounded once; what is none takes +0."""
    arguments = LAYOUTS[layout].make(sequences(LENGTHS, 21, dtype, holes=LAYOUTS[layout].holes), None)
    states = plain(arguments["hidden"])
    real = ~states.isnan().any(-1)
    unrounded = torch.float64 if dtype == torch.float64 else torch.float32
    for more in MORE:
        with torch.no_grad():
            result = values(**arguments, **more)
        gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result.dtype)
        (found,) = gradients(values, arguments, gradient, **more)
        # Which row of the values each real token became: a number that survives every dtype, by its digits.
        number = torch.zeros_like(states).masked_fill_(~real[..., None], float("nan"))
        number[..., 0].masked_scatter_(real, torch.arange(int(real.sum())).to(dtype) % 128)
        number[..., 1].masked_scatter_(real, (torch.arange(int(real.sum())) // 128).to(dtype))
        nested = torch.nested.nested_tensor_from_jagged
        hidden = arguments["hidden"]
        numbered = nested(number, hidden.offsets()) if hidden.is_nested else number
        digits = values(**{**arguments, "hidden": numbered})[:, :2].long()
        order = digits[:, 0] + 128 * digits[:, 1]  # of the values' rows, counted in the order of hidden's
        expected = torch.zeros_like(states)
        of_rows = gradient.to(unrounded)
        if more.get("normalize"):
            tokens = fastpool.tokens(**arguments, truncate_dim=more.get("truncate_dim"), out_dtype=unrounded)[0]
            of_rows = OPS._l2_normalize_backward(of_rows, tokens, 1e-12)
        by_row = torch.empty_like(of_rows)
        by_row[order] = of_rows + 0.0
        expected[real, : result.shape[1]] = by_row.to(dtype)
        assert same_bits(found, expected), more
        longer = torch.cat([gradient, torch.full_like(gradient, float("nan"))])
        (found,) = gradients(values, arguments, longer, **more, total=len(longer))
        assert same_bits(found, expected), more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overlapping_segments_add_in_their_order(dtype: torch.dtype) -> None:
    """From +0, in the accumulator's dtype, rounded once."""
    unrounded = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, mask = torch.randn(300, 19).to(dtype), torch.rand(300) > 0.3
    starts = torch.tensor([200, 0, 100, 0, 90, 150, 299, 300])
    ends = torch.tensor([300, 299, 260, 40, 90, 160, 300, 300])
    for given in (None, mask):
        arguments: dict[str, Any] = {"hidden": hidden, "mask": given, "starts": starts, "ends": ends}
        result = values(**arguments, truncate_dim=17, out_dtype=unrounded)
        gradient = torch.randn(result.shape, dtype=unrounded) * 2.0 ** torch.randint(-12, 12, (len(result), 1))
        gradient[:, 0] = -0.0
        (found,) = gradients(values, arguments, gradient, truncate_dim=17, out_dtype=unrounded)
        total, at = torch.zeros(300, 19, dtype=unrounded), 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            for row in range(start, end):
                if given is None or given[row]:
                    total[row, :17] += gradient[at]
                    at += 1
        assert at == len(gradient)
        assert same_bits(found, total.to(dtype))
        if dtype == torch.float32:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert same_bits(gradients(values, arguments, gradient, truncate_dim=17)[0], found)


def test_what_is_not_differentiable() -> None:
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    tokens, cu_seqlens = fastpool.tokens(hidden, normalize=True)
    assert tokens.requires_grad
    assert not cu_seqlens.requires_grad
    (gradient,) = torch.autograd.grad(tokens.sum(), hidden, create_graph=True)
    assert gradient.shape == hidden.shape
    (gradient,) = torch.autograd.grad(fastpool.tokens(hidden)[0].pow(2).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastpool.tokens: gradients of gradients are not implemented"):
        gradient.sum().backward()


def test_nothing_of_hidden_is_kept() -> None:
    """Without normalisation its values may go."""
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fastpool.tokens(hidden, torch.ones(2, 5).bool())
    assert max(kept) <= 8 * 4


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"gradient": torch.ones(10, 9)},
            ValueError,
            "truncate_dim must lie between 1 and the last dimension, 8, got 9",
        ),
        ({"gradient": torch.ones(8)}, ValueError, r"gradient must have shape \[8, 8\], got \[8\]"),
        ({"gradient": torch.ones(10, 8).double()}, TypeError, "gradient must be float32, got float64"),
        ({"gradient": torch.ones(8, 10).T}, ValueError, r"gradient must be contiguous, got strides \[1, 10\]"),
        ({"gradient": torch.ones(9, 8)}, ValueError, "gradient must have a row for each of the 10 real tokens, got 9"),
        ({"gradient": torch.ones(10, 8), "ends": torch.tensor([5, 6])}, ValueError, r"got ends\[1\] = 6"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = dict.fromkeys(("mask", "cu_seqlens", "starts", "ends"))
    with pytest.raises(error, match=f"^fastpool.tokens: .*{words}"):
        OPS._tokens_backward(**{**given, "hidden": torch.ones(2, 5, 8), **arguments})
