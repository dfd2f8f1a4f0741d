"""What softmax_mean and attention promise beside what every mode does: many queries, scores of every size, and which
tokens are read."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.reference.elementary import exponential, times_power_of_two
from fastpool.testing import DTYPES, LAYOUTS, cpu_backends, function_of, gradients, own_arguments, same_bits, sequences

NAN, INF = float("nan"), float("inf")
LEAST = torch.finfo(torch.float32).min  # what a mask adds to scores


@pytest.fixture(params=cpu_backends())
def backend(request: pytest.FixtureRequest) -> Any:
    with fastpool.backend(request.param):
        yield request.param


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(hidden: Tensor, scores: Tensor) -> Tensor:
    """[..., S, H] and [..., S] in float64."""
    return (scores.double().softmax(-1)[..., None] * hidden.double()).sum(-2)


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


# ---- queries


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_query_has_the_bits_that_it_has_alone(layout: str, backend: str) -> None:
    """[K, H], and the same for every segment, [B, K, H]; in every layout."""
    few = backend == "triton"
    for dtype in DTYPES[1:2] if few else DTYPES:
        batch = sequences([3, 0, 40] if few else [3, 0, 40, 70], 20, dtype, holes=LAYOUTS[layout].holes)
        arguments, query = LAYOUTS[layout].make(batch, None), drawn(3, 20)
        more = {"scale": 0.5, "truncate_dim": 17, "normalize": True}
        together = fastpool.attention(**arguments, query=query, **more)
        assert together.shape == (len(batch), 3, 17)
        alone = [fastpool.attention(**arguments, query=one, **more) for one in query]
        assert same_bits(together, torch.stack(alone, 1))
        expanded = query.expand(len(batch), 3, 20)
        assert same_bits(fastpool.attention(**arguments, query=expanded, **more), together)
        shifted = torch.stack([query.roll(b, 0) for b in range(len(batch))])  # a query of each segment's own
        own = fastpool.attention(**arguments, query=shifted, **more)
        for b in range(len(batch)):
            assert same_bits(own[b], together[b].roll(b, 0))


def test_any_strides_and_dtype_of_a_query(backend: str) -> None:
    hidden, query = drawn(2, 40, 12), drawn(3, 12, seed=1).half()
    expected = fastpool.attention(hidden, query.float())
    for one in (query, query.double(), query.T.contiguous().T, query.repeat_interleave(2, 1)[:, ::2]):
        assert same_bits(fastpool.attention(hidden, one), expected)
    per_segment = query.float().expand(2, 3, 12)
    for each in (per_segment, per_segment.contiguous(), per_segment.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        assert same_bits(fastpool.attention(hidden, each), expected)
    assert same_bits(fastpool.attention(hidden, query[:1]), expected[:, :1])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_query_gives_no_vector(shape: tuple[int, ...], backend: str) -> None:
    query, hidden = torch.empty(shape), drawn(2, 5, 8)
    assert fastpool.attention(hidden, query).shape == (2, 0, 8)
    of_hidden, of_query = gradients(fastpool.attention, {"hidden": hidden, "query": query}, torch.empty(2, 0, 8))
    assert same_bits(of_hidden, torch.zeros(2, 5, 8))
    assert of_query.shape == shape


def test_attention_is_softmax_mean_of_its_products(backend: str) -> None:
    """Where products are exact: they, times scale, are the scores."""
    hidden = torch.randint(-4, 5, (3, 70, 12), generator=torch.Generator().manual_seed(0)).float()
    query, mask = torch.tensor([0.5, -0.25, 1.0] * 4), drawn(3, 70) > -1
    for scale in (1.0, 0.5, -2.0, 0.0):
        expected = fastpool.softmax_mean(hidden, mask, scores=scale * (hidden @ query))
        assert same_bits(fastpool.attention(hidden, query, mask, scale=scale), expected)
    torch.testing.assert_close(fastpool.attention(hidden, query, mask, scale=0.0), fastpool.mean(hidden, mask))


def test_columns_that_are_cut_off_are_products_still(backend: str) -> None:
    hidden, query = drawn(2, 40, 12), drawn(2, 12, seed=1)
    whole = fastpool.attention(hidden, query)
    assert same_bits(fastpool.attention(hidden, query, truncate_dim=5), whole[..., :5])
    assert not same_bits(fastpool.attention(hidden[..., :5], query[:, :5]), whole[..., :5])


def test_the_gradient_of_a_shared_query_adds_up() -> None:
    """Of [H] and [K, H] it is the sum of what each segment's own query, [B, K, H], has."""
    hidden, query = drawn(4, 40, 12).double(), drawn(3, 12, seed=1).double()
    gradient = drawn(4, 3, 12, seed=2).double()
    shared = gradients(fastpool.attention, {"hidden": hidden, "query": query}, gradient)
    own = gradients(fastpool.attention, {"hidden": hidden, "query": query.expand(4, 3, 12)}, gradient)
    assert same_bits(shared[0], own[0])
    torch.testing.assert_close(shared[1], own[1].sum(0))
    one = gradients(fastpool.attention, {"hidden": hidden, "query": query[1]}, gradient[:, 1])
    assert same_bits(one[1], shared[1][1])


# ---- scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_which_tokens_weigh_nothing(dtype: torch.dtype, backend: str) -> None:
    """-inf: as if the token were padding. All of them, or no real token: zeros. inf or NaN: NaN, in that segment."""
    hidden = drawn(6, 40, 12).to(dtype)
    scores = drawn(6, 40, seed=1)
    mask = torch.ones(6, 40, dtype=torch.bool)
    scores[0, 5:] = scores[1] = -INF
    mask[2] = False
    scores[3, 7], scores[4, 7] = INF, NAN
    result = fastpool.softmax_mean(hidden, mask, scores=scores)
    torch.testing.assert_close(result[:1], fastpool.softmax_mean(hidden[:1, :5], scores=scores[:1, :5]))
    assert same_bits(result[1:3], torch.zeros(2, 12, dtype=dtype))
    assert result[3:5].isnan().all()
    assert same_bits(result[5:], fastpool.softmax_mean(hidden[5:], scores=scores[5:]))
    of_hidden, of_scores = gradients(
        fastpool.softmax_mean, {"hidden": hidden, "scores": scores}, torch.ones_like(result)
    )
    assert same_bits(of_hidden[1], torch.zeros_like(of_hidden[1]))
    assert (of_scores[0, 5:] == 0).all()
    assert (of_scores[1] == 0).all()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_a_query_makes_of_a_token_that_is_not_finite(value: float, backend: str) -> None:
    """NaN in its own segment."""
    hidden, query = drawn(3, 40, 12), drawn(2, 12, seed=1).abs()
    expected = fastpool.attention(hidden, query)
    hidden[1, 7, 3] = value
    result = fastpool.attention(hidden, query)
    assert same_bits(result[::2], expected[::2])
    assert (~result[1, :, 3].isfinite()).all()
    query[1, 3] = value
    assert not fastpool.attention(hidden, query)[:, 1].isfinite().any()


@pytest.mark.parametrize("poison", [NAN, INF])
def test_padding_is_nothing(poison: float, backend: str) -> None:
    """Not of hidden, nor of scores; nor do rows of no segment count."""
    hidden, scores, query = drawn(3, 40, 12), drawn(3, 40, seed=1), drawn(12, seed=2)
    mask = drawn(3, 40, seed=3) > 0
    starts, ends = torch.tensor([0, 5, 9]), torch.tensor([40, 33, 9])
    inside = (torch.arange(40) >= starts[:, None]) & (torch.arange(40) < ends[:, None]) & mask
    bounds = {"mask": mask, "starts": starts, "ends": ends}
    expected = fastpool.softmax_mean(hidden, scores=scores, **bounds), fastpool.attention(hidden, query, **bounds)
    hidden[~inside], scores[~inside] = poison, poison
    assert same_bits(fastpool.softmax_mean(hidden, scores=scores, **bounds), expected[0])
    assert same_bits(fastpool.attention(hidden, query, **bounds), expected[1])
    arguments = {"hidden": hidden, "scores": scores, **bounds}
    for gradient in gradients(fastpool.softmax_mean, arguments, torch.ones(3, 12)):
        assert gradient.isfinite().all()
        assert (gradient[~inside] == 0).all()


def test_masks_that_are_added_to_scores(backend: str) -> None:
    """finfo.min instead of -inf differs only where a text has no other token."""
    hidden, scores = drawn(3, 40, 12), drawn(3, 40, seed=1)
    real = drawn(3, 40, seed=2) > 0
    real[2] = False
    results = [fastpool.softmax_mean(hidden, scores=scores.masked_fill(~real, value)) for value in (-INF, LEAST)]
    assert same_bits(results[0][:2], results[1][:2])
    assert same_bits(results[0][2], torch.zeros(12))
    torch.testing.assert_close(results[1][2], hidden[2].mean(0))


@pytest.mark.parametrize(("offset", "limit"), [(1e4, 2e-6), (-1e4, 2e-6), (1e6, 1e-5)])
def test_scores_need_no_centre(offset: float, limit: float) -> None:
    """Up to 10,000; then their error grows with them, as the pages say."""
    hidden, scores = drawn(2, 700, 64), drawn(2, 700, seed=1) * 3 + offset
    for name in ("native", "reference"):
        with fastpool.backend(name):
            assert relative(fastpool.softmax_mean(hidden, scores=scores), formula(hidden, scores)) <= limit


@pytest.mark.parametrize("size", [6e6, 1e7, 1e9, 1e30])
def test_huge_scores_are_moved_by_a_unit_at_most(size: float) -> None:
    unit = float(torch.nextafter(torch.tensor(size), torch.tensor(torch.inf)) - size)
    scores = torch.tensor([[size, size + unit]])
    share = fastpool.softmax_mean(torch.tensor([[[0.0], [1.0]]]), scores=scores).item()
    least, most = (1 / (1 + math.exp(-min(distance, 700.0))) for distance in (0.0, 3 * unit))
    assert least <= share <= most


@pytest.mark.parametrize("kind", ["-300 to 80", "+-80", "rising", "equal"])
def test_long_texts(kind: str) -> None:
    """Against float64, for scores whose weights run from nothing to all there is."""
    rows = 100_000 if kind == "+-80" else 50_000
    hidden = drawn(1, rows, 32) + 0.5
    uniform = torch.rand(1, rows, generator=torch.Generator().manual_seed(1))
    scores = {
        "-300 to 80": uniform * 380 - 300,
        "+-80": uniform * 160 - 80,
        "rising": torch.linspace(-300, 80, rows)[None],
        "equal": torch.full((1, rows), 0.1),
    }[kind]
    assert relative(fastpool.softmax_mean(hidden, scores=scores), formula(hidden, scores)) <= 5e-6


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "one peak"])
def test_a_running_maximum_gives_the_bits_of_a_known_one(order: str, backend: str) -> None:
    """Each order is a sum of its own: that of weighted_mean with e^score over the power of two that is the largest's,
    where nothing is ever scaled."""
    rows = 300 if backend == "triton" else 3000
    hidden, drawn_scores = drawn(1, rows, 24), drawn(rows, seed=1) * 5
    rising = drawn_scores.sort().values
    scores = {
        "ascending": rising,
        "descending": rising.flip(0),
        "shuffled": drawn_scores,
        "one peak": torch.cat([rising[::2], rising[1::2].flip(0)]),
    }[order][None]
    p, n = exponential(scores)
    with fastpool.backend("reference"):
        expected = fastpool.weighted_mean(hidden, weights=times_power_of_two(p, n - n.max()))
    assert same_bits(fastpool.softmax_mean(hidden, scores=scores), expected)


@pytest.mark.parametrize("mode", ["softmax_mean", "attention"])
def test_any_cut_of_the_work_gives_the_same_bits(mode: str, backend: str) -> None:
    """Threads, texts beside each other, and columns alone."""
    rows = 200 if backend == "triton" else 5000
    hidden, weights = drawn(2, rows, 24), torch.rand(2, rows, generator=torch.Generator().manual_seed(1)) * 40
    own = own_arguments("scores" if mode == "softmax_mean" else "query", weights, 24)
    pool = function_of(mode)
    expected = pool(hidden, **own)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same_bits(pool(hidden, **own), expected)
        assert same_bits(pool(hidden, truncate_dim=7, **own), expected[:, :7])
        for b in range(2):
            one = {name: value[b : b + 1] if name == "scores" else value for name, value in own.items()}
            assert same_bits(pool(hidden[b : b + 1], **one)[0], expected[b])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scores_of_every_dtype(dtype: torch.dtype, backend: str) -> None:
    """They become the accumulator's."""
    hidden, scores = drawn(2, 40, 12), drawn(2, 40, seed=1).to(torch.bfloat16)
    expected = fastpool.softmax_mean(hidden, scores=scores.float())
    assert same_bits(fastpool.softmax_mean(hidden, scores=scores.to(dtype)), expected)
    wide = drawn(2, 40, seed=1).double() / 3
    assert same_bits(fastpool.softmax_mean(hidden, scores=wide), fastpool.softmax_mean(hidden, scores=wide.float()))


# ---- float64 scores beside narrower states


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_scores_beyond_float32(backend: str) -> None:
    hidden, largest = drawn(1, 3, 8), torch.finfo(torch.float32).max
    for scores, at, value in (
        (row(1e300, 0.0, 0.0), 0, "1e+300"),
        (row(NAN, -1e300, 1e40), 2, "1e+40"),
        (row(-INF, largest * (1 + 2**-40), 1e300), 1, r"3.40282\d*e\+38"),
    ):
        words = (
            (
                r"^fastpool\.softmax_mean: scores beside float32 states are float32, so none must be greater than "
                rf"3\.40282e\+38, got scores\[0, {at}\] = {value}; subtract their largest, or give float64 states"
            )
            .replace("e+300", r"e\+300")
            .replace("e+40;", r"e\+40;")
        )
        for given in (hidden, hidden.clone().requires_grad_()):
            with pytest.raises(ValueError, match=words):
                fastpool.softmax_mean(given, scores=scores)
        with pytest.raises((ValueError, RuntimeError), match=words):
            torch.ops.fastpool.softmax_mean(hidden, scores=scores)
        with pytest.raises(ValueError, match=words):
            fastpool.explain(hidden, scores=scores, mode="softmax_mean")
        fastpool.softmax_mean(hidden.double(), scores=scores)


def test_scores_that_fit(backend: str) -> None:
    """What is below float32's smallest number weighs nothing, as a mask's finfo.min does; what is no real token's is
    not looked at."""
    hidden = drawn(1, 3, 8)
    for scores in (row(-1e300, 0.0, 1.0), row(torch.finfo(torch.float64).min, 3e38, 0.0), row(INF, 0.0, NAN)):
        assert same_bits(
            fastpool.softmax_mean(hidden, scores=scores), fastpool.softmax_mean(hidden, scores=scores.float())
        )
    mask = torch.tensor([[True, False, True]])
    scores = row(1.0, 1e300, 2.0)
    assert same_bits(
        fastpool.softmax_mean(hidden, mask, scores=scores), fastpool.softmax_mean(hidden, mask, scores=scores.float())
    )
    inside = {"starts": torch.tensor([0, 2]), "ends": torch.tensor([1, 3])}
    fastpool.softmax_mean(hidden[0], scores=scores[0], **inside)
    with pytest.raises(ValueError, match=r"got scores\[1\] = 1e\+300"):
        fastpool.softmax_mean(hidden[0], scores=scores[0], starts=torch.tensor([2, 0]), ends=torch.tensor([3, 2]))
