"""fastpool.pool: several modes of one batch have the bits of their own functions, on every backend."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import several
from fastpool.backends import native
from fastpool.calls import accumulator
from fastpool.modes import MODES
from fastpool.testing import DTYPES, LAYOUTS, cpu_backends, function_of, gradients, same_bits, sequences

# Every set of states that a kernel has together, in an order that is not theirs; tokens alone; some twice.
SETS = (
    ("mean",),
    ("mean", "sum", "mean"),
    ("max", "cls"),
    ("weighted_mean", "last"),
    ("max", "mean"),
    ("weighted_mean", "mean_sqrt_len"),
    ("max", "weighted_mean"),
    ("cls", "max", "weighted_mean", "last", "sum", "mean"),
    ("cls", "last"),
    ("mean", "softmax_mean", "max"),
)


def own_of(modes: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Weights and scores for those that take them, from a call with both."""
    return {name: value for name, value in given.items() if any(MODES[mode].takes(name) for mode in modes)}


def apart(modes: Sequence[str], arguments: dict[str, Any], given: dict[str, Any], **more: Any) -> Tensor:
    """What the functions give, one after another."""
    truncate_dim, normalize = more.get("truncate_dim"), more.get("normalize", False)
    hidden = arguments["hidden"]
    out_dtype = more.get("out_dtype") or hidden.dtype
    vectors = [
        function_of(mode)(**arguments, **own_of([mode], given), out_dtype=accumulator(hidden.dtype)) for mode in modes
    ]
    together = torch.cat(vectors, dim=-1)[:, :truncate_dim]
    if normalize:
        return fastpool.l2_normalize(together, out_dtype=out_dtype)
    parts = [function_of(mode)(**arguments, **own_of([mode], given), out_dtype=out_dtype) for mode in modes]
    return torch.cat(parts, dim=-1)[:, :truncate_dim]


@pytest.mark.parametrize("backend", [name for name in cpu_backends() if name != "triton"])
@pytest.mark.parametrize("modes", SETS, ids="+".join)
def test_bits_of_separate_calls(modes: Sequence[str], backend: str) -> None:
    for i, (name, layout) in enumerate(LAYOUTS.items()):
        dtype, width = DTYPES[i % 4], (21, 64)[i % 2]
        batch = sequences([3, 0, 40, 300], width, dtype, holes=layout.holes)
        given = {**layout.make(batch, "weights"), **layout.make(batch, "scores")}
        arguments = {key: value for key, value in given.items() if key not in ("weights", "scores")}
        own = own_of(modes, given)
        columns = width * len(modes)
        with fastpool.backend(backend):
            for more in ({}, {"normalize": True, "out_dtype": torch.float32}, {"truncate_dim": columns - 5}):
                result = fastpool.pool(**arguments, **own, modes=modes, **more)
                assert same_bits(result, apart(modes, arguments, own, **more)), (name, more)


@pytest.mark.parametrize("modes", SETS, ids="+".join)
def test_threads_and_instruction_sets(modes: Sequence[str]) -> None:
    assert native.info is not None
    hidden, weights = torch.randn(2, 9000, 40, generator=torch.Generator().manual_seed(0)), torch.rand(2, 9000)
    own = own_of(modes, {"weights": weights, "scores": weights})
    expected = apart(modes, {"hidden": hidden}, own)
    threads = torch.get_num_threads()
    try:
        for isa in native.info.isas():
            for n in (1, 2, 3):
                native.info.use_isa(isa)
                torch.set_num_threads(n)
                assert same_bits(fastpool.pool(hidden, modes=modes, **own), expected)
    finally:
        native.info.use_isa()
        torch.set_num_threads(threads)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(normalize: bool) -> None:
    """Those of the functions, added up."""
    modes = ("max", "weighted_mean", "softmax_mean")
    batch = sequences([30, 0, 5], 12, torch.float32, holes=True)
    given = {**LAYOUTS["packed_mask"].make(batch, "weights"), **LAYOUTS["packed_mask"].make(batch, "scores")}
    gradient = torch.randn(3, 36, generator=torch.Generator().manual_seed(1))

    def separate(weights: Tensor, scores: Tensor, **arguments: Any) -> Tensor:
        return apart(modes, arguments, {"weights": weights, "scores": scores}, normalize=normalize)

    found = gradients(fastpool.pool, given, gradient, modes=modes, normalize=normalize)
    for one, expected in zip(found, gradients(separate, given, gradient), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    for modes in (("mean", "max"), ("cls", "last"), ("weighted_mean", "softmax_mean")):
        hidden = torch.randn(2, 5, 8, requires_grad=requires_grad)
        own = own_of(modes, {"weights": torch.rand(2, 5), "scores": torch.rand(2, 5)})
        op = torch.ops.fastpool._pool_several.default
        torch.library.opcheck(op, (several.code_of(modes), hidden), {**own, "normalize": True})


def test_compile() -> None:
    hidden, mask = torch.randn(2, 5, 8), torch.rand(2, 5) > 0.3

    def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
        return fastpool.pool(hidden, mask, modes=("mean", "max"), normalize=True)

    assert same_bits(torch.compile(pooled, fullgraph=True)(hidden, mask), pooled(hidden, mask))


def test_export_has_ops_that_every_runtime_knows() -> None:
    exported = torch.export.export(fastpool.nn.Pooling(("mean", "max")), (torch.randn(2, 5, 8),))
    ops = {str(node.target) for node in exported.graph.nodes if "fastpool" in str(node.target)}
    assert ops == {"fastpool.mean.default", "fastpool.max.default"}


def test_columns_that_are_cut_off_are_not_computed() -> None:
    hidden = torch.randn(2, 5, 8)
    assert same_bits(fastpool.pool(hidden, modes=("mean", "max"), truncate_dim=8), fastpool.mean(hidden))
    assert fastpool.pool(hidden, modes=("mean", "softmax_mean"), truncate_dim=8).shape == (2, 8)


def test_nothing_to_pool() -> None:
    for shape, result in (((0, 5, 8), (0, 16)), ((2, 0, 8), (2, 16)), ((2, 5, 0), (2, 0))):
        for modes in (("mean", "max"), ("cls", "last")):
            found = fastpool.pool(torch.ones(shape), modes=modes, normalize=True)
            assert same_bits(found, torch.zeros(result))


HIDDEN = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"modes": ()}, ValueError, "fastpool.pool: modes must name at least one of mean, .*, got none"),
        ({"modes": 3}, TypeError, "modes must be a mode's name or a sequence of them, got int"),
        ({"modes": ("mean", "nearest")}, ValueError, "modes must be one of mean, .*, got 'nearest'"),
        ({"modes": ("mean", "attention")}, ValueError, "modes must be one of .*, got 'attention'"),
        ({"modes": ("mean",) * 16}, ValueError, "modes must name at most 15 modes, got 16"),
        ({"modes": ("mean", "max"), "weights": HIDDEN[..., 0]}, ValueError, "weights go to none of the modes"),
        ({"modes": ("mean", "max"), "scores": HIDDEN[..., 0]}, ValueError, "scores go to none of the modes"),
        ({"modes": ("mean", "softmax_mean")}, ValueError, "scores must be given, got none"),
        ({"modes": ("mean", "weighted_mean"), "weights": [1]}, TypeError, "weights must be a torch.Tensor, got list"),
        ({"modes": ("mean", "softmax_mean"), "scores": [1]}, TypeError, "scores must be a torch.Tensor, got list"),
        ({"modes": ("mean", "max"), "truncate_dim": 17}, ValueError, "truncate_dim must lie .*, 16, got 17"),
        ({"modes": ("mean", "max"), "truncate_dim": 0}, ValueError, "truncate_dim must lie between 1 and .*, got 0"),
        ({"modes": ("mean", "max"), "mask": torch.ones(2, 4)}, ValueError, r"mask must have .* \[2, 5\], got \[2, 4\]"),
        ({"modes": ("mean", "max"), "mask": torch.full((2, 5), 2)}, ValueError, r"mask must hold 0 and 1 alone"),
        ({"modes": ("mean", "max"), "lengths": torch.tensor([6, 1])}, ValueError, r"got lengths\[0\] = 6"),
        ({"modes": ("mean", "max"), "dim": 1}, TypeError, "fastpool.pool has no dim"),
        ({"modes": ("mean", "max"), "hidden": HIDDEN.long()}, TypeError, "hidden must be float16, .*, got int64"),
        ({"modes": ("mean", "max"), "hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"modes": ("mean", "max"), "hidden": torch.tensor(1.0)}, ValueError, r"padded \[B, S, H\] or packed"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", [name for name in cpu_backends() if name != "triton"])
def test_errors(arguments: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    with fastpool.backend(backend), pytest.raises(error, match=words):
        fastpool.pool(**{"hidden": HIDDEN, **arguments})


@pytest.mark.parametrize("code", [0, 0xF, 0x10, 1 << 60, -1])
def test_codes(code: int) -> None:
    with pytest.raises(ValueError, match=r"fastpool\.pool: modes must "):
        torch.ops.fastpool._pool_several(code, HIDDEN)
    assert several.modes_of(several.code_of(("max", "cls"))) == ("max", "cls")
