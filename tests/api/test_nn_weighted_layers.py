"""Layers that are pooled and then weighed: the formula, sentence-transformers' own, state, errors."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpool.nn import Pooling, WeightedLayers
from fastpool.testing import LAYOUTS, error, same_bits, sequences


def layers(layout: str, count: int = 5) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Of one batch, each of other numbers."""
    found = [LAYOUTS[layout].make(sequences([3, 1, 40], 8, torch.float32, seed=seed), None) for seed in range(count)]
    return [one.pop("hidden") for one in found], found[0]


def module(mode: Any = "mean", **options: Any) -> WeightedLayers:
    made = WeightedLayers(mode, 4, 2, **options)
    with torch.no_grad():
        made.layer_weights.copy_(torch.tensor([0.5, -0.25, 2.0]))
    return made


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not LAYOUTS[layout].holes] + ["padded_left_mask"])
@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len", "sum", "cls", "last", "weighted_mean", ("mean", "last")])
def test_formula(mode: Any, layout: str) -> None:
    states, arguments = layers(layout)
    pooled = [Pooling(mode, out_dtype=torch.float64)(layer, **arguments) for layer in states[2:]]
    expected = sum(weight * vector for weight, vector in zip([0.5, -0.25, 2.0], pooled, strict=True)) / 2.25
    torch.testing.assert_close(module(mode)(states, **arguments).detach(), expected.float(), rtol=1e-5, atol=1e-5)
    cut = module(mode, truncate_dim=5, normalize=True, out_dtype=torch.float64)(states, **arguments)
    expected = torch.nn.functional.normalize(expected[:, :5], dim=-1)
    torch.testing.assert_close(cut.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype: torch.dtype) -> None:
    """Under autocast as without; two layers' sums are beyond float16."""
    generator = torch.Generator().manual_seed(0)
    states = [(torch.randn(1, 100, 8, generator=generator) + mean).to(dtype) for mean in (0, 0, 700, 710, 0)]
    made = module("sum")
    expected = sum(share * layer.double().sum(1) for share, layer in zip([0.5, -0.25, 2.0], states[2:], strict=True))
    plain = made(states).detach()
    assert error(plain[0], expected[0] / 2.25) <= 1
    with torch.autocast("cpu", dtype):
        assert same_bits(made(states).detach(), plain)


def test_bits_do_not_depend_on_the_batch() -> None:
    states = [torch.randn(33, 6, 40) for _ in range(5)]
    for options in ({}, {"truncate_dim": 7, "normalize": True}):
        made = module("mean", **options)
        whole = made(states).detach()
        for b in (0, 32):
            assert same_bits(made([layer[b : b + 1] for layer in states]).detach(), whole[b : b + 1])


@pytest.mark.parametrize("mode", ["mean", ("mean", "last")])
def test_columns_cut_off_are_not_read(mode: Any) -> None:
    taken: list[int] = []

    class Taken(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastpool" and "normalize" not in func.name():
                taken.append((kwargs or {}).get("truncate_dim"))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Taken():
        module(mode, truncate_dim=5, normalize=True)([torch.randn(2, 6, 8) for _ in range(5)])
    assert taken == [5] * 3


def test_defaults() -> None:
    """sentence-transformers' own."""
    made = WeightedLayers()
    assert (made.mode, made.num_hidden_layers, made.layer_start) == ("mean", 12, 4)
    assert made.layer_weights.tolist() == [1.0] * 9
    torch.nn.init.zeros_(made.layer_weights)
    made.reset_parameters()
    assert made.layer_weights.tolist() == [1.0] * 9


def test_weights_that_add_up_to_nothing() -> None:
    made = module()
    with torch.no_grad():
        made.layer_weights.copy_(torch.tensor([1.0, -1.0, 0.0]))
    assert made([torch.ones(1, 3, 8)] * 5).isnan().all()


def test_sentence_transformers() -> None:
    theirs = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    states = [torch.randn(3, 6, 8) for _ in range(13)]
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])
    weighed = theirs.WeightedLayerPooling(8)
    torch.nn.init.uniform_(weighed.layer_weights, 0.5, 2)
    features = weighed({"all_layer_embeddings": states, "attention_mask": mask})
    expected = theirs.Pooling(8, "mean")(features)["sentence_embedding"]
    ours = WeightedLayers()
    ours.load_state_dict(weighed.state_dict())
    torch.testing.assert_close(ours(states, mask), expected, rtol=1e-5, atol=1e-6)


def test_state() -> None:
    states, arguments = layers("packed")
    made = module(("mean", "cls"), normalize=True)
    assert repr(made) == "WeightedLayers(('mean', 'cls'), num_hidden_layers=4, layer_start=2, normalize=True)"
    assert made.state_dict().keys() == {"layer_weights"}
    other = WeightedLayers(("mean", "cls"), 4, 2, normalize=True)
    other.load_state_dict(made.state_dict())
    for one in (other, copy.deepcopy(made)):
        assert same_bits(one(states, **arguments).detach(), made(states, **arguments).detach())
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states, **arguments), made(states, **arguments))


def test_gradients() -> None:
    states = [torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    made = module().double()

    def run(shares: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, {"layer_weights": shares}, (states, None))

    assert torch.autograd.gradcheck(run, (made.layer_weights, *states), fast_mode=True)


STATES = [torch.randn(2, 3, 8)] * 5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: WeightedLayers("max"), ValueError, "mode must be one that adds, got 'max'"),
        (lambda: WeightedLayers("attention"), ValueError, "mode must be one of mean, .*, got 'attention'"),
        (lambda: WeightedLayers("mean", 0), ValueError, "num_hidden_layers must be at least 1, got 0"),
        (lambda: WeightedLayers("mean", 4, 5), ValueError, "layer_start must be at most num_hidden_layers, 4, got 5"),
        (lambda: WeightedLayers("mean", 4, -1), ValueError, "layer_start must be at least 0, got -1"),
        (lambda: WeightedLayers("mean", 4, False), TypeError, "layer_start must be an int, got bool"),
        (lambda: module()(STATES[0]), TypeError, "hidden_states must be a sequence of a model's layers, got Tensor"),
        (lambda: module()(STATES[1:]), ValueError, "hidden_states must be 5 layers, the embedding layer first, got 4"),
        (lambda: module()([[1.0]] * 5), TypeError, "hidden must be a torch.Tensor, got list"),
        (
            lambda: module()([*STATES[1:], torch.randn(1, 3, 8)]),
            ValueError,
            r"hidden_states\[4\] must have the shape of hidden_states\[2\], \(2, 3, 8\), got \(1, 3, 8\)",
        ),
        (
            lambda: module()([*STATES[:3], torch.randn(2, 4, 8), STATES[4]]),
            ValueError,
            r"hidden_states\[3\] must .*, \(2, 3, 8\), got \(2, 4, 8\)",
        ),
        (
            lambda: module(truncate_dim=5)([*STATES[:3], torch.randn(2, 3, 7), STATES[4]]),
            ValueError,
            r"hidden_states\[3\] must .*, \(2, 3, 8\), got \(2, 3, 7\)",
        ),
        (lambda: module()([*STATES[1:], None]), TypeError, "hidden must be a torch.Tensor, got NoneType"),
        (lambda: module(truncate_dim=9)(STATES), ValueError, "between 1 and the columns of a vector, 8, got 9"),
        (lambda: module()(STATES, weights=torch.ones(2, 3)), ValueError, "weights go to none of the modes: mean"),
    ],
)
def test_errors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
