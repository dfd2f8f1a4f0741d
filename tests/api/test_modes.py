"""Every mode, in every layout, dtype and odd size, against the plain formula in float64."""

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import several
from fastpool.backends import native
from fastpool.constants import LEAF, NORM_EPS, NORM_SCALES
from fastpool.modes import MODES
from fastpool.testing import (
    DTYPES,
    LAYOUTS,
    Sequence,
    cpu_backends,
    error,
    exact,
    function_of,
    own_arguments,
    required,
    sequences,
    variants,
)

ROOT = Path(__file__).parents[2]
LENGTHS = (7, 0, 1, 31, 32, 33, 2, 64, 129, 300)
# Around the vector widths of every instruction set, and real ones.
WIDTHS = (1, 3, 8, 17, 33, 129, 384)


@pytest.mark.parametrize("backend", ["native", "reference"])  # test_triton compares with native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_matches_float64(mode: str, given: str | None, layout: str, dtype: torch.dtype, backend: str) -> None:
    """The reference, which takes its time, in fewer widths and lengths: native has its bits in others (test_bits)."""
    pool, holes = function_of(mode), LAYOUTS[layout].holes
    widths, lengths = (WIDTHS, LENGTHS) if backend == "native" else ((17,), (0, 1, 31, 33, 129))
    for width in widths:
        batch, exactly = in_float64(mode, given, lengths, width, dtype, holes)
        arguments = LAYOUTS[layout].make(batch, given)
        for normalize in (False, True):
            with fastpool.backend(backend):
                result = pool(**arguments, normalize=normalize)
            assert result.dtype == dtype
            assert result.shape == (len(batch), width)
            for row, sequence, expected in zip(result, batch, exactly[normalize], strict=True):
                assert error(row, expected) <= 1, (width, normalize, len(sequence.states))


@lru_cache(64)
def in_float64(
    mode: str, given: str | None, lengths: tuple[int, ...], width: int, dtype: torch.dtype, holes: bool
) -> tuple[list[Sequence], list[list[Tensor]]]:
    """A batch and its exact results, not normalised and normalised: the same in every layout."""
    batch = sequences(lengths, width, dtype, holes=holes, seed=width)
    return batch, [[exact(mode, one, given, normalize=normalize) for one in batch] for normalize in (False, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_dim_and_out_dtype(mode: str, given: str | None, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    batch = sequences([5, 40, 0], 50, dtype)
    arguments = LAYOUTS["padded_right_mask"].make(batch, given)
    for truncate_dim in (1, 20, 50):
        for normalize in (False, True):
            result = function_of(mode)(**arguments, truncate_dim=truncate_dim, normalize=normalize, out_dtype=out_dtype)
            assert result.dtype == out_dtype
            assert result.shape == (3, truncate_dim)
            for row, sequence in zip(result, batch, strict=True):
                expected = exact(mode, sequence, given, truncate_dim, normalize)
                # A float64 result of float32 sums is exact to float32 only.
                shown = row.float() if dtype != torch.float64 and out_dtype == torch.float64 else row
                assert error(shown, expected) <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (0, 0, 8), (2, 3, 0)])
def test_nothing_to_pool_padded(mode: str, shape: tuple[int, int, int]) -> None:
    for name in cpu_backends():
        with fastpool.backend(name):
            hidden, mask = torch.full(shape, float("nan")), torch.zeros(shape[:2], dtype=torch.bool)
            result = function_of(mode)(hidden, mask=mask, normalize=True, **required(mode, shape))
            assert torch.equal(result, torch.zeros(shape[0], shape[2]))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_pool_packed(mode: str) -> None:
    def pool(hidden: Tensor, *cu_seqlens: int, **more: bool) -> Tensor:
        own = required(mode, hidden.shape)
        result: Tensor = function_of(mode)(hidden, cu_seqlens=torch.tensor(cu_seqlens), **own, **more)
        return result

    for name in cpu_backends():
        with fastpool.backend(name):
            assert pool(torch.zeros(0, 8), 0).shape == (0, 8)
            assert torch.equal(pool(torch.zeros(0, 8), 0, 0), torch.zeros(1, 8))
            hidden = torch.full((4, 8), float("nan"))
            assert torch.equal(pool(hidden, 2, 2, 2, normalize=True), torch.zeros(2, 8))


@pytest.mark.parametrize(("mode", "given"), variants())
def test_overlapping_segments(mode: str, given: str | None) -> None:
    (one,) = sequences([200], 24, torch.float32)
    starts, ends = torch.tensor([0, 10, 10, 150]), torch.tensor([200, 60, 60, 151])
    own = own_arguments(given, one.weights, 24)
    result = function_of(mode)(one.states, starts=starts, ends=ends, **own)
    for row, start, end in zip(result, starts, ends, strict=True):
        own = own_arguments(given, one.weights[None, start:end], 24)
        assert torch.equal(row, function_of(mode)(one.states[None, start:end], **own)[0])


def test_expanded_hidden() -> None:
    one = torch.randn(1, 6, 10)
    mask = torch.rand(4, 6) > 0.3
    assert torch.equal(fastpool.mean(one.expand(4, 6, 10), mask), fastpool.mean(one.repeat(4, 1, 1), mask))


def test_lengths_after_starts_exclude_a_prompt() -> None:
    hidden = torch.randn(3, 9, 4)
    lengths, prompts = torch.tensor([9, 5, 2]), torch.tensor([2, 0, 2])
    result = fastpool.mean(hidden, lengths=lengths, starts=prompts)
    assert torch.allclose(result[0], hidden[0, 2:9].mean(0))
    assert torch.allclose(result[1], hidden[1, :5].mean(0))
    assert torch.equal(result[2], torch.zeros(4))


def test_nested_with_gaps() -> None:
    values = torch.randn(10, 4)
    nested = torch.nested.nested_tensor_from_jagged(
        values, offsets=torch.tensor([0, 4, 10]), lengths=torch.tensor([2, 5])
    )
    result = fastpool.sum(nested)
    assert torch.equal(result, torch.stack([values[0:2].sum(0), fastpool.sum(values[None, 4:9])[0]]))


def test_weights_of_every_float_dtype() -> None:
    hidden = torch.randn(2, 40, 12)
    weights = torch.rand(2, 40).half().float()
    expected = fastpool.weighted_mean(hidden, weights=weights)
    assert torch.equal(fastpool.weighted_mean(hidden, weights=weights.half()), expected)
    assert torch.equal(fastpool.weighted_mean(hidden, weights=weights.double()), expected)
    assert torch.equal(fastpool.weighted_mean(hidden, weights=weights.bfloat16().float()),
                       fastpool.weighted_mean(hidden, weights=weights.bfloat16()))  # fmt: skip


def test_weights_that_add_up_to_nothing_give_zeros() -> None:
    hidden = torch.randn(2, 4, 8)
    weights = torch.tensor([[0.0, 0, 0, 0], [1, -1, 2, -2]])
    for name in cpu_backends():
        with fastpool.backend(name):
            assert torch.equal(fastpool.weighted_mean(hidden, weights=weights, normalize=True), torch.zeros(2, 8))


@pytest.mark.parametrize("eps", [1e-12, 0.5, 30.0])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 130), (2, 2, 2, 384), (300, 200), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    truncate_dim = max(1, shape[-1] // 2) if shape[-1] else None
    expected = torch.nn.functional.normalize(x[..., :truncate_dim].double(), dim=-1, eps=eps)
    for name in ("native", "reference"):
        with fastpool.backend(name):
            result = fastpool.l2_normalize(x, truncate_dim=truncate_dim, eps=eps)
        assert result.dtype == dtype
        assert result.shape == expected.shape
        width = max(1, result.shape[-1])
        for row, row_expected in zip(result.reshape(-1, width), expected.reshape(-1, width), strict=True):
            assert error(row, row_expected) <= 1


def test_l2_normalize_views_and_eps() -> None:
    x = torch.randn(4, 6, 20).transpose(0, 1)[:, ::2, 3:15]
    assert torch.allclose(fastpool.l2_normalize(x), torch.nn.functional.normalize(x, dim=-1))
    small = torch.full((1, 4), 1e-3)
    assert torch.allclose(fastpool.l2_normalize(small, eps=1.0), small)
    assert torch.equal(fastpool.l2_normalize(torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (6, 1), (5, 130), (2, 3, 40), (300, 200), (0, 4), (4, 0), (3, 0, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize_dims(dtype: torch.dtype, shape: tuple[int, ...], index: torch.dtype) -> None:
    """Each row cut by itself: among the sizes none at all, one column and all of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    for truncate_dim in {None, max(1, shape[-1] - 1)} if shape[-1] else {None}:
        columns = shape[-1] if truncate_dim is None else truncate_dim
        truncate_dims = torch.randint(0, columns + 1, shape[:-1], generator=generator).to(index)
        if truncate_dims.numel() >= 3:
            truncate_dims.view(-1)[:3] = torch.tensor([0, min(1, columns), columns])
        used = torch.arange(columns) < truncate_dims[..., None]
        expected = torch.nn.functional.normalize(x[..., :columns].double() * used, dim=-1)
        x = torch.cat([torch.where(used, x[..., :columns], float("nan")), x[..., columns:]], -1)  # nobody looks
        for name in ("native", "reference"):
            with fastpool.backend(name):
                result = fastpool.l2_normalize(x, truncate_dim=truncate_dim, truncate_dims=truncate_dims)
            assert (result.shape, result.dtype) == (expected.shape, dtype)
            assert not result[~used].signbit().any()
            width = max(1, columns)
            for row, wanted in zip(result.reshape(-1, width), expected.reshape(-1, width), strict=True):
                assert torch.equal(row[wanted == 0], torch.zeros_like(row[wanted == 0]))
                assert error(row, wanted) <= 1
        x = x.nan_to_num(1.0)


def test_exact_formulas() -> None:
    """`exact` follows the table's traits; here are the formulas without it."""
    sequence = sequences([9], 5, torch.float64, holes=True)[0]
    x, w = sequence.states[sequence.real], sequence.weights.double()[sequence.real, None]
    position = torch.arange(1, 10, dtype=torch.float64)[sequence.real, None]
    formulas = {
        "mean": x.mean(0),
        "mean_sqrt_len": x.sum(0) / len(x) ** 0.5,
        "sum": x.sum(0),
        "max": x.amax(0),
        "cls": x[0],
        "last": x[-1],
        "weighted_mean": (position * x).sum(0) / position.sum(),
    }
    for mode, expected in formulas.items():
        torch.testing.assert_close(exact(mode, sequence, None), expected)
    torch.testing.assert_close(exact("weighted_mean", sequence, "weights"), (w * x).sum(0) / w.sum())
    own = {**own_arguments("scores", sequence.weights, 5), **own_arguments("query", sequence.weights, 5)}
    scores, products = own["scores"].double()[sequence.real], x @ own["query"].double()
    torch.testing.assert_close(exact("softmax_mean", sequence, "scores"), scores.softmax(0) @ x)
    torch.testing.assert_close(exact("attention", sequence, "query"), products.softmax(0) @ x)
    once = x.clamp(min=0).log1p()
    for name, activated in (("relu", once), ("log1p_relu", once.log1p())):
        formulas[f"splade_max_{name}"], formulas[f"splade_sum_{name}"] = activated.amax(0), activated.sum(0)
        for pooling in ("max", "sum"):
            mode = f"splade_{pooling}_{name}"
            torch.testing.assert_close(exact(mode, sequence, None), formulas[mode])
    assert set(MODES) == {*formulas, "softmax_mean", "attention"}


def test_table_is_complete() -> None:
    """The same rows and constants on both sides of the language border; functions, and lines of the README, of each."""
    assert native.info is not None
    rows = [
        (mode.name, mode.select, mode.weight, mode.reduce, mode.divisor, mode.activation) for mode in MODES.values()
    ]
    assert rows == native.info.MODES
    assert (native.info.LEAF, native.info.NORM_EPS) == (LEAF, NORM_EPS)
    assert native.info.NORM_SCALES == NORM_SCALES
    assert native.info.MOST_MODES == several.MOST
    assert "splade" in fastpool.__all__
    for mode in MODES.values():
        if mode.of_logits:
            continue
        assert mode.formula[:20] in (function_of(mode.name).__doc__ or "").replace("The", "the")
        assert mode.name in fastpool.__all__
        assert f"| `{mode.name}` | {mode.formula} |" in (ROOT / "README.md").read_text()


def test_nobody_asks_which_mode() -> None:
    """Kernels, reference and dispatch look at a mode's traits: its name, and its traits' names, stand where the four
    ideas do and nowhere else."""
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "triton_kernels").glob("*.py")]
    sources += [
        *(ROOT / "python" / "fastpool").glob("*.py"),
        *(ROOT / "python" / "fastpool" / "reference").glob("*.py"),
        *(ROOT / "python" / "fastpool" / "onnx").glob("*.py"),
    ]
    names = "|".join(MODES)
    asks = re.compile(
        rf"mode\s*(==|!=|in\s*[\(\[{{\"\'])|Mode::|\b(Select|Weight|Reduce|Divisor)(::|\.)[A-Za-z]|[=!]=\s*[\"\'](?:{names})[\"\']"
    )
    ideas = {"modes", "segment", "weight", "state", "finish", "testing"}
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        if path.stem not in ideas
        for line in path.read_text().splitlines()
        if asks.search(line)
    ]
    assert not found, "\n".join(found)
