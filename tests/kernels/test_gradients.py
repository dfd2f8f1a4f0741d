"""Gradients: against numerical ones in float64, of every backend bit for bit, and what they must never touch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.modes import MODES
from fastpool.testing import (
    DTYPES,
    LAYOUTS,
    backward_arguments,
    cpu_backends,
    function_of,
    gradients,
    own_arguments,
    required,
    same_bits,
    sequences,
    special_values,
    taking_turns,
    variants,
)

OTHERS = [name for name in cpu_backends() if name not in ("reference", "triton")]  # test_triton_gradients has its own
LENGTHS = [7, 0, 1, 33, 70]
MORE: list[dict[str, Any]] = [
    {},
    {"truncate_dim": 5},
    {"normalize": True},
    {"truncate_dim": 9, "normalize": True, "out_dtype": torch.float32},
]


def batch_gradient(result: Tensor, seed: int = 0) -> Tensor:
    """A gradient of it, of any scale, with zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(result.shape, dtype=torch.float64, generator=generator)
    gradient *= 2.0 ** torch.randint(-12, 6, result.shape, generator=generator)
    gradient[..., ::7] = 0.0
    gradient[..., 1::7] = -0.0
    return gradient.to(result.dtype)


def of(backend: str, function: Callable[..., Tensor], arguments: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    with fastpool.backend(backend):
        with torch.no_grad():
            gradient = batch_gradient(function(**arguments, **more))
        return gradients(function, arguments, gradient, **more)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_gradcheck(mode: str, given: str | None, layout: str) -> None:
    """NaN in padding must not show, although gradcheck nudges it too."""
    pool = function_of(mode)
    holes = LAYOUTS[layout].holes
    arguments = LAYOUTS[layout].make(sequences([3, 0, 5], 4, torch.float64, holes=holes), given)
    hidden = arguments.pop("hidden")
    leaf = (hidden.values() if hidden.is_nested else hidden).detach().requires_grad_()
    own = [arguments.pop(given).double().detach().requires_grad_()] if given else []
    with fastpool.backend("reference"):
        for more in ({}, {"truncate_dim": 3, "normalize": True}):

            def called(leaf: Tensor, *own: Tensor, more: dict[str, Any] = more) -> Tensor:
                x = torch.nested.nested_tensor_from_jagged(leaf, hidden.offsets()) if hidden.is_nested else leaf
                result: Tensor = pool(x, **({given: own[0]} if given else {}), **arguments, **more)
                return result

            assert torch.autograd.gradcheck(called, (leaf, *own), fast_mode=True)


def test_gradcheck_l2_normalize() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for more in ({}, {"truncate_dim": 4}, {"eps": 100.0}):  # the last: no norm is above eps
        for view in (x, x.detach().transpose(0, 1).requires_grad_(), x.detach()[0, 0].requires_grad_()):
            with fastpool.backend("reference"):
                assert torch.autograd.gradcheck(lambda y, more=more: fastpool.l2_normalize(y, **more), (view,))


def test_gradcheck_dims() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    truncate_dims = torch.tensor([[6, 1, 0], [3, 2, 4]])
    for more, most in (({}, 6), ({"truncate_dim": 4}, 4), ({"eps": 100.0}, 6)):
        cut = truncate_dims.clamp(max=most)
        with fastpool.backend("reference"):
            assert torch.autograd.gradcheck(
                lambda y, m=more, d=cut: fastpool.l2_normalize(y, truncate_dims=d, **m), (x,)
            )


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("mode", "given", "layout", "dtype"), taking_turns(*DTYPES), ids=str)
def test_same_bits(mode: str, given: str | None, layout: str, dtype: torch.dtype, backend: str) -> None:
    pool = function_of(mode)
    for width in (16, 33):
        batch = sequences(LENGTHS, width, dtype, holes=LAYOUTS[layout].holes, seed=width)
        arguments = LAYOUTS[layout].make(batch, given)
        for more in MORE:
            expected = of("reference", pool, arguments, **more)
            for got, right in zip(of(backend, pool, arguments, **more), expected, strict=True):
                assert same_bits(got, right), (width, more)
                assert not got.isnan().any(), "padding was read"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_matches_float64(mode: str, given: str | None, dtype: torch.dtype) -> None:
    """The gradient is that of float64 arithmetic on the same numbers, rounded."""
    arguments = LAYOUTS["packed_shuffled"].make(sequences([300, 2, 40], 20, dtype, holes=True), given)
    wide = {**arguments, "hidden": arguments["hidden"].double()}
    if given:
        wide[given] = wide[given].double()
    for normalize in (False, True):
        gradient = torch.randn(3, 20, generator=torch.Generator().manual_seed(3)).to(dtype)
        got = gradients(function_of(mode), arguments, gradient, normalize=normalize)
        expected = gradients(function_of(mode), wide, gradient.double(), normalize=normalize)
        for x, y in zip(got, expected, strict=True):
            # Half a unit of the rounding, beside sums of a few hundred terms.
            near = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float64: 1e-14}[x.dtype]
            assert torch.allclose(x.double(), y, rtol=near, atol=near * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_a_sequence_has_the_same_gradient_in_every_batch(mode: str, given: str | None, dtype: torch.dtype) -> None:
    pool = function_of(mode)
    one = sequences([70], 24, dtype, seed=5)[0]
    gradient = batch_gradient(torch.empty(1, 24, dtype=dtype))
    own = own_arguments(given, one.weights[None], one.states.shape[-1])
    alone = gradients(pool, {"hidden": one.states[None], **own}, gradient, normalize=True)
    others = sequences([3, 90, 200], 24, dtype, seed=6)
    for layout in LAYOUTS:
        for place in range(4):
            arguments = LAYOUTS[layout].make([*others[:place], one, *others[place:]], given)
            every = torch.ones(4, 24, dtype=dtype)
            every[place] = gradient
            got = gradients(pool, arguments, every, normalize=True)
            hidden = arguments["hidden"]
            tokens = (hidden.values() if hidden.is_nested else hidden).reshape(-1, 24)
            rows = (tokens == one.states[:, None]).all(-1).int().argmax(1)  # where the layout has put them
            per_token = [got[0].reshape(-1, 24), *(x.reshape(-1) for x in got[1:] if given != "query")]
            for mine, found in zip(alone, per_token, strict=given != "query"):  # whose gradient is the batch's
                assert same_bits(found[rows], mine[0].to(found.dtype)), (layout, place)


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
@pytest.mark.parametrize(("mode", "given"), variants())
def test_overlapping_segments_add_up_in_order(mode: str, given: str | None, backend: str) -> None:
    """Each segment by itself, then their sum in float32, in the order of segments, rounded once."""
    pool = function_of(mode)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = sequences([90], 12, dtype)[0].states
        per_token = torch.rand(90, generator=torch.Generator().manual_seed(1))
        bounds = [(10, 80), (0, 33), (20, 20), (5, 90), (32, 64), (10, 80), (64, 65)]
        gradient = batch_gradient(torch.empty(len(bounds), 12, dtype=dtype))
        total = torch.zeros(90, 12)
        for b, (start, end) in enumerate(bounds):
            if start == end:
                continue
            own = own_arguments(given, per_token[None, start:end], 12)
            arguments = {"hidden": hidden[None, start:end].float(), **own}
            total[start:end] += of_one(backend, pool, arguments, gradient[b : b + 1].float())
        starts, ends = (torch.tensor(column) for column in zip(*bounds, strict=True))
        arguments = {"hidden": hidden, "starts": starts, "ends": ends, **own_arguments(given, per_token, 12)}
        with fastpool.backend(backend):
            got = gradients(pool, arguments, gradient)[0]
        if not (given == "query" or MODES[mode].activates_tokens):
            assert same_bits(got, total.to(dtype))
        else:  # two shares of each segment, one after another; or their sum, before what activated the token
            torch.testing.assert_close(got, total.to(dtype), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


def of_one(backend: str, pool: Callable[..., Tensor], arguments: dict[str, Any], gradient: Tensor) -> Tensor:
    with fastpool.backend(backend):
        return gradients(pool, arguments, gradient)[0][0]


@pytest.mark.parametrize("backend", cpu_backends())
def test_the_first_maximum_has_it(backend: str) -> None:
    hidden = torch.tensor([[1.0, 3.0, -0.0, 5.0], [3.0, 3.0, 0.0, float("nan")], [3.0, 2.0, -0.0, float("nan")]])
    with fastpool.backend(backend):
        (got,) = gradients(fastpool.max, {"hidden": hidden[None]}, torch.full((1, 4), 2.0))
    expected = torch.tensor([[0.0, 2.0, 2.0, 0.0], [2.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(got[0], expected)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("mode", MODES)
def test_nothing_leaks_into_padding(mode: str, backend: str) -> None:
    """An infinite gradient, NaN in padding: exactly zero, and positive, wherever no token is used."""
    hidden = torch.full((2, 40, 9), float("nan"))
    hidden[:, 3:37] = 1.0
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[:, 3:37] = True
    mask[:, 20] = False
    hidden[:, 20] = float("nan")
    gradient = torch.tensor([[float("inf")] * 9, [float("nan")] * 9])
    arguments = {"hidden": hidden, "mask": mask, **required(mode, hidden.shape)}
    with fastpool.backend(backend):
        got, *of_own = gradients(function_of(mode), arguments, gradient[:, :5], truncate_dim=5)
    unused = torch.ones_like(got, dtype=torch.bool)
    unused[..., : 9 if MODES[mode].takes_query else 5] = ~mask[..., None]
    assert same_bits(got[unused], torch.zeros(int(unused.sum())))
    assert not got[~unused].isfinite().all()
    if MODES[mode].takes_scores:
        assert same_bits(of_own[0][~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("backend", cpu_backends())
def test_signs_of_zero(backend: str) -> None:
    """A sum over columns is never -0, so neither is a gradient that has nothing else to say."""
    for truncate_dim in (1, 2, 5, 64, 129, 512, 4096):
        gradient, x = torch.full((1, truncate_dim), -0.0), torch.ones(1, truncate_dim)
        with fastpool.backend(backend):
            got = torch.ops.fastpool._l2_normalize_backward(gradient, x, 1e-12)
        assert same_bits(got, gradient), truncate_dim


@pytest.mark.parametrize("backend", cpu_backends())
def test_a_result_that_is_no_token_counts_as_the_first(backend: str) -> None:
    """Autograd never hands one over; all backends agree all the same."""
    hidden, gradient = torch.ones(1, 3, 4), torch.full((1, 4), 2.0)
    with fastpool.backend(backend):
        got = torch.ops.fastpool._pool_backward(*backward_arguments("max", "hidden", gradient, gradient, hidden=hidden))
    assert torch.equal(got, torch.nn.functional.pad(gradient[None], (0, 0, 0, 2)))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_special_values(mode: str, given: str | None, dtype: torch.dtype, backend: str) -> None:
    """NaN, infinities, zeros of either sign and subnormals, in tokens, in what weighs them and in gradients."""
    hidden = special_values(6, 70, 40).to(dtype)
    arguments = {"hidden": hidden, **own_arguments(given, special_values(6, 1, 70)[:, 0], 40)}
    gradient = special_values(6, 1, 40)[:, 0].to(dtype)
    for normalize in (False, True):
        got, expected = [], []
        for name, into in ((backend, got), ("reference", expected)):
            with fastpool.backend(name):
                into += gradients(function_of(mode), arguments, gradient, normalize=normalize)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), normalize


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(4, 3, 300, dtype=torch.float64, generator=generator) * 3).to(dtype)
    huge = x.double().sign().to(dtype) * (6e4 if dtype == torch.float16 else 3e38)
    views = (x, x.transpose(0, 1), x[0, 0], x[:, :, 3:50], huge, x.expand(2, 4, 3, 300).permute(2, 0, 1, 3), x * 0)
    for view in views:
        for more in ({}, {"truncate_dim": 33, "eps": 20.0}, {"out_dtype": torch.float64}, {"eps": 0.0}):
            got, expected = (of(name, fastpool.l2_normalize, {"x": view}, **more) for name in (backend, "reference"))
            assert same_bits(got[0], expected[0]), more
            assert got[0].shape == view.shape


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dims(dtype: torch.dtype, backend: str) -> None:
    """A row has the gradient of a call of its own for that many columns, and +0 behind them, where neither x nor the
    gradient is looked at."""
    x = torch.randn(3, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0, 1], x[1, 1] = 0.0, 6e4 if dtype == torch.float16 else 3e38
    truncate_dims = torch.tensor([[33, 1, 0], [7, 33, 16], [32, 17, 33], [2, 0, 31], [33, 33, 8]]).T
    used = torch.arange(40) < truncate_dims[..., None]
    gradient = batch_gradient(torch.empty(3, 5, 33, dtype=dtype))
    expected = torch.zeros_like(x)
    for at in range(15):
        row, n = x.view(-1, 40)[at], int(truncate_dims.flatten()[at])
        if n > 0:
            with fastpool.backend("reference"):
                (alone,) = gradients(fastpool.l2_normalize, {"x": row[:n]}, gradient.view(-1, 33)[at, :n])
            expected.view(-1, 40)[at, :n] = alone
    poisoned = {"x": torch.where(used, x, torch.nan)}
    nothing = torch.where(used[..., :33], gradient, torch.nan)
    with fastpool.backend(backend):
        for index in (truncate_dims, truncate_dims.int()):
            (got,) = gradients(fastpool.l2_normalize, poisoned, nothing, truncate_dim=33, truncate_dims=index)
            assert same_bits(got, expected)
        # A norm of 0, and nothing in its place.
        zeros, ones = torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype)
        more = {"truncate_dims": torch.tensor([2]), "eps": 0.0}
        (got,) = gradients(fastpool.l2_normalize, {"x": zeros}, ones, **more)
        assert got[0, :2].isnan().all()
        assert got[0, 2] == 0


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (2, 3, 0)])
def test_nothing_to_pool(mode: str, shape: tuple[int, int, int], backend: str) -> None:
    hidden = torch.ones(shape)
    for normalize in (False, True):
        with fastpool.backend(backend):
            padded = {"hidden": hidden, **required(mode, shape)}
            got, *own = gradients(function_of(mode), padded, torch.ones(shape[0], shape[2]), normalize=normalize)
            assert got.shape == shape
            assert all((one == 0).all() for one in own)
            packed = {"hidden": hidden[:0].reshape(0, shape[2]), "cu_seqlens": torch.zeros(3, dtype=torch.int64)}
            packed |= required(mode, packed["hidden"].shape)
            got, *own = gradients(function_of(mode), packed, torch.ones(2, shape[2]), normalize=normalize)
            assert got.shape == (0, shape[2])
            assert all((one == 0).all() for one in own)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_for_backward(mode: str) -> None:
    """Nothing of hidden's size, but hidden itself for max, of logits, with a query, and for a gradient of weights or
    scores."""
    hidden = torch.randn(4, 50, 32, requires_grad=True)
    mask = torch.ones(4, 50, dtype=torch.bool)
    given = {"weights": torch.rand(4, 50)} if MODES[mode].takes_weights else required(mode, hidden.shape)
    for needed in (False, True) if given else (False,):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):  # noqa: B023  # used at once
            function_of(mode)(
                hidden, mask=mask, normalize=True, **{k: v.requires_grad_(needed) for k, v in given.items()}
            )
        large = [x for x in kept if x.untyped_storage().nbytes() >= hidden.untyped_storage().nbytes()]
        if mode == "max" or MODES[mode].of_logits or needed or MODES[mode].takes_query:
            assert {x.data_ptr() for x in large} == {hidden.data_ptr()}
        else:
            assert not large


def test_only_what_is_asked_for() -> None:
    hidden, weights = torch.randn(2, 5, 4), torch.rand(2, 5)
    for of_hidden, of_weights in ((True, False), (False, True)):
        x, w = hidden.clone().requires_grad_(of_hidden), weights.clone().requires_grad_(of_weights)
        fastpool.weighted_mean(x, weights=w, normalize=True).sum().backward()
        assert (x.grad is not None, w.grad is not None) == (of_hidden, of_weights)
    with torch.no_grad():
        assert not fastpool.mean(x.requires_grad_()).requires_grad
    assert not fastpool.mean(hidden).requires_grad


def test_it_runs_on_the_backend_that_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    ran: list[str] = []
    for name, module in fastpool.dispatch.BACKENDS.items():
        for kernel in ("pool_backward", "l2_normalize_backward"):
            original = getattr(module, kernel)
            monkeypatch.setattr(
                module, kernel, lambda call, name=name, original=original: (ran.append(name), original(call))[1]
            )
    with fastpool.backend("reference"):
        result = fastpool.mean(hidden, normalize=True)
    result.sum().backward()  # outside
    assert ran == ["reference", "reference"]


@pytest.mark.parametrize("mode", [*MODES, "l2_normalize"])
def test_what_is_not_implemented_says_so(mode: str) -> None:
    function = function_of(mode)
    hidden = torch.randn(2, 5, 4)
    for called in (function, getattr(torch.ops.fastpool, mode)):
        called = partial(called, **(required(mode, hidden.shape) if mode in MODES else {}))
        with pytest.raises(NotImplementedError, match="forward-mode gradients"):
            torch.func.jvp(called, (hidden,), (hidden,))
        with pytest.raises(NotImplementedError, match="forward-mode gradients"):
            torch.func.hessian(lambda x, called=called: called(x).pow(2).sum())(hidden)
        x = hidden.clone().requires_grad_()
        (first,) = torch.autograd.grad(called(x).pow(2).sum(), x, create_graph=True)
        said = MODES[mode].without_activation if mode in MODES and MODES[mode].activates_result else mode
        with pytest.raises(NotImplementedError, match=f"fastpool.{said}: gradients of gradients"):
            first.pow(2).sum().backward()
