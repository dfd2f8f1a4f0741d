"""Under validation a result that is not finite is an error that names where it comes from, on every backend."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastpool
from fastpool.modes import MODES
from fastpool.testing import cpu_backends, function_of, required

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _validating() -> None:
    """conftest turns it off again."""
    fastpool.validate()


@pytest.fixture(params=cpu_backends(), autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastpool.backend(request.param):
        yield


def hidden_with(*places: tuple[tuple[int, ...], float], shape: tuple[int, ...] = (3, 8, 8)) -> torch.Tensor:
    hidden = torch.ones(shape)
    for at, value in places:
        hidden[at] = value
    return hidden


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len", "sum", "max", "weighted_mean", "softmax_mean"])
def test_segment_token_and_column(mode: str, normalize: bool) -> None:
    """The first segment whose result is not finite, its first such token, and that one's first column."""
    hidden = hidden_with(((1, 5, 6), NAN), ((1, 5, 7), NAN), ((1, 6, 2), NAN), ((2, 0, 0), NAN))
    words = rf"^fastpool.{mode}: the result of segment 1 is not finite: hidden\[1, 5, 6\] is nan$"
    for given in (hidden, hidden.clone().requires_grad_()):
        with pytest.raises(ValueError, match=words):
            function_of(mode)(given, normalize=normalize, **required(mode, hidden.shape))
    own = required(mode, (24, 8))
    packed = {"starts": torch.tensor([16, 3, 0]), "ends": torch.tensor([16, 8, 15]), **own}
    words = rf"^fastpool.{mode}: the result of segment 2 is not finite: hidden\[13, 6\] is nan$"
    with pytest.raises(ValueError, match=words):
        function_of(mode)(hidden.flatten(0, 1), **packed, normalize=normalize)
    with pytest.raises(ValueError, match=words):
        getattr(torch.ops.fastpool, mode)(hidden.flatten(0, 1), **packed, normalize=normalize)
    nested = torch.nested.nested_tensor_from_jagged(hidden.flatten(0, 1), torch.tensor([0, 8, 24]))
    words = rf"^fastpool.{mode}: the result of segment 1 is not finite: hidden\.values\(\)\[13, 6\] is nan$"
    with pytest.raises(ValueError, match=words):
        function_of(mode)(nested, normalize=normalize, **own)


def test_what_one_token_decides() -> None:
    hidden = hidden_with(((0, 3, 0), NAN), ((0, 4, 1), INF), ((0, 5, 2), -INF))
    mask = torch.zeros(3, 8).long()
    mask[:, 4:6] = 1
    with pytest.raises(ValueError, match=r"fastpool.cls: .* of segment 0 is not finite: hidden\[0, 4, 1\] is inf$"):
        fastpool.cls(hidden, mask)
    with pytest.raises(ValueError, match=r"fastpool.last: .* hidden\[0, 5, 2\] is -inf$"):
        fastpool.last(hidden, mask)


def test_what_does_not_reach_the_result() -> None:
    """Padding, holes, rows of no segment, columns cut off."""
    hidden = hidden_with(((0, 0, 0), NAN), ((1, 4, 3), INF), ((2, 7, 1), NAN), ((2, 5, 7), INF))
    mask = torch.ones(3, 8).bool()
    mask[0, 0] = mask[1, 4] = mask[2, 7] = False
    for mode in MODES:
        own = required(mode, hidden.shape)
        if "query" not in own:  # whose products are of all columns
            assert function_of(mode)(hidden, mask=mask, truncate_dim=7, **own).isfinite().all()
    with pytest.raises(ValueError, match=r"segment 2 is not finite: hidden\[2, 5, 7\] is inf"):
        fastpool.mean(hidden, mask)
    starts, ends = torch.tensor([1, 0, 6]), torch.tensor([8, 4, 7])
    assert fastpool.mean(hidden, starts=starts, ends=ends).isfinite().all()


def test_maxima_of_what_is_infinite() -> None:
    """-inf beside something else is no maximum."""
    hidden = hidden_with(((0, 2, 0), -INF), ((0, 7, 5), INF))
    with pytest.raises(ValueError, match=r"hidden\[0, 7, 5\] is inf"):
        fastpool.max(hidden, normalize=True)
    hidden[0, 7, 5] = 0
    assert fastpool.max(hidden).isfinite().all()


def test_weights() -> None:
    weights = torch.ones(3, 8)
    weights[2, 6] = INF
    with pytest.raises(ValueError, match=r"segment 2 is not finite: weights\[2, 6\] is inf$"):
        fastpool.weighted_mean(hidden_with(), weights=weights)


def test_scores_and_queries() -> None:
    """-inf among scores is what weighs nothing."""
    scores, query = torch.zeros(3, 8), torch.ones(2, 8)
    scores[0, 3] = scores[1] = -INF
    assert fastpool.softmax_mean(hidden_with(), scores=scores).isfinite().all()
    scores[2, 5], scores[2, 6] = INF, NAN
    with pytest.raises(ValueError, match=r"^fastpool.softmax_mean: .* segment 2 is not finite: scores\[2, 5\] is inf$"):
        fastpool.softmax_mean(hidden_with(), scores=scores)
    words = r"^fastpool\.attention: the result of segment {} is not finite: {}$"
    with pytest.raises(ValueError, match=words.format(r"1, query 0,", r"hidden\[1, 2, 7\] is nan")):
        fastpool.attention(hidden_with(((1, 2, 7), NAN)), query, truncate_dim=3)  # whose products are of all columns
    with pytest.raises(ValueError, match=words.format("0", r"scale is nan")):
        fastpool.attention(hidden_with(), query[0], scale=NAN)
    with pytest.raises(
        ValueError, match=words.format("0", "its tokens are, so a product with the query, a sum, or .*")
    ):
        fastpool.attention(hidden_with() * 1e20, query[0] * 1e20)
    query[1, 4] = -INF
    assert fastpool.attention(hidden_with(), query).isfinite().all()  # of products that are -inf
    query[1, 4] = INF
    with pytest.raises(ValueError, match=words.format(r"0, query 1,", r"query\[1, 4\] is inf")):
        fastpool.attention(hidden_with(), query)
    with pytest.raises(ValueError, match=words.format("0", r"query\[4\] is inf")):
        fastpool.attention(hidden_with(), query[1])
    own = torch.ones(3, 2, 8)
    own[2, 0, 6] = NAN
    with pytest.raises(ValueError, match=words.format(r"2, query 0,", r"query\[2, 0, 6\] is nan")):
        fastpool.attention(hidden_with(), own)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "value", "words"),
    [
        (torch.float32, None, 3e38, "its tokens are, so their sum overflowed float32$"),
        (torch.float32, torch.float16, 1e5, "its tokens are, so their sum overflowed float32, or the result float16$"),
        (torch.float16, None, 6e4, "their sum overflowed float32, or the result float16$"),
        (torch.float64, None, 1.7e308, "their sum overflowed float64$"),
    ],
)
def test_overflow(dtype: torch.dtype, out_dtype: torch.dtype | None, value: float, words: str) -> None:
    hidden = torch.full((2, 5, 3), value, dtype=dtype)
    hidden[0] = 0
    with pytest.raises(ValueError, match=f"fastpool.sum: the result of segment 1 is not finite: .*{words}"):
        fastpool.sum(hidden, out_dtype=out_dtype)


def test_l2_normalize() -> None:
    x = hidden_with(((1, 7, 2), NAN), ((2, 0, 0), INF))
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(
            ValueError, match=r"^fastpool.l2_normalize: the result of row \[1, 7\] is not finite: x\[1, 7, 2\] is nan$"
        ):
            fastpool.l2_normalize(given)
    with pytest.raises(ValueError, match=r"the result of row \[\] is not finite: x\[0\] is inf"):
        fastpool.l2_normalize(x[2, 0])
    assert fastpool.l2_normalize(x, truncate_dims=torch.zeros(3, 8).long()).isfinite().all()
    with pytest.raises(ValueError, match=r"row \[0\] is not finite: x is, but its norm and eps, 0, are 0 in float32"):
        fastpool.l2_normalize(torch.zeros(1, 4), eps=0.0)


def test_without_validation_and_in_gradients() -> None:
    """A result is what IEEE says; a gradient that is not finite is nobody's error."""
    finite = torch.ones(1, 2, 3, requires_grad=True)
    pooled = fastpool.mean(finite)
    assert torch.autograd.grad(pooled, finite, torch.full_like(pooled, INF))[0].isinf().all()
    fastpool.validate(False)
    assert fastpool.mean(hidden_with(((1, 5, 6), NAN)))[1, 6].isnan()


@pytest.mark.parametrize("_backend", ["native"], indirect=True)
def test_from_the_start() -> None:
    code = "import torch, fastpool\nfastpool.mean(torch.full((1, 2, 3), torch.nan))"
    environment: dict[str, Any] = {**os.environ, "FASTPOOL_VALIDATE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: fastpool.mean: the result of segment 0 is not finite: hidden[0, 0, 0] is nan" in done.stderr


def test_words_follow_the_mode() -> None:
    """A maximum adds nothing up, and weights have sums of their own."""
    fastpool.validate()
    hidden = torch.full((1, 3, 2), 1e20)
    with pytest.raises(ValueError, match=r"its tokens are, so the result overflowed float16$"):
        fastpool.max(hidden, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"so a sum, or its quotient, overflowed float32$"):
        fastpool.weighted_mean(torch.ones(1, 3, 2), weights=torch.full((1, 3), 3e38))
