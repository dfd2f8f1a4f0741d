"""Attention modules: the functions' bits, torch's own multi-head attention, state, gradients, graphs, errors."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from helpers.padding import check_padding_gets_nothing

import fastpool
from fastpool.nn import AttentionPooling, MultiheadPooling
from fastpool.testing import DTYPES, LAYOUTS, Sequence, error, same_bits, sequences

OPTIONS = {"truncate_dim": 5, "normalize": True, "out_dtype": torch.float32}
MODULES = {
    "AttentionPooling(12)": lambda: AttentionPooling(12),
    "AttentionPooling(12, queries=3, normalize=True)": lambda: AttentionPooling(12, 3, normalize=True),
    "AttentionPooling(12, scorer='tanh')": lambda: AttentionPooling(12, scorer="tanh"),
    "AttentionPooling(12, scorer='tanh', inner=5, truncate_dim=7, out_dtype=torch.float64)": lambda: AttentionPooling(
        12, scorer="tanh", inner=5, truncate_dim=7, out_dtype=torch.float64
    ),
    "MultiheadPooling(12, heads=3)": lambda: MultiheadPooling(12, 3),
    "MultiheadPooling(12, heads=2, queries=3, inner=8, outputs=5, truncate_dim=4, normalize=True)": (
        lambda: MultiheadPooling(12, 2, 3, 8, 5, 4, True)
    ),
}


def made(shown: str, seed: int = 0) -> torch.nn.Module:
    """With scores that differ from token to token."""
    torch.manual_seed(seed)
    module = MODULES[shown]()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in ("query", "score.weight"):
                parameter.normal_()
    return module


def plain(module: torch.nn.Module, text: Sequence) -> torch.Tensor:
    """The formula of the docstring, in float64, for one text. [D] or [queries, D]"""
    x = text.states.double()[text.real]
    own = {name: value.detach().double() for name, value in module.named_parameters()}
    if "project.weight" in own:
        scores = torch.tanh(x @ own["project.weight"].T + own["project.bias"]) @ own["score.weight"].T
    else:
        scores = x @ own["query"].view(-1, x.shape[1]).T
    result = scores.softmax(0).T @ x  # [queries, H]; zeros without tokens
    if "value" in own:
        parts = [value @ mean for mean, value in zip(result, own["value"].repeat(module.queries, 1, 1), strict=True)]
        joined = torch.stack(parts).view(module.queries, -1)
        result = joined @ own["output.weight"].T + own["output.bias"]
    result = result[..., : module.truncate_dim]
    if module.normalize:
        result = result / result.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return result if module.queries > 1 else result[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shown", MODULES)
def test_formula(shown: str, layout: str) -> None:
    module = made(shown)
    batch = sequences([3, 0, 40], 12, torch.float32, holes=LAYOUTS[layout].holes)
    result = module(**LAYOUTS[layout].make(batch, None))
    assert result.dtype == (module.out_dtype or torch.float32)
    for vector, text in zip(result.float(), batch, strict=True):
        assert error(vector.detach(), plain(module, text)) <= 2


TURNS = [(layout, DTYPES[i % len(DTYPES)]) for i, layout in enumerate(LAYOUTS)]


@pytest.mark.parametrize(("layout", "dtype"), TURNS)
@pytest.mark.parametrize("queries", [1, 3])
def test_linear_is_the_function(queries: int, layout: str, dtype: torch.dtype) -> None:
    arguments = LAYOUTS[layout].make(sequences([3, 0, 40], 12, dtype), None)
    for options in ({}, OPTIONS):
        module = AttentionPooling(12, queries, **options)
        expected = fastpool.attention(query=module.query.detach(), **arguments, **options)
        assert expected.shape == (3, *([queries] if queries > 1 else []), options.get("truncate_dim", 12))
        assert same_bits(module(**arguments).detach(), expected)


@pytest.mark.parametrize(("layout", "dtype"), TURNS)
def test_tanh_is_the_function_of_its_scores(layout: str, dtype: torch.dtype) -> None:
    """Computed in the parameters' dtype, whatever hidden's is."""
    arguments = LAYOUTS[layout].make(sequences([3, 0, 40], 12, dtype), None)
    module = made("AttentionPooling(12, scorer='tanh')")
    hidden = arguments["hidden"]
    rows = (hidden.values() if hidden.is_nested else hidden).float()
    scores = module.score(torch.tanh(module.project(rows))).squeeze(-1).detach()
    assert same_bits(module(**arguments).detach(), fastpool.softmax_mean(scores=scores, **arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shown", MODULES)
def test_rounded_once(shown: str, dtype: torch.dtype) -> None:
    """From float32, under autocast as without, and compiled there."""
    module = made(shown)
    batch = sequences([3, 40], 12, dtype)
    arguments = LAYOUTS["packed"].make(batch, None)
    result = module(**arguments).detach()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        assert same_bits(module(**arguments).detach(), result)
        torch.testing.assert_close(compiled(**arguments).detach(), result)
    module.out_dtype = module.out_dtype or torch.float32
    for vector, text in zip(module(**arguments).float(), batch, strict=True):
        assert error(vector.detach(), plain(module, text)) <= 2


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


@pytest.mark.parametrize("shown", MODULES)
def test_state(shown: str) -> None:
    module = made(shown)
    assert repr(module).partition("\n")[0] in (shown, f"{type(module).__name__}(")
    assert module.extra_repr() == shown.partition("(")[2][:-1]
    hidden = torch.randn(2, 3, 12)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    loaded = made(shown, seed=1)
    assert not torch.equal(loaded(hidden), module(hidden))
    loaded.load_state_dict(module.state_dict())
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False), loaded)
    for other in others:
        assert same_bits(other(hidden).detach(), module(hidden).detach())


@pytest.mark.parametrize("shown", MODULES)
def test_reset_parameters(shown: str) -> None:
    """As from a new module, whose numbers neither are all the same nor those of another seed."""
    torch.manual_seed(0)
    with torch.device("meta"):
        module = MODULES[shown]()
    module.to_empty(device="cpu").apply(lambda one: [torch.nn.init.constant_(p, torch.nan) for p in one.parameters()])
    module.reset_parameters()
    new = MODULES[shown]().state_dict()
    for name, value in module.state_dict().items():
        assert 0.1 < value.std() / new[name].std() < 10, name
        assert name != "query" or value.std() < 0.05
        assert not value.equal(new[name])


@pytest.mark.parametrize("shown", MODULES)
def test_gradients(shown: str) -> None:
    module = made(shown).double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (hidden, mask))

    assert torch.autograd.gradcheck(run, (hidden, *parameters), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shown", MODULES)
def test_padding_gets_nothing(shown: str, layout: str) -> None:
    """NaN there changes no gradient, and its own is 0."""
    batch = sequences([3, 0, 40], 12, torch.float32, holes=LAYOUTS[layout].holes)
    check_padding_gets_nothing(made(shown), LAYOUTS[layout].make(batch, None))


@pytest.mark.parametrize("shown", MODULES)
def test_compile_and_export(shown: str) -> None:
    torch.compiler.reset()  # functions of several modes share code, and each test would be one more version of it
    module = made(shown)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batches = [(torch.randn(b, s, 12), torch.rand(b, s) > 0.3) for b, s in ((2, 5), (3, 40))]
    b, s = torch.export.Dim("b"), torch.export.Dim("s")
    exported = torch.export.export(module, batches[0], dynamic_shapes=({0: b, 1: s}, {0: b, 1: s}))
    for hidden, mask in batches:
        torch.testing.assert_close(exported.module()(hidden, mask), module(hidden, mask))
        gradients = []
        for one in (compiled, module):
            module.zero_grad()
            one(hidden, mask).square().sum().backward()
            gradients.append([parameter.grad for parameter in module.parameters()])
        torch.testing.assert_close(*gradients)


# ---- errors

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
        (lambda: AttentionPooling(0), ValueError, "AttentionPooling: width must be at least 1, got 0"),
        (lambda: AttentionPooling(12.0), TypeError, "AttentionPooling: width must be an int, got float"),
        (lambda: AttentionPooling(12, 0), ValueError, "AttentionPooling: queries must be at least 1, got 0"),
        (lambda: AttentionPooling(12, scorer="mlp"), ValueError, "scorer must be one of linear, tanh, got 'mlp'"),
        (lambda: AttentionPooling(12, scorer=None), TypeError, "scorer must be a str, got NoneType"),
        (lambda: AttentionPooling(12, inner=3), ValueError, "inner goes with scorer 'tanh', got 3 with 'linear'"),
        (lambda: AttentionPooling(12, 2, "tanh"), ValueError, "scorer 'tanh' has one query, got queries=2"),
        (lambda: AttentionPooling(12, 1, "tanh", 0), ValueError, "inner must be at least 1, got 0"),
        (lambda: AttentionPooling(12, truncate_dim=13), ValueError, "between 1 and .* of a vector, 12, got 13"),
        (lambda: AttentionPooling(12, out_dtype=torch.int8), TypeError, "out_dtype must be .* or float64, got int8"),
        (lambda: AttentionPooling(12, normalize=1), TypeError, "normalize must be a bool, got int"),
        (lambda: AttentionPooling(12, dim=1), TypeError, "AttentionPooling has no dim"),
        (lambda: MultiheadPooling(12, 5), ValueError, "MultiheadPooling: heads must divide inner, 12, got 5"),
        (lambda: MultiheadPooling(12, 2, outputs=0), ValueError, "outputs must be at least 1, got 0"),
        (lambda: MultiheadPooling(12, 2, outputs=4, truncate_dim=5), ValueError, "the columns of a vector, 4, got 5"),
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
def test_errors_of_constructors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^fastpool\.nn\..*{words}"):
        make()


HIDDEN = torch.randn(2, 3, 12)


@pytest.mark.parametrize("shown", MODULES)
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((HIDDEN[..., :11],), ValueError, "hidden must have 12 columns, got 11"),
        ((HIDDEN.tolist(),), TypeError, "hidden must be a torch.Tensor, got list"),
        ((HIDDEN.sum(),), ValueError, "hidden must be padded"),
        ((HIDDEN.int(),), TypeError, "hidden must be float16"),
        ((HIDDEN, torch.ones(2, 3)), TypeError, "additive mask"),
        ((HIDDEN, None, torch.tensor([0, 1])), ValueError, "cu_seqlens goes with packed"),
    ],
)
def test_errors_of_calls(arguments: Any, error: type[Exception], words: str, shown: str) -> None:
    with pytest.raises(error, match=words):
        made(shown)(*arguments)
