"""Latent attention: the unfolded formula, layouts, state, gradients, errors."""

import copy
from typing import Any

import pytest
import torch
from helpers.nv_embed import CONFIG, token_states, weights
from helpers.padding import check_padding_gets_nothing

from fastpool.nn import AttentionPooling, LatentAttention, MultiheadPooling
from fastpool.testing import LAYOUTS, same_bits, sequences

WHOLE = "latent_attention_model."


def test_sizes_of_the_model_itself() -> None:
    """What a configuration leaves out is NV-Embed's own."""
    with torch.device("meta"):
        shown = repr(LatentAttention(4096, normalize=True))
    assert shown.startswith("LatentAttention(\n  4096, latents=512, heads=8, normalize=True")
    state = {name: torch.empty(0, device="meta") for name in weights()}
    with pytest.raises(ValueError, match=r"from_state_dict: latents must have shape \(512, 4096\), got \(0,\)"):
        LatentAttention.from_state_dict({}, state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula(dtype: torch.dtype, layout: str) -> None:
    batch = sequences([3, 1, 40], 8, dtype, holes=LAYOUTS[layout].holes)
    own = weights(dtype=torch.float16)  # as the model has them; folded in float32
    module = LatentAttention.from_state_dict(CONFIG, own)
    result = module(**LAYOUTS[layout].make(batch, None)).detach()
    assert result.dtype == dtype
    expected = torch.stack([token_states(text.states[text.real], own).mean(0) for text in batch])
    expected = expected / expected.norm(dim=-1, keepdim=True)
    close = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(result, expected.to(dtype), **close)


@pytest.mark.parametrize("prefix", ["", WHOLE])
def test_options(prefix: str) -> None:
    own = weights(prefix)
    batch = sequences([3, 0, 40], 8, torch.float32)
    arguments = LAYOUTS["packed"].make(batch, None)
    plain = LatentAttention.from_state_dict({**CONFIG, "output_normalize": False}, own, prefix)
    result = plain(**arguments).detach()
    assert not plain.normalize
    assert result[1].eq(0).all()  # without tokens
    cut = LatentAttention.from_state_dict(CONFIG, own, prefix, truncate_dim=5, out_dtype=torch.float64)
    assert (cut.normalize, cut(**arguments).dtype) == (True, torch.float64)
    expected = torch.nn.functional.normalize(result[:, :5], dim=-1)
    torch.testing.assert_close(cut(**arguments).detach(), expected.double(), rtol=1e-6, atol=1e-6)
    assert not LatentAttention.from_state_dict(CONFIG, own, prefix, normalize=False).normalize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    module = LatentAttention.from_state_dict(CONFIG, weights())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    result = module(hidden).detach()
    with torch.autocast("cpu", dtype):
        assert same_bits(module(hidden).detach(), result)
        torch.testing.assert_close(compiled(hidden).detach(), result)


def test_state() -> None:
    hidden = torch.randn(2, 5, 8)
    module = LatentAttention.from_state_dict(CONFIG, weights())
    assert module.extra_repr() == "8, latents=6, heads=2, normalize=True"
    other = LatentAttention(8, latents=6, heads=2, normalize=True)
    assert not same_bits(other(hidden).detach(), module(hidden).detach())
    other.load_state_dict(module.state_dict())
    for one in (other, copy.deepcopy(module)):
        assert same_bits(one(hidden).detach(), module(hidden).detach())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), module(hidden))


def test_gradients() -> None:
    module = LatentAttention.from_state_dict(CONFIG, weights(dtype=torch.float64))
    assert module.keys.weight.dtype == torch.float64
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (hidden, mask))

    assert torch.autograd.gradcheck(run, (hidden, *parameters), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_gets_nothing(layout: str) -> None:
    """NaN there changes no gradient, and its own is 0."""
    batch = sequences([3, 0, 40], 8, torch.float32, holes=LAYOUTS[layout].holes)
    check_padding_gets_nothing(LatentAttention.from_state_dict(CONFIG, weights()), LAYOUTS[layout].make(batch, None))


def test_texts_that_share_tokens() -> None:
    module = LatentAttention.from_state_dict(CONFIG, weights())
    hidden = torch.randn(6, 8)
    bounds = {"starts": torch.tensor([0, 2]), "ends": torch.tensor([4, 5])}
    expected = torch.cat([module(hidden[None, 0:4]), module(hidden[None, 2:5])])
    torch.testing.assert_close(module(hidden, **bounds), expected)


@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_vmap() -> None:
    module = LatentAttention.from_state_dict(CONFIG, weights())
    hidden, mask = torch.randn(4, 2, 5, 8), torch.randint(2, (4, 2, 5))
    expected = torch.stack([module(*one) for one in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(module)(hidden, mask), expected)


class Quantised(torch.nn.Module):
    """A linear layer whose weight is stored in integers, as quantised ones are."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("names", [("keys", "values", "up", "down"), ("project",), ("output",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_layers(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Their integers are no dtype to compute in."""
    torch.manual_seed(0)
    module: Any = {
        "keys": lambda: LatentAttention.from_state_dict(CONFIG, weights()),
        "project": lambda: AttentionPooling(8, scorer="tanh"),
        "output": lambda: MultiheadPooling(8, 2),
    }[names[0]]()
    hidden = torch.randn(2, 5, 8).to(dtype)
    expected = module(hidden).detach()
    for name in names:
        setattr(module, name, Quantised(getattr(module, name)))
    torch.testing.assert_close(module(hidden).detach(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("scorer", ["latents", "tanh"])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mask": torch.ones(2, 2)}, ValueError, r"mask must have hidden's shape without .*\[2, 3\], got \[2, 2\]"),
        ({"mask": torch.full((2, 3), 2)}, ValueError, "mask must hold 0 and 1 alone"),
        ({"lengths": torch.tensor([1, 4])}, ValueError, r"lengths must lie between 0 and 3, got lengths\[1\] = 4"),
    ],
)
def test_arguments_are_refused_before_tokens_are_computed(
    arguments: Any, error: type[Exception], words: str, scorer: str
) -> None:
    module = LatentAttention(8, 6, 2) if scorer == "latents" else AttentionPooling(8, scorer="tanh")
    first = module.norm if isinstance(module, LatentAttention) else module.project

    def never(*_: Any) -> None:
        raise AssertionError("computed")

    first.register_forward_pre_hook(never)
    with pytest.raises(error, match=words):
        module(HIDDEN, **arguments)


HIDDEN = torch.randn(2, 3, 8)
MODULE = LatentAttention(8, 6, 2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LatentAttention(0), ValueError, "LatentAttention: width must be at least 1, got 0"),
        (lambda: LatentAttention(8, 1.5), TypeError, "latents must be an int, got float"),
        (lambda: LatentAttention(8, 6, 2, truncate_dim=9), ValueError, "columns of a vector, 8, got 9"),
        (
            lambda: LatentAttention.from_state_dict({**CONFIG, "hidden_dim": 9}, weights()),
            ValueError,
            "from_state_dict: hidden_dim must be latent_dim, 8, got 9",
        ),
        (
            lambda: LatentAttention.from_state_dict({**CONFIG, "num_latents_value": "6"}, weights()),
            TypeError,
            "num_latents_value must be an int, got str",
        ),
        (
            lambda: LatentAttention.from_state_dict({**CONFIG, "num_cross_heads": 4}, weights(WHOLE), WHOLE),
            ValueError,
            r"latent_attention_model.cross_attend_blocks.0.fn.to_q.weight must have shape \(20, 8\), got \(10, 8\)",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, weights(WHOLE)),
            KeyError,
            "from_state_dict: state must have latents; where its names begin otherwise, give prefix=",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, weights(), WHOLE),
            KeyError,
            "state must have latent_attention_model.latents;",
        ),
        (
            lambda: LatentAttention.from_state_dict(None, weights()),
            TypeError,
            "from_state_dict: config must be a mapping, got NoneType",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, list(weights())),
            TypeError,
            "from_state_dict: state must be a mapping, got list",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, {**weights(), "latents": [1.0]}),
            TypeError,
            "from_state_dict: latents must be a torch.Tensor, got list",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, weights(dtype=torch.int8)),
            TypeError,
            "from_state_dict: latents must be float16, .*, got int8",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, weights(WHOLE, torch.complex64), WHOLE),
            TypeError,
            "latent_attention_model.latents must be .*, got complex64",
        ),
        (
            lambda: LatentAttention.from_state_dict(CONFIG, weights(), width=3),
            TypeError,
            "from_state_dict.. got an unexpected keyword argument 'width'",
        ),
        (lambda: MODULE(HIDDEN[..., 1:]), ValueError, "LatentAttention: hidden must have 8 columns, got 7"),
        (lambda: MODULE(HIDDEN.tolist()), TypeError, "hidden must be a torch.Tensor, got list"),
        (lambda: MODULE(HIDDEN, torch.ones(2, 3)), TypeError, "additive mask"),
    ],
)
def test_errors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
