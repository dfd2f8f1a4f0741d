"""Modules: the functions' bits, several modes side by side, state, and what torch does with modules that hold them."""

import copy
import inspect
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpool
from fastpool.calls import accumulator
from fastpool.modes import MODES
from fastpool.nn import Normalize, Pooling
from fastpool.several import modes_of
from fastpool.testing import DTYPES, LAYOUTS, Sequence, error, exact, function_of, same_bits, sequences

# But those whose query a call of Pooling has no place for, and those of logits.
ALL = tuple(mode for mode, row in MODES.items() if not (row.takes_query or row.of_logits))
OWN = ("weights", "scores")
OPTIONS = {"truncate_dim": 5, "normalize": True, "out_dtype": torch.float32}


def given_to(mode: str) -> str | None:
    return next((one.name for one in MODES[mode].arguments), None)


def all_arguments(layout: str, batch: list[Sequence]) -> dict[str, Any]:
    """With weights and scores."""
    return LAYOUTS[layout].make(batch, "weights") | LAYOUTS[layout].make(batch, "scores")


def function(mode: str, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    """A mode's function, given what it takes of them."""
    used = {name: value for name, value in arguments.items() if name not in OWN or MODES[mode].takes(name)}
    return function_of(mode)(**used, **more)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ALL)
def test_one_mode_is_its_function(mode: str, layout: str) -> None:
    batch = sequences([3, 0, 40], 12, torch.bfloat16, holes=LAYOUTS[layout].holes)
    arguments = LAYOUTS[layout].make(batch, given_to(mode))
    for options in ({}, OPTIONS):
        expected = function_of(mode)(**arguments, **options)
        assert same_bits(Pooling(mode, **options)(**arguments), expected)
        assert same_bits(Pooling([mode], **options)(**arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("truncate_dim", [None, 1, 12, 13, 30, 12 * len(ALL)])
def test_several_modes(truncate_dim: int | None, normalize: bool, dtype: torch.dtype) -> None:
    """All columns of all modes, unrounded; then `truncate_dim`, then `normalize`, then one rounding."""
    batch = sequences([3, 1, 40], 12, dtype, holes=True)
    for layout in ("padded_left_mask", "packed_shuffled"):
        arguments = all_arguments(layout, batch)
        unrounded = torch.cat([function(mode, arguments, out_dtype=accumulator(dtype)) for mode in ALL], -1)[
            :, :truncate_dim
        ]
        formula = torch.stack(
            [torch.cat([exact(mode, sequence, given_to(mode)) for mode in ALL])[:truncate_dim] for sequence in batch]
        )
        if normalize:
            formula /= formula.norm(dim=-1, keepdim=True)
        for out_dtype in (None, *DTYPES):
            result = Pooling(ALL, truncate_dim, normalize, out_dtype)(**arguments)
            assert (result.shape, result.dtype) == ((3, truncate_dim or 12 * len(ALL)), out_dtype or dtype)
            if normalize:
                assert same_bits(result, fastpool.l2_normalize(unrounded, out_dtype=out_dtype or dtype))
            elif accumulator(dtype) == torch.float32:
                assert same_bits(result, unrounded.to(out_dtype or dtype))
            if dtype == torch.float64 or out_dtype != torch.float64:  # or digits are asked for that never were
                assert error(result, formula) <= 1


def test_several_modes_round_once() -> None:
    # Just above halfway between 1 and its successor in bfloat16; in float32 it is halfway, and that goes to 1.
    hidden = torch.full((1, 1, 2), 1 + 2**-8 + 2**-40, dtype=torch.float64)
    assert hidden.to(torch.bfloat16).eq(1).all()
    assert Pooling(("sum", "max"), out_dtype=torch.bfloat16)(hidden).eq(1 + 2**-7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_modes_in_every_layout(layout: str) -> None:
    arguments = all_arguments(layout, sequences([3, 0, 40], 12, torch.float32))
    expected = torch.cat([function(mode, arguments) for mode in ALL], -1)
    assert same_bits(Pooling(ALL)(**arguments), expected)


def test_only_what_dim_leaves_is_computed() -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "fastpool":
                seen.append((op.name().partition("::")[2], (kwargs or {}).get("truncate_dim")))
                if seen[-1][0] == "_pool_several":
                    pooled.append(modes_of(args[0]))
            return op(*args, **(kwargs or {}))

    hidden = torch.randn(2, 3, 8)
    for truncate_dim, expected in (
        (3, [("mean", 3)]),
        (8, [("mean", 8)]),
        (9, [("_pool_several", 9)]),
        (24, [("_pool_several", 24)]),
        (None, [("_pool_several", None)]),
    ):
        seen: list[tuple[str, int | None]] = []
        pooled: list[tuple[str, ...]] = []
        with Calls():
            Pooling(("mean", "max", "cls"), truncate_dim)(hidden)
        assert seen == expected
        assert pooled == {9: [("mean", "max")], 3: [], 8: []}.get(truncate_dim or 24, [("mean", "max", "cls")])


@pytest.mark.parametrize(
    "options", [{}, {"truncate_dim": 5}, {"truncate_dim": 3, "eps": 1.0, "out_dtype": torch.float16}]
)
def test_normalize(options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 8) * 0.1
    truncate_dims = torch.tensor([[0, 1, 2], [3, 3, 2]])
    assert same_bits(Normalize(**options)(x), fastpool.l2_normalize(x, **options))
    assert same_bits(
        Normalize(**options)(x, truncate_dims), fastpool.l2_normalize(x, truncate_dims=truncate_dims, **options)
    )


# ---- gradients


@pytest.mark.parametrize(
    "module",
    [
        Pooling("mean"),
        Pooling("max", truncate_dim=3, normalize=True),
        Pooling("softmax_mean", normalize=True),
        Pooling(("mean", "weighted_mean", "max"), truncate_dim=10),
        Pooling(("mean", "weighted_mean", "softmax_mean", "max"), normalize=True),
    ],
    ids=repr,
)
def test_gradients(module: Pooling) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    taken = [name for name in OWN if any(MODES[mode].takes(name) for mode in module.modes)]
    own = [torch.rand(3, 6, dtype=torch.float64, generator=generator).add(0.5).requires_grad_() for _ in taken]

    def called(hidden: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        return module(hidden, mask, **dict(zip(taken, own, strict=True)))

    assert torch.autograd.gradcheck(called, (hidden, *own))


def test_gradient_of_normalize() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Normalize(truncate_dim=5), (x,))


# ---- state

MODULES = {
    "Pooling('mean')": Pooling("mean"),
    "Pooling('mean', truncate_dim=256, normalize=True)": Pooling("mean", truncate_dim=256, normalize=True),
    "Pooling(('mean', 'max'))": Pooling(["mean", "max"]),
    "Pooling(('cls',), out_dtype=torch.float16)": Pooling(("cls",), out_dtype=torch.float16),
    "Normalize()": Normalize(),
    "Normalize(truncate_dim=4, eps=0.1, out_dtype=torch.float64)": Normalize(4, 0.1, torch.float64),
}


@pytest.mark.parametrize("shown", MODULES)
def test_state(shown: str) -> None:
    module = MODULES[shown]
    assert repr(module) == shown
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
        eval(shown, {"Pooling": Pooling, "Normalize": Normalize, "torch": torch}),
        module.half().to("cpu").eval(),
    ):
        assert repr(other) == shown
        hidden = torch.randn(2, 3, 300)
        assert same_bits(other(hidden), module(hidden))


LEARNED = {
    "AttentionPooling": partial(fastpool.nn.AttentionPooling, 8, 2),
    "AttentionPooling, tanh": partial(fastpool.nn.AttentionPooling, 8, scorer="tanh"),
    "MultiheadPooling": partial(fastpool.nn.MultiheadPooling, 8, 2),
    "LatentAttention": partial(fastpool.nn.LatentAttention, 8, 3, 2),
    "WeightedLayers": fastpool.nn.WeightedLayers,
}


@pytest.mark.parametrize("name", LEARNED)
def test_parameters_are_made_as_asked(name: str) -> None:
    make = LEARNED[name]
    kinds = {(one.device.type, one.dtype) for one in make(device="meta", dtype=torch.bfloat16).parameters()}
    assert kinds == {("meta", torch.bfloat16)}
    assert {one.dtype for one in make().parameters()} == {torch.float32}
    with pytest.raises(TypeError, match=f"{name.partition(',')[0]}: dtype must be .* or float64, got int8"):
        make(dtype=torch.int8)


def test_signature_is_the_functions() -> None:
    ours = dict(inspect.signature(Pooling("mean").forward).parameters)
    theirs = inspect.signature(fastpool.weighted_mean).parameters
    assert ours.pop("scores").default is None
    assert list(ours.values()) == list(theirs.values())[: len(ours)]
    assert list(theirs)[len(ours) :] == [name for name in inspect.signature(Pooling).parameters if name != "mode"]


# ---- torch's transforms


class Encoder(torch.nn.Module):
    """A model that ends in a module of ours."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.pooling = pooling

    def forward(self, x: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.pooling(self.linear(x), mask, lengths=lengths)


HELD = [Pooling("mean", normalize=True), Pooling(("weighted_mean", "max", "last"), truncate_dim=13, normalize=True)]


def encoder_and_batches(pooling: Pooling) -> tuple[Encoder, list[tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    batches = [
        (torch.randn(b, s, 8), torch.rand(b, s) > 0.3, torch.randint(1, s + 1, (b,))) for b, s in ((2, 5), (3, 40))
    ]
    return Encoder(pooling), batches


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the number of columns is a constant of the model
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("pooling", HELD, ids=repr)
def test_trace(pooling: Pooling, gradients: bool) -> None:
    encoder, batches = encoder_and_batches(pooling)
    encoder.requires_grad_(gradients)
    traced = torch.jit.trace(encoder, batches[0])
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    for module in (traced, torch.jit.load(saved)):
        for batch in batches:
            assert same_bits(module(*batch), encoder(*batch))


@pytest.mark.parametrize("pooling", HELD, ids=repr)
def test_export(pooling: Pooling) -> None:
    encoder, batches = encoder_and_batches(pooling)
    b, s = torch.export.Dim("b"), torch.export.Dim("s")
    exported = torch.export.export(encoder, batches[0], dynamic_shapes=({0: b, 1: s}, {0: b, 1: s}, {0: b}))
    for module in (exported.module(), exported.run_decompositions().module()):
        for batch in batches:
            assert same_bits(module(*batch), encoder(*batch))


@pytest.mark.parametrize("pooling", HELD, ids=repr)
def test_compile(pooling: Pooling) -> None:
    encoder, batches = encoder_and_batches(pooling)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for batch in batches:
        with torch.no_grad():
            assert same_bits(compiled(*batch), encoder(*batch))
        gradients = []
        for module in (compiled, encoder):
            encoder.zero_grad()
            module(*batch).square().sum(1).add(1).log().sum().backward()
            assert encoder.linear.weight.grad is not None
            gradients.append(encoder.linear.weight.grad)
        assert same_bits(*gradients)


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Pooling("average"), ValueError, f"mode must be one of {', '.join(ALL)}, got 'average'"),
        (
            lambda: Pooling(("mean", "attention")),
            ValueError,
            "mode must be one of .*, got 'attention', whose scores go to fastpool.attention, or fastpool.nn.Attention",
        ),
        (lambda: Pooling(("mean", "average")), ValueError, "mode must be one of .*, got 'average'"),
        (lambda: Pooling(()), ValueError, f"mode must name at least one of {', '.join(ALL)}, got none"),
        (lambda: Pooling(""), ValueError, "mode must be one of .*, got ''"),
        (lambda: Pooling(3), TypeError, "mode must be a mode's name or a sequence of them, got int"),
        (lambda: Pooling({"mean"}), TypeError, "mode must be a mode's name or a sequence of them, got set"),
        (lambda: Pooling(("mean", None)), TypeError, "mode must be a mode's name or a sequence of them, got NoneType"),
        (lambda: Pooling("mean", truncate_dim=0), ValueError, "truncate_dim must be at least 1, got 0"),
        (lambda: Pooling("mean", truncate_dim=2.0), TypeError, "truncate_dim must be an int, got float"),
        (lambda: Pooling("mean", truncate_dim=True), TypeError, "truncate_dim must be an int, got bool"),
        (lambda: Pooling("mean", normalize=1), TypeError, "normalize must be a bool, got int"),
        (lambda: Pooling("mean", out_dtype=torch.int8), TypeError, "out_dtype must be .* or float64, got int8"),
        (lambda: Pooling("mean", out_dtype="float16"), TypeError, "out_dtype must be .* or float64, got str"),
        (lambda: Normalize(truncate_dim=-1), ValueError, "truncate_dim must be at least 1, got -1"),
        (lambda: Normalize(eps="1"), TypeError, "eps must be a float, got str"),
        (lambda: Normalize(eps=-1e-3), ValueError, "eps must be at least 0, got -0.001"),
        (lambda: Normalize(eps=float("nan")), ValueError, "eps must be at least 0, got nan"),
        (lambda: Normalize(out_dtype=torch.int8), TypeError, "out_dtype must be"),
    ],
)
def test_errors_of_constructors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^fastpool\.nn\.(Pooling|Normalize): {words}"):
        make()


HIDDEN = torch.randn(2, 3, 4)


@pytest.mark.parametrize("modes", ["mean", ("mean", "max")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("truncate_dim", [None, 2])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((HIDDEN.tolist(),), TypeError, "hidden must be a torch.Tensor, got list"),
        ((HIDDEN.sum(),), ValueError, "hidden must be padded"),
        ((HIDDEN.int(),), TypeError, "hidden must be float16"),
        ((HIDDEN, torch.ones(2, 3)), TypeError, "additive mask"),
        ((HIDDEN, None, torch.tensor([0, 1])), ValueError, "cu_seqlens goes with packed"),
    ],
)
def test_errors_of_calls(
    arguments: Any, error: type[Exception], words: str, truncate_dim: int | None, normalize: bool, modes: Any
) -> None:
    with pytest.raises(error, match=words):
        Pooling(modes, truncate_dim, normalize)(*arguments)


def test_errors_of_modes_together() -> None:
    weights = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weights go to none of the modes: mean$"):
        Pooling("mean")(HIDDEN, weights=weights)
    with pytest.raises(ValueError, match=r"weights go to none of the modes: mean, max$"):
        Pooling(("mean", "max"))(HIDDEN, weights=weights)
    Pooling(("mean", "weighted_mean"))(HIDDEN, weights=weights)
    with pytest.raises(ValueError, match=r"scores go to none of the modes: mean, weighted_mean$"):
        Pooling(("mean", "weighted_mean"))(HIDDEN, scores=weights)
    with pytest.raises(ValueError, match=r"^fastpool\.softmax_mean: scores must be given, got none$"):
        Pooling(("mean", "softmax_mean"))(HIDDEN)
    with pytest.raises(ValueError, match="truncate_dim must lie between 1 and the last dimension, 4, got 5"):
        Pooling("mean", truncate_dim=5)(HIDDEN)
    Pooling(("mean", "max"), truncate_dim=8)(HIDDEN)
    with pytest.raises(ValueError, match="between 1 and the columns of mean, max together, 8, got 9"):
        Pooling(("mean", "max"), truncate_dim=9)(HIDDEN)
