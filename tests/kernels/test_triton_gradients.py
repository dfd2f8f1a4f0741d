"""The Triton kernels of gradients give the reference's bits however the work is cut up. Without a GPU they run in
Triton's interpreter (conftest), on small shapes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.arguments import GRADIENTS_OF
from fastpool.calls import PoolBackwardCall, PoolCall, accumulator
from fastpool.modes import MODES
from fastpool.testing import (
    DTYPES,
    LAYOUTS,
    Target,
    function_of,
    gradients,
    own_arguments,
    same_bits,
    sequences,
    special_values,
    taking_turns,
    variants,
    variants_of_states,
)

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

import triton.language as tl  # after the skip
from helpers.triton_cuts import TRITON, Cut  # likewise

from fastpool.backends import triton as adapter  # likewise
from fastpool.triton_kernels import backward, config, normalize, plan, plan_backward, pool, segment  # likewise

REFERENCE = Target("reference", "cpu")
needs_interpreter = pytest.mark.skipif(
    TRITON.device == "cuda", reason="turns the interpreter's knobs; a GPU has compiled the constants in"
)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """Has every call cut up like this, instead of as the heuristic would."""

    def to(columns: int, rows: int, tiles: int = 1, scan: int = 64) -> None:
        monkeypatch.setattr(config, "tile", lambda width, element_size: (columns, rows))
        monkeypatch.setattr(config, "chunk", lambda *shape: rows * tiles)
        monkeypatch.setattr(config, "scan", lambda mean, weighted: (scan, 32))

    return to


def random_gradient(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """With zeros of either sign."""
    gradient = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradient[..., ::5] = 0.0
    gradient[..., 1::5] = -0.0
    return gradient.to(dtype)


def assert_reference_bits(mode: str, arguments: dict[str, Any], what: object = None, **more: Any) -> None:
    """Gradients of hidden, and of weights, scores or a query where they are given."""
    function = function_of(mode)
    gradient = random_gradient(REFERENCE.run(function, **arguments, **more).shape, torch.float64)

    def both(**arguments: Any) -> Tensor:
        hidden = arguments["hidden"]
        dtype = more.get("out_dtype") or hidden.dtype
        found = gradients(function, arguments, gradient.to(hidden.device, dtype), **more)
        given = [arguments[name] for name in GRADIENTS_OF if name in arguments]
        assert [x.dtype for x in found] == [x.dtype for x in given]
        return torch.cat([(x.values() if x.is_nested else x).double().flatten() for x in found])

    assert same_bits(TRITON.run(both, **arguments), REFERENCE.run(both, **arguments)), what


@pytest.mark.parametrize(("mode", "given", "layout", "dtype"), taking_turns(*DTYPES), ids=str)
def test_layouts(mode: str, given: str | None, layout: str, dtype: torch.dtype, cut: Cut) -> None:
    """Tiles that segments share and segments of several, with holes where the layout has them; fewer columns than
    hidden has."""
    cut(32, 8, tiles=3)
    batch = sequences([17, 1, 0, 9], 20, dtype, holes=LAYOUTS[layout].holes)
    assert_reference_bits(mode, LAYOUTS[layout].make(batch, given), truncate_dim=17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "given"), [("mean_sqrt_len", None), ("max", None), ("weighted_mean", "weights"), ("attention", "query")]
)
def test_dtypes(mode: str, given: str | None, dtype: torch.dtype) -> None:
    """Every dtype, cut up as the heuristic does."""
    for layout in ("padded_left_mask", "packed_shuffled"):
        batch = sequences([40, 0, 3], 24, dtype, holes=True)
        assert_reference_bits(mode, LAYOUTS[layout].make(batch, given), normalize=True, out_dtype=torch.float32)


@pytest.mark.parametrize(
    ("mode", "given", "layout", "columns", "rows", "tiles"),
    [("mean", None, "packed", *cut) for cut in ((8, 2, 1), (16, 1, 7), (32, 8, 2), (32, 64, 1))]
    + [("max", None, "padded_middle_strided", *cut) for cut in ((8, 2, 1), (32, 8, 2))]
    + [("weighted_mean", "weights", "packed_shuffled", *cut) for cut in ((8, 2, 1), (32, 8, 2))]
    + [("softmax_mean", "scores", "packed_shuffled", 8, 2, 1), ("attention", "query", "packed", 8, 2, 1)],
)
def test_cuts(mode: str, given: str | None, layout: str, columns: int, rows: int, tiles: int, cut: Cut) -> None:
    cut(columns, rows, tiles)
    batch = sequences([1, 19, 0, 0, 6], 24, torch.float32, holes=LAYOUTS[layout].holes)
    assert_reference_bits(mode, LAYOUTS[layout].make(batch, given))


@pytest.mark.parametrize(("mode", "given"), [one for one in variants() if MODES[one[0]].weighted])
def test_total_weight_of_many_leaves(mode: str, given: str | None, cut: Cut) -> None:
    """Groups of two leaves in the binary counter."""
    cut(8, 64, scan=64)
    batch = sequences([32 * 13 + 5], 8, torch.float32, holes=True)
    assert_reference_bits(mode, LAYOUTS["padded_left_mask"].make(batch, given))


@pytest.mark.parametrize("bounds", ["cu_seqlens", "starts and ends"])
def test_queries(bounds: str, cut: Cut) -> None:
    """Some of all segments, and some of each one's own, of several pieces; a token gets its shares in the order of
    segments and then of queries."""
    cut(8, 4, tiles=2)
    (one,) = sequences([20], 20, torch.float32)
    cu = torch.tensor([2, 9, 9, 18])
    given = {"cu_seqlens": cu} if bounds == "cu_seqlens" else {"starts": cu[:-1], "ends": torch.tensor([16, 9, 20])}
    drawn = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(7)) / 4
    for query in (drawn[0], drawn.bfloat16(), drawn[0].T.contiguous().T):
        more = {"scale": 0.7, "truncate_dim": 17}
        assert_reference_bits("attention", {"hidden": one.states, "query": query, **given}, query.shape, **more)


@pytest.mark.parametrize("last", [1e6, -1e6, torch.inf, -torch.inf, torch.nan])
def test_scores(last: float, cut: Cut) -> None:
    cut(8, 4)
    (one,) = sequences([40], 8, torch.float32)
    scores = torch.where(torch.arange(40) == 39, last, torch.arange(40.0) * 3)
    assert_reference_bits("softmax_mean", {"hidden": one.states[None], "scores": scores[None]})


STARTS, ENDS = [0, 30, 5, 5, 50, 17, 3], [60, 33, 20, 5, 41, 55, 58]  # overlap, out of order, empty, backwards


@pytest.mark.parametrize(
    ("mode", "given", "at_once"),
    [(*variant, 128) for variant in variants()]
    + [
        pytest.param(*one, 2, marks=needs_interpreter)
        for one in (("mean", None), ("max", None), ("weighted_mean", "weights"))
    ],
)
def test_overlapping_segments(
    mode: str, given: str | None, at_once: int, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's shares are added up in the order of segments, however many segments are looked at in one go; rows of no
    segment are 0."""
    if at_once != segment.SEGMENTS_AT_ONCE.value:
        monkeypatch.setattr(segment, "SEGMENTS_AT_ONCE", tl.constexpr(at_once))
    cut(16, 4, tiles=4)
    (one,) = sequences([64], 20, torch.float32, holes=True)
    starts, ends = torch.tensor(STARTS), torch.maximum(torch.tensor(ENDS), torch.tensor(STARTS))
    arguments = {"hidden": one.states, "mask": one.real, "starts": starts, "ends": ends}
    own = {"weights": one.weights.bfloat16()} if given == "weights" else own_arguments(given, one.weights, 20)
    assert_reference_bits(mode, arguments | own)


@needs_interpreter
def test_search_among_many_segments(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which many are empty."""
    monkeypatch.setattr(segment, "WAYS", tl.constexpr(4))
    monkeypatch.setattr(segment, "SEGMENTS_AT_ONCE", tl.constexpr(2))
    cut(8, 2, tiles=4)
    batch = sequences([3, 0, 0, 20, 1, 5, 0, 2, 1, 3, 2, 0, 5, 0, 0, 0, 10, 0], 8, torch.float32)
    for mode in ("mean", "last"):
        assert_reference_bits(mode, LAYOUTS["packed"].make(batch, None))


def test_first_maximum() -> None:
    """Of equal ones, of zeros of either sign, and of NaN."""
    nan = float("nan")
    hidden = torch.tensor([[1.0, -0.0, 5.0], [2.0, 0.0, nan], [2.0, -1.0, 7.0], [2.0, 0.0, nan]])
    gradient = torch.tensor([[10.0, 20.0, 30.0]])
    mask = torch.tensor([[True, True, True, True], [False, False, True, True], [True, False, False, True]])

    def of(hidden: Tensor, mask: Tensor) -> Tensor:
        return gradients(fastpool.max, {"hidden": hidden, "mask": mask}, gradient.to(hidden.device).expand(3, 3))[0]

    got = TRITON.run(of, hidden.expand(3, 4, 3).clone(), mask)
    expected = torch.zeros(3, 4, 3)
    expected[0, 1, 0], expected[0, 0, 1], expected[0, 1, 2] = gradient[0]
    expected[1, 2, 0], expected[1, 3, 1], expected[1, 3, 2] = gradient[0]
    expected[2, 3, 0], expected[2, 0, 1], expected[2, 3, 2] = gradient[0]
    assert same_bits(got, expected)


@pytest.mark.parametrize(
    ("mode", "given"), [(mode, given) for mode, given in variants() if given or mode != "weighted_mean"]
)
def test_special_values(mode: str, given: str | None, cut: Cut) -> None:
    """Of token states and of gradients, in whole sequences; and what a token gets leaks into no other."""
    cut(32, 4)
    hidden = special_values(6, 12, 40)
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[:, 3] = mask[:, 10:] = False
    pool = {"hidden": hidden, "mask": mask, "truncate_dim": 33}
    pool |= own_arguments(given, torch.rand(6, 12, generator=torch.Generator().manual_seed(1)), 40)
    if given == "weights":
        pool["weights"] = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, -0.0, -1.0])[:, None].expand(6, 12)

    def of(gradient: Tensor, **pool: Any) -> Tensor:
        return gradients(function_of(mode), pool, gradient)[0]

    gradient = special_values(6, 1, 33)[:, 0]
    got = TRITON.run(of, gradient, **pool)
    assert same_bits(got, REFERENCE.run(of, gradient, **pool))
    assert same_bits(got[:, 3], torch.zeros(6, 40))
    assert same_bits(got[:, 10:], torch.zeros(6, 2, 40))
    if given != "query":  # whose products have all columns
        assert same_bits(got[..., 33:], torch.zeros(6, 12, 7))


def backward_call(mode: str, hidden: Tensor, of: str = "hidden", **more: Any) -> PoolBackwardCall:
    """On the device; the gradient of a result that is 0."""
    pool = PoolCall(mode, hidden.to(TRITON.device), **{k: v.to(TRITON.device) for k, v in more.items()})
    like = pool.hidden.new_zeros(pool.shape, dtype=accumulator(hidden.dtype))
    return PoolBackwardCall(pool, random_gradient(like.shape, like.dtype).to(like.device), like, of)


@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_bounds_are_clamped(mode: str, given: str | None, cut: Cut) -> None:
    """Whatever index tensors hold, nothing outside hidden is touched, and every row is written. The adapter is asked
    itself: before it, a CPU call's values are checked."""
    cut(16, 4, tiles=4)
    hidden, own = torch.zeros(100, 16), own_arguments(given, torch.rand(100), 16)
    starts, ends = torch.tensor([-5, 90, 50, 2**62, -(2**62), 200]), torch.tensor([3, 120, 40, 2**62 + 5, 2**62, 100])
    first = starts.clamp(0, 100)
    clean = {"starts": first, "ends": torch.maximum(ends.clamp(0, 100), first)}
    got = adapter.pool_backward(backward_call(mode, hidden, starts=starts, ends=ends, **own))
    assert same_bits(got, adapter.pool_backward(backward_call(mode, hidden, **clean, **own)))
    # A cu_seqlens that runs backwards: no gradient is promised, but no row is left as the memory was.
    backwards = torch.tensor([0, 70, 3, 2**62, 100, -5, 40])
    torch.full((100, 16), float("nan"), device=TRITON.device)  # what an allocator would hand out next
    for of in ("hidden", *own):
        assert not adapter.pool_backward(backward_call(mode, hidden, of, cu_seqlens=backwards, **own)).isnan().any()


def test_hidden_is_not_read(cut: Cut) -> None:
    """Where its values do not matter, an expanded row stands for it, with NaN."""
    cut(8, 4)
    row = torch.full((8,), float("nan"), device=TRITON.device)
    for mode, given in variants_of_states():
        if not MODES[mode].gradient_reads_hidden("hidden"):
            call = backward_call(mode, torch.zeros(2, 5, 8), **own_arguments(given, torch.rand(2, 5), 8))
            call.pool.hidden = row.expand(2, 5, 8)
            assert not adapter.pool_backward(call).isnan().any()


@pytest.mark.parametrize(
    ("hidden", "batch"), [((0, 5, 8), 0), ((2, 0, 8), 2), ((2, 5, 0), 2), ((0, 8), 3), ((7, 8), 0)]
)
def test_empty(hidden: tuple[int, ...], batch: int) -> None:
    more = {} if len(hidden) == 3 else {"cu_seqlens": torch.zeros(batch + 1, dtype=torch.int32)}
    for mode, given in variants_of_states():
        own = own_arguments(given, torch.ones(hidden[:-1]), hidden[-1])
        for of in ("hidden", *own):
            got = adapter.pool_backward(backward_call(mode, torch.ones(hidden), of, **more, **own))
            shapes = {"hidden": hidden, "query": (batch, 1, hidden[-1])}
            assert same_bits(got.cpu(), torch.zeros(shapes.get(of, hidden[:-1])))


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
def test_weights_of_any_dtype(weights_dtype: torch.dtype, cut: Cut) -> None:
    """float64 is rounded once, to 16 bits too."""
    cut(8, 8)
    (one,) = sequences([70], 20, torch.float64, holes=True)
    weights = torch.full((140,), float("nan"), dtype=weights_dtype)[::2]
    weights[one.real] = one.weights[one.real].to(weights_dtype)
    hidden = one.states.masked_fill(~one.real[:, None], float("nan"))
    bounds = {"starts": torch.tensor([3, 0]), "ends": torch.tensor([70, 40])}
    assert_reference_bits("weighted_mean", {"hidden": hidden, "mask": one.real, "weights": weights, **bounds})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [128, 16])  # in one piece, and tile by tile
def test_l2_normalize(columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "row_columns", lambda width, element_size, warp_size: columns)
    x = torch.randn(2, 2, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    huge = x.double().sign().to(dtype) * (6e4 if dtype == torch.float16 else 3e38)
    special = special_values(6, 1, 60).to(dtype)

    def of(x: Tensor, **more: Any) -> Tensor:
        shape = (*x.shape[:-1], more.get("truncate_dim") or x.shape[-1])
        gradient = random_gradient(shape, dtype).to(x.device)
        return gradients(fastpool.l2_normalize, {"x": x}, gradient, **more)[0]

    views = (x.transpose(0, 1), x[0, 0], huge[0], special, x[:1].expand(2, 2, 2, 70).permute(2, 0, 1, 3))
    for view, more in zip(
        views, ({}, {"truncate_dim": 33, "eps": 20.0}, {}, {"eps": 0.0}, {"truncate_dim": 33}), strict=True
    ):
        assert same_bits(TRITON.run(of, view, **more), REFERENCE.run(of, view, **more)), more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [128, 16])  # in one piece, and tile by tile
def test_l2_normalize_dims(columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind them neither x nor the gradient shows."""
    monkeypatch.setattr(plan, "row_columns", lambda width, element_size, warp_size: columns)
    x = torch.randn(4, 3, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0, 0], x[1, 1] = 6e4 if dtype == torch.float16 else 3e38, 0.0
    truncate_dims = torch.tensor([[64, 9, 33, 1], [0, 64, 16, 17], [63, 32, 8, 15]]).T
    x = torch.where(torch.arange(80) < truncate_dims[..., None], x, torch.nan)

    def of(x: Tensor, truncate_dims: Tensor, **more: Any) -> Tensor:
        gradient = random_gradient((*x.shape[:-1], more["truncate_dim"]), dtype).to(x.device)
        gradient = torch.where(
            torch.arange(more["truncate_dim"], device=x.device) < truncate_dims[..., None], gradient, torch.nan
        )
        return gradients(fastpool.l2_normalize, {"x": x, "truncate_dims": truncate_dims}, gradient, **more)[0]

    for view, index, more in (
        (x, truncate_dims.int(), {"truncate_dim": 65, "eps": 0.0}),
        (x.transpose(0, 1), truncate_dims.T, {"truncate_dim": 64}),
        (x[0, 2], truncate_dims[0, 2], {"truncate_dim": 65}),
    ):
        assert same_bits(TRITON.run(of, view, index, **more), REFERENCE.run(of, view, index, **more)), more


def test_arguments_stand_in_the_kernels_order() -> None:
    """A program that is known is launched with the values alone."""
    device = plan.DeviceProperties("test", 132)
    calls = [backward_call("max", torch.zeros(2, 5, 8))]
    calls += [
        backward_call("weighted_mean", torch.zeros(2, 5, 8), of, weights=torch.ones(2, 5))
        for of in ("hidden", "weights")
    ]
    calls += [backward_call("attention", torch.zeros(2, 5, 8), of, query=torch.ones(8)) for of in ("hidden", "query")]
    planned = [one for call in calls for one in plan_backward.plan_pool_backward(call, device)]
    x = torch.zeros(2, 8)
    planned.append(plan.plan_normalize_backward(fastpool.ops.call_of("_l2_normalize_backward", x, x, 1e-12), device))
    kernels = (backward.segment_prologue_kernel, backward.first_maximum_kernel, backward.scatter_gradient_kernel)
    kernels += (backward.scatter_weight_gradient_kernel, normalize.normalize_backward_kernel, pool.pool_kernel)
    assert {one.kernel for one in planned} == set(kernels)
    for one in planned:
        assert list(one.arguments) == list(one.kernel.arg_names)


@pytest.mark.parametrize("width", [1, 64, 384, 1024, 4096, 16384])
@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_tiles_are_sound(element_size: int, width: int) -> None:
    columns, rows = config.tile(width, element_size)
    for number in (columns, rows):
        assert number == config.power_of_two(number)
    assert columns * rows * element_size == config.TILE_BYTES
    assert columns * element_size >= config.LOAD_BYTES
    strips = -(-width // columns)
    for total in (1, 100, 10**5, 10**9):
        chunk = config.chunk(total, strips, rows, 132)
        assert chunk % rows == 0
        assert -(-total // chunk) * strips <= max(16 * 132, strips)
