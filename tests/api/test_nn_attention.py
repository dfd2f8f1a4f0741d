"""Attention modules: the functions' bits, state, gradients, graphs, errors."""

import copy
import io
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
