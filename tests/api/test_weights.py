"""Weights beside narrower states are float32: float64 weights that do not fit are an error, not NaN or zeros."""

import random
from typing import Any

import pytest
import torch

import fastpool
from fastpool import dispatch
from fastpool.backends import native
from fastpool.calls import PoolCall
from fastpool.checks import name_of
from fastpool.testing import DTYPES, backward_arguments, cpu_backends, same_bits

NARROW = [dtype for dtype in DTYPES if dtype != torch.float64]
SMALLEST, LARGEST = 2.0**-126, torch.finfo(torch.float32).max
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=cpu_backends())
def backend(request: pytest.FixtureRequest) -> Any:
    with fastpool.backend(request.param):
        yield request.param


def words(at: str, value: float, dtype: torch.dtype) -> str:
    return (
        f"fastpool.weighted_mean: weights beside {name_of(dtype)} states are float32, so a segment's largest must be 0 "
        f"or lie between 1.17549e-38 and 3.40282e+38 in size, got weights[{at}] = {value}; scale them, or give float64 "
        "states"
    )


def check(at: str, value: float, hidden: torch.Tensor, **arguments: Any) -> None:
    """Function, where gradients are recorded too, and raw op."""
    for given in (hidden, hidden.clone().requires_grad_()):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared below
            fastpool.weighted_mean(given, **arguments)
        assert str(caught.value) == words(at, value, hidden.dtype)
    with pytest.raises((ValueError, RuntimeError)) as raw:
        torch.ops.fastpool.weighted_mean(hidden, **arguments)
    assert str(raw.value).splitlines()[0] == words(at, value, hidden.dtype)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_does_not_fit(dtype: torch.dtype, backend: str) -> None:
    """The largest of a segment is named, the first of them."""
    hidden = torch.randn(1, 3, 8).to(dtype)
    above, below = LARGEST * (1 + 2**-40), SMALLEST * (1 - 2**-40)
    for weights, at, value in (
        (row(1e300, 1e300, 1e300), "0, 0", 1e300),
        (row(1e-300, 1e-300, 1e-300), "0, 0", 1e-300),
        (row(1.0, 2.0, -1e39), "0, 2", -1e39),
        (row(1.0, above, 0.0), "0, 1", above),
        (row(0.0, 5e-324, -below), "0, 2", -below),
        (row(NAN, 1e-40, INF), "0, 1", 1e-40),
        (row(-INF, NAN, 1e40), "0, 2", 1e40),
    ):
        check(at, value, hidden, weights=weights)


def test_what_fits(backend: str) -> None:
    """The bits of the same weights in float32. Some may be lost beside greater ones, as the tail of a softmax is; what
    is not finite stays in its segment."""
    hidden = torch.randn(1, 3, 8)
    for weights in (
        row(0.0, -0.0, 0.0),
        row(SMALLEST, 0.0, SMALLEST),
        row(LARGEST, 0.0, -1.0),
        row(1.0, 1e-300, 5e-324),
        row(-SMALLEST, 1e-39, 1e-60),
        row(INF, 1.0, NAN),
        row(NAN, NAN, -INF),
        row(0.0, NAN, 0.0),
    ):
        assert same_bits(
            fastpool.weighted_mean(hidden, weights=weights), fastpool.weighted_mean(hidden, weights=weights.float())
        )
    both = fastpool.weighted_mean(hidden.expand(2, 3, 8), weights=torch.cat([row(NAN, 1, 1), row(1, 1, 1)]))
    assert both[0].isnan().all()
    assert same_bits(both[1:], fastpool.weighted_mean(hidden, weights=row(1, 1, 1)))
    for size in (1e300, 1e-300):
        found = fastpool.weighted_mean(hidden.double(), weights=row(size, size, size))
        torch.testing.assert_close(found, hidden.double().mean(1))
    fastpool.weighted_mean(hidden, weights=row(1e-40, 1e-40, 1e-40).float())


def test_where_it_is_looked_at(backend: str) -> None:
    """At real tokens of segments, in the order of segments, each by itself; weights of any stride."""
    hidden, weights = torch.randn(10, 8), torch.full((10, 2), 1e300, dtype=torch.float64)[:, 1]
    weights[2:8] = 1.0
    weights[4], weights[6] = 1e-300, 1e301
    mask = torch.ones(10, dtype=torch.int64)
    mask[6] = 0
    inside = {"starts": torch.tensor([2, 3, 2]), "ends": torch.tensor([5, 8, 2])}
    expected = fastpool.weighted_mean(hidden, mask, **inside, weights=weights.float())
    assert same_bits(fastpool.weighted_mean(hidden, mask, **inside, weights=weights), expected)
    check("6", 1e301, hidden, weights=weights, **inside)
    check("4", 1e-300, hidden, weights=weights, starts=torch.tensor([2, 4]), ends=torch.tensor([6, 5]))
    check("8", 1e300, hidden, mask=mask, weights=weights, cu_seqlens=torch.tensor([2, 2, 8, 10]))
    padded = {"hidden": hidden.view(2, 5, 8), "weights": weights.view(2, 5)}
    check("0, 0", 1e300, **padded)
    check("1, 1", 1e301, **padded, starts=torch.tensor([2, 0]), ends=torch.tensor([5, 3]))
    fastpool.weighted_mean(**padded, mask=mask.view(2, 5), starts=torch.tensor([2, 0]), ends=torch.tensor([5, 3]))
    fastpool.weighted_mean(torch.randn(2, 0, 8), weights=torch.ones(2, 0).double())
    fastpool.weighted_mean(hidden[:0], weights=weights[:0], cu_seqlens=torch.tensor([0, 0]))


def test_flushed_subnormals_are_seen(backend: str) -> None:
    try:
        torch.set_flush_denormal(True)
        check("0, 1", 1e-310, torch.randn(1, 3, 8), weights=row(0.0, 1e-310, 5e-324))
    finally:
        torch.set_flush_denormal(False)


def test_other_errors_come_first(backend: str) -> None:
    weights = row(1e300, 1, 1)
    with pytest.raises(ValueError, match="ends must lie between"):
        fastpool.weighted_mean(torch.randn(1, 3, 8), weights=weights, ends=torch.tensor([4]))
    with pytest.raises(ValueError, match="mask must hold"):
        fastpool.weighted_mean(torch.randn(1, 3, 8), torch.tensor([[1, 2, 0]]), weights=weights)


def test_native_and_python_say_the_same() -> None:
    """Of weights of every size in segments anywhere: what the native library refuses, Python has words for."""
    chosen = random.Random(0)
    values = (0.0, 1e-320, 1e-300, SMALLEST / 2, SMALLEST, 1.0, LARGEST, LARGEST * 2, 1e300, -1e300, -1.0, NAN, INF)
    refused = 0
    for _ in range(300):
        some = chosen.sample(values, 3)
        weights = torch.tensor([chosen.choice(some) for _ in range(40)], dtype=torch.float64)
        bounds = torch.randint(0, 41, (2, 4), generator=torch.Generator().manual_seed(chosen.randrange(2**31)))
        mask = torch.tensor([chosen.random() > 0.3 for _ in range(40)])
        arguments = {"weights": weights, "starts": bounds.amin(0), "ends": bounds.amax(0)}
        said = []
        for name in ("native", "reference"):
            try:
                with fastpool.backend(name):
                    fastpool.weighted_mean(torch.ones(40, 1), mask, **arguments)
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]
        refused += said[0] != ""
    assert 50 < refused < 250


def test_gradients_have_seen_it() -> None:
    """The backward op looks at bounds alone."""
    hidden, weights = torch.randn(1, 3, 8), row(1e300, 1, 1)
    for name in cpu_backends():
        with fastpool.backend(name):
            gradient = torch.ones(1, 8)
            torch.ops.fastpool._pool_backward(
                *backward_arguments("weighted_mean", "hidden", gradient, hidden=hidden, weights=weights)
            )


def test_on_a_gpu_where_asked() -> None:
    """A meta tensor has no values to check, which shows whether they were asked for."""
    hidden, weights = torch.empty(1, 2, 8, device="meta"), torch.ones(1, 2, device="meta", dtype=torch.float64)
    call = PoolCall("weighted_mean", hidden, weights=weights)
    dispatch.check(call)
    fastpool.validate()
    dispatch.check(PoolCall("weighted_mean", hidden.double(), weights=weights))
    dispatch.check(PoolCall("weighted_mean", hidden, weights=weights.float()))
    with pytest.raises((NotImplementedError, RuntimeError)):
        dispatch.check(call)


def test_explain_and_compiled_calls_say_so_too() -> None:
    assert native.unavailable() is None
    hidden, weights = torch.randn(1, 3, 8), row(1e300, 1, 1)
    with pytest.raises(ValueError, match="scale them, or give float64 states"):
        fastpool.explain(hidden, weights=weights, mode="weighted_mean")
    compiled = torch.compile(
        lambda hidden, weights: fastpool.weighted_mean(hidden, weights=weights), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises((ValueError, RuntimeError), match="scale them, or give float64 states"):
        compiled(hidden, weights)
    assert compiled(hidden, weights.clamp(max=1)).shape == (1, 8)
