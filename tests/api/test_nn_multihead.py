"""Multi-head attentions folded into pooling: torch's own results, dtypes, the output module, errors."""

import math
from typing import Any

import pytest
import torch

from fastpool.nn import AttentionPooling, MultiheadPooling
from fastpool.testing import LAYOUTS, same_bits, sequences


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kdim", [None, 10])
def test_multihead_attention_of_torch(kdim: int | None, bias: bool, probes: int) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, bias=bias, kdim=kdim, vdim=kdim, batch_first=True, dropout=0.1).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    probe = torch.randn(1, probes, 12)
    lengths = [1, 5, 40]
    batch = sequences(lengths, kdim or 12, torch.float32)
    padded, packed = LAYOUTS["padded_left_mask"].make(batch, None), LAYOUTS["packed"].make(batch, None)
    hidden = padded["hidden"].nan_to_num(0)  # which torch's own multiplies with 0
    expected = theirs(probe.expand(3, -1, -1), hidden, hidden, key_padding_mask=padded["mask"] == 0)[0].detach()
    for given in (probe, probe[0], probe[0, 0]) if probes == 1 else (probe, probe[0]):
        module = AttentionPooling.from_multihead(theirs, given)
        for arguments in (padded, packed):
            result = module(**arguments).detach()
            assert type(module) is MultiheadPooling
            assert result.shape == ((3, 12) if probes == 1 else (3, probes, 12))
            torch.testing.assert_close(result.view(3, probes, 12), expected, rtol=0, atol=1e-5)
    other = AttentionPooling.from_multihead(theirs, probe.to(torch.float64))
    assert same_bits(other.query.detach(), module.query.detach())
    cut = AttentionPooling.from_multihead(theirs, probe, truncate_dim=5, normalize=True)(**padded).detach()
    expected = torch.nn.functional.normalize(expected[..., :5], dim=-1)
    torch.testing.assert_close(cut.view(3, probes, 5), expected, rtol=0, atol=1e-5)


def test_projections_of_several_dtypes() -> None:
    key, value = (torch.nn.Linear(12, 8, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    module = MultiheadPooling.from_projections(torch.ones(8), key, value, torch.nn.Linear(8, 5), 2)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert same_bits(module.value.detach().flatten(0, 1), value.weight.detach().float())


def test_projections_in_their_dtype() -> None:
    """Weights of float64 are folded and kept as such; hidden may have another dtype."""
    key, value, output = (torch.nn.Linear(a, b, dtype=torch.float64) for a, b in ((12, 8), (12, 8), (8, 5)))
    query = torch.randn(8, dtype=torch.float64)
    module = MultiheadPooling.from_projections(query, key, value, output, 2, scale=0.3)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    heads = [
        torch.softmax(0.3 * key(x[0])[:, part] @ query[part], 0) @ value(x[0])[:, part]
        for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(module(x)[0], output(torch.cat(heads)), rtol=1e-12, atol=1e-12)
    assert module(x.bfloat16()).dtype == torch.bfloat16


class Adapter(torch.nn.Linear):
    """As adapters are: the weights, and something beside them."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.beside = torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.beside(x)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_output_is_called(parameters: torch.dtype) -> None:
    """In float32 whatever the parameters' dtype, as a module, with its hooks."""
    module = MultiheadPooling(12, 3).to(parameters)
    hidden = torch.randn(2, 5, 12)
    plain = module(hidden).detach()
    module.output.register_forward_hook(lambda _, __, result: result + 1)
    assert same_bits(module(hidden).detach(), plain + 1)
    module.output = Adapter().to(parameters)
    torch.nn.init.zeros_(module.output.weight)
    taken = []
    module.output.beside.register_forward_hook(lambda _, arguments, __: taken.append(arguments[0]))
    result = module(hidden)
    assert [one.dtype for one in taken] == [torch.float32]
    beside = module.output.beside.weight.detach().float(), module.output.beside.bias.detach().float()
    expected = torch.nn.functional.linear(taken[0], *beside).squeeze(1) + module.output.bias.float()
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert module.output.beside.weight.grad.dtype == parameters


# ---- state


LINEAR = torch.nn.Linear(12, 12)
MULTIHEAD = torch.nn.MultiheadAttention(12, 3)


class OwnForward(torch.nn.MultiheadAttention):
    """As those that quantise have it, whose weights stand elsewhere."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        return super().forward(*arguments, **more)


def fold(probe: Any, **options: Any) -> MultiheadPooling:
    return AttentionPooling.from_multihead(torch.nn.MultiheadAttention(12, 3, **options), probe)


def fold_options(**options: Any) -> MultiheadPooling:
    return AttentionPooling.from_multihead(torch.nn.MultiheadAttention(12, 3), torch.ones(12), **options)


def fold_scale(query: torch.Tensor, scale: Any = None, **options: Any) -> MultiheadPooling:
    return MultiheadPooling.from_projections(query, LINEAR, LINEAR, LINEAR, 3, scale, **options)


def with_forward_of_its_own() -> torch.nn.Linear:
    linear = torch.nn.Linear(12, 12)
    linear.forward = lambda x: x  # as hooks of some libraries do
    return linear


def fold_projections(*projections: Any) -> MultiheadPooling:
    return MultiheadPooling.from_projections(torch.ones(12), *projections, 3)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: AttentionPooling.from_multihead(LINEAR, torch.ones(12)),
            TypeError,
            "AttentionPooling.from_multihead: attention must be a torch.nn.MultiheadAttention, got Linear",
        ),
        (
            lambda: AttentionPooling.from_multihead(OwnForward(12, 3), torch.ones(12)),
            TypeError,
            "must compute what torch.nn.MultiheadAttention does, .*, got OwnForward with a forward of its own",
        ),
        (
            lambda: fold(torch.ones(11)),
            ValueError,
            r"probe must have shape \[12\], \[queries, 12\] or \[1, queries, 12\], got \[11\]",
        ),
        (lambda: fold(torch.ones(2, 3, 12)), ValueError, "got .2, 3, 12."),
        (lambda: fold([1.0]), TypeError, "probe must be a torch.Tensor, got list"),
        (
            lambda: fold(torch.ones(12), add_bias_kv=True),
            ValueError,
            "attention must attend to tokens alone, got one with add_bias_kv=True",
        ),
        (
            lambda: fold(torch.ones(12), add_zero_attn=True),
            ValueError,
            "got one with add_zero_attn=True",
        ),
        (
            lambda: fold(torch.ones(12), kdim=6),
            ValueError,
            "keys and values of one width, got kdim 6 and vdim 12",
        ),
        (
            lambda: fold_projections(LINEAR, MULTIHEAD, LINEAR),
            TypeError,
            "from_projections: value must be a torch.nn.Linear, got MultiheadAttention",
        ),
        (lambda: fold(torch.ones(12).int()), TypeError, "from_multihead: probe must be float16, .*, got int32"),
        (lambda: fold(torch.ones(12, device="meta")), ValueError, "probe must be on attention's device, cpu, got meta"),
        (lambda: fold_options(queries=3), TypeError, "from_multihead.. got an unexpected keyword argument 'queries'"),
        (lambda: fold_options(scale=0.1), TypeError, "from_multihead.. got an unexpected keyword argument 'scale'"),
        (lambda: fold_scale(torch.ones(12), width=3), TypeError, "from_projections.. got .* argument 'width'"),
        (lambda: fold_scale(torch.ones(12, device="meta")), ValueError, "query must be on key's device, cpu, got meta"),
        (
            lambda: fold_projections(LINEAR, LINEAR, torch.nn.Linear(12, 12, device="meta")),
            ValueError,
            "output.weight must be on key's device, cpu, got meta",
        ),
        (lambda: fold_scale(torch.ones(12).long()), TypeError, "from_projections: query must be float16, .* got int64"),
        (lambda: fold_scale(torch.ones(12), "a"), TypeError, "from_projections: scale must be a float, got str"),
        (lambda: fold_scale(torch.ones(12), True), TypeError, "from_projections: scale must be a float, got bool"),
        (lambda: fold_scale(torch.ones(12), math.nan), ValueError, "from_projections: scale must be finite, got nan"),
        (lambda: fold_scale(torch.ones(12), -math.inf), ValueError, "scale must be finite, got -inf"),
        (
            lambda: fold_projections(LINEAR, LINEAR, torch.nn.Linear(12, 12, dtype=torch.complex64)),
            TypeError,
            "output.weight must be float16, .* got complex64",
        ),
        (
            lambda: fold_projections(LINEAR, Adapter(), LINEAR),
            TypeError,
            "value must compute what torch.nn.Linear does, .* got Adapter with a forward of its own; merge",
        ),
        (
            lambda: fold_projections(with_forward_of_its_own(), LINEAR, LINEAR),
            TypeError,
            "key must compute what torch.nn.Linear does, .* got Linear with a forward",
        ),
        (
            lambda: fold_projections(LINEAR, torch.nn.Linear(12, 8), LINEAR),
            ValueError,
            "value must map 12 columns to 12, as key does, got Linear.*out_features=8",
        ),
        (
            lambda: fold_projections(LINEAR, LINEAR, torch.nn.Linear(8, 8)),
            ValueError,
            "output must take 12 columns, which value gives, got Linear.in_features=8",
        ),
    ],
)
def test_errors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^fastpool\.nn\..*{words}"):
        make()
