"""SPLADE's pooling beside its formula and sentence-transformers', the decoder that it folds, and what is kept of it.
That every layout, dtype and backend gives the same bits is the table of modes' affair."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpool
from fastpool.modes import MODES
from fastpool.testing import LAYOUTS, cpu_backends, same_bits, sequences

POOLING, ACTIVATION = ("max", "sum"), ("relu", "log1p_relu")
BOTH = [(pooling, activation) for pooling in POOLING for activation in ACTIVATION]
LOGITS, MASK = torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(1)) - 0.5, torch.ones(3, 6).bool()
MASK[0, 4:] = MASK[1] = False


def formula(logits: Tensor, mask: Tensor, pooling: str, activation: str) -> Tensor:
    x = logits.masked_fill(~mask[..., None], 0).double().relu().log1p()
    x = x.log1p() if activation == "log1p_relu" else x
    return x.amax(1) if pooling == "max" else x.sum(1)


@pytest.mark.parametrize(("pooling", "activation"), BOTH)
def test_formula_and_sentence_transformers(pooling: str, activation: str) -> None:
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    theirs = modules.SpladePooling(pooling, activation).eval()({"token_embeddings": LOGITS, "attention_mask": MASK})
    found = fastpool.splade(
        LOGITS.masked_fill(~MASK[..., None], torch.nan), MASK, pooling=pooling, activation=activation
    )
    torch.testing.assert_close(found.double(), formula(LOGITS, MASK, pooling, activation), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, theirs["sentence_embedding"], rtol=1e-6, atol=1e-7)
    assert torch.equal(found[1], torch.zeros(50))


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.of_logits])
def test_edges(mode: str, backend: str) -> None:
    """All that is below 0, and -0, is +0; NaN and infinity stay; a logarithm of a subnormal is that."""
    x = torch.tensor([[-1.0, -0.0, -torch.inf, torch.nan, torch.inf, 1e-40, -1e-40]])
    with fastpool.backend(backend):
        found = getattr(torch.ops.fastpool, mode)(x[None])
    assert same_bits(found, torch.tensor([[0.0, 0.0, 0.0, torch.nan, torch.inf, 1e-40, 0.0]]))


@pytest.mark.parametrize(("pooling", "activation"), BOTH)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(pooling: str, activation: str, normalize: bool) -> None:
    """Those of the formula; 0 in padding, whatever stands there, and where logits are not above 0."""
    gradient = torch.randn(3, 50, generator=torch.Generator().manual_seed(2)).double()
    exact, ours = LOGITS.double().requires_grad_(), LOGITS.masked_fill(~MASK[..., None], torch.nan).requires_grad_()
    expected = formula(exact, MASK, pooling, activation)
    expected = nn.functional.normalize(expected, dim=1) if normalize else expected
    found = fastpool.splade(ours, MASK, pooling=pooling, activation=activation, normalize=normalize)
    (wanted,) = torch.autograd.grad(expected, exact, gradient)
    (got,) = torch.autograd.grad(found, ours, gradient.float())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not got[~MASK].any()
    assert got[~MASK].count_nonzero() == 0
    assert not got[LOGITS <= 0].any()


@pytest.mark.parametrize("pooling", POOLING)
def test_gradients_of_wide_rows_in_16_bits(pooling: str) -> None:
    """Beyond the columns that are taken together, of overlapping segments."""
    x = torch.randn(9, 5000, generator=torch.Generator().manual_seed(3)).bfloat16()
    starts, ends = torch.tensor([0, 3, 2]), torch.tensor([5, 9, 2])
    gradient = torch.randn(3, 5000, generator=torch.Generator().manual_seed(4))
    found, expected = [], []
    for kind, results in ((torch.bfloat16, found), (torch.float64, expected)):
        leaf = x.to(kind).requires_grad_()
        result = fastpool.splade(leaf, starts=starts, ends=ends, pooling=pooling, out_dtype=torch.float64)
        results += torch.autograd.grad(result, leaf, gradient.double())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2**-8, atol=1e-6)


def test_nothing_of_the_logits_size_is_kept() -> None:
    kept: list[Tensor] = []
    logits = torch.randn(4, 64, 3000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        fastpool.splade(logits, normalize=True)
        fastpool.splade(logits, pooling="sum")
    large = {x.untyped_storage().data_ptr() for x in kept if x.untyped_storage().nbytes() >= logits.nbytes}
    assert large == {logits.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("pooling", "activation"), BOTH)
@pytest.mark.parametrize("layout", ["padded_right_mask", "packed", "packed_shuffled", "nested"])
def test_linear(layout: str, pooling: str, activation: str) -> None:
    """splade of the logits and its gradients, a few columns at a time; the last chunk is not full."""
    arguments = LAYOUTS[layout].make(sequences([3, 0, 9], 16, torch.float32), None)
    nested = layout == "nested"
    states = arguments["hidden"].values() if nested else arguments["hidden"]
    offsets = arguments["hidden"].offsets() if nested else None
    # What stands in padding, NaN here, reaches no gradient, the weight's too.
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(103, 16, generator=generator), torch.randn(103, generator=generator)
    more: dict[str, Any] = {"pooling": pooling, "activation": activation, "normalize": True}
    found = []
    for folded in (True, False):
        leaves = [one.clone().requires_grad_() for one in (states, weight, bias)]
        hidden = torch.nested.nested_tensor_from_jagged(leaves[0], offsets) if nested else leaves[0]
        own = {**arguments, **more}
        del own["hidden"]
        if folded:
            result = fastpool.splade_linear(hidden, *leaves[1:], **own, chunk=40)
        else:
            clean = leaves[0].nan_to_num(7.0)
            clean = torch.nested.nested_tensor_from_jagged(clean, offsets) if nested else clean
            result = fastpool.splade(nn.functional.linear(clean, *leaves[1:]), **own)
        found.append([result, *torch.autograd.grad(result.square().sum() + result.sum(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_linear_of_spans_in_chunks() -> None:
    hidden, weight = torch.randn(3, 6, 8), torch.randn(90, 8)
    starts, ends = torch.tensor([[0, 1], [2, 3], [0, 0]]), torch.tensor([[1, 5], [4, 6], [6, 0]])
    for normalize in (False, True):
        found = fastpool.splade_linear(hidden, weight, starts=starts, ends=ends, chunk=40, normalize=normalize)
        expected = fastpool.splade(hidden @ weight.T, starts=starts, ends=ends, normalize=normalize)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_many_chunks_are_added_in_full_precision() -> None:
    hidden, weight = torch.randn(4, 9, 16).bfloat16(), torch.randn(4096, 16).bfloat16()
    found = []
    for dtype, chunk in ((torch.float64, 4096), (torch.bfloat16, 4096), (torch.bfloat16, 16)):
        leaf = hidden.to(dtype).requires_grad_()
        result = fastpool.splade_linear(leaf, weight.to(dtype), pooling="sum", chunk=chunk, out_dtype=torch.float64)
        found += [torch.autograd.grad(result.sum(), leaf)[0].double()]
    exact, whole, chunks = found
    assert (chunks - exact).norm() < 2 * (whole - exact).norm()


def test_a_weights_gradient_is_put_together_once() -> None:
    """Not added up from as many tensors of its size as there are chunks."""
    hidden, weight = torch.randn(20, 8), torch.randn(3000, 8, requires_grad=True)
    result = fastpool.splade_linear(hidden, weight, cu_seqlens=torch.tensor([0, 20]), chunk=100)

    class Whole(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            self.count += isinstance(made, Tensor) and made.shape == weight.shape and made.data_ptr() != 0
            return made

    with Whole() as whole:
        result.sum().backward()
    assert whole.count < 10


def test_linear_normalises_before_it_rounds() -> None:
    hidden, weight = torch.randn(4, 9, 16).bfloat16(), torch.randn(700, 16).bfloat16()
    found = fastpool.splade_linear(hidden, weight, normalize=True, chunk=256)
    logits = torch.cat([nn.functional.linear(hidden, part) for part in weight.split(256)], -1)
    assert same_bits(found, fastpool.splade(logits, normalize=True))
    rounded = fastpool.l2_normalize(fastpool.splade(logits))
    assert not same_bits(found, rounded)


def test_autocast() -> None:
    """As torch's own linear layers; the result is of hidden's dtype."""
    layer, hidden = nn.Linear(16, 90), torch.randn(3, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = fastpool.splade(layer(hidden), MASK, out_dtype=torch.float32)
        assert torch.equal(fastpool.splade_linear(hidden, layer.weight, layer.bias, MASK), expected)
        assert torch.equal(fastpool.nn.Splade(decoder=layer)(hidden, MASK), expected)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.most = max(self.most, one.numel())
        return result


@pytest.mark.parametrize("recorded", [False, True])
def test_linear_never_has_all_logits(recorded: bool) -> None:
    hidden, weight = torch.randn(200, 8, requires_grad=recorded), torch.randn(5000, 8)
    with Largest() as largest:
        result = fastpool.splade_linear(hidden, weight, cu_seqlens=torch.tensor([0, 100, 200]), chunk=500)
        if recorded:
            result.sum().backward()
    assert weight.numel() <= largest.most <= 200 * 500


def test_linear_takes_64_mib_of_logits_at_a_time() -> None:
    hidden, weight = torch.randn(2**13, 4), torch.randn(2**13, 4)
    with Largest() as largest:
        fastpool.splade_linear(hidden, weight, cu_seqlens=torch.tensor([0, 2**13]))
    assert largest.most == 2**24
    hidden, weight = torch.randn(2**15, 4), torch.randn(2**11, 4)
    with Largest() as largest:
        fastpool.splade_linear(hidden, weight, cu_seqlens=torch.tensor([0, 2**15]))
    assert largest.most == 2**15 * 1024  # the least


@pytest.mark.parametrize("recorded", [False, True])
def test_linear_compiles(recorded: bool) -> None:
    hidden, weight = torch.randn(3, 6, 8, requires_grad=recorded), torch.randn(90, 8)

    def call(hidden: Tensor) -> Tensor:
        return fastpool.splade_linear(hidden, weight, mask=MASK, chunk=32)

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(hidden), call(hidden))


def test_module_and_head() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 70, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "cls.predictions": transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=8)),
        "lm_head": transformers.RobertaForMaskedLM(transformers.RobertaConfig(**size, intermediate_size=8)),
    }
    ids = torch.randint(5, 70, (3, 6))
    for name, model in models.items():
        model.eval()
        head = model.get_submodule(name)
        states = model(ids, attention_mask=MASK, output_hidden_states=True).hidden_states[-1]
        logits = model(ids, attention_mask=MASK).logits
        expected = fastpool.nn.Splade("sum", normalize=True)(logits, MASK)
        pooling = fastpool.nn.Splade.from_mlm_head(head, "sum", normalize=True, chunk=32)
        torch.testing.assert_close(pooling(states, MASK), expected, rtol=1e-5, atol=1e-6)
        assert {id(one) for one in pooling.parameters()} == {id(one) for one in head.parameters()}
        torch.testing.assert_close(head(states), logits)  # as it was
    distil = transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=70, dim=16, n_layers=1, n_heads=2, hidden_dim=8)
    ).eval()
    parts = nn.Sequential(distil.vocab_transform, distil.activation, distil.vocab_layer_norm)
    states = distil.distilbert(ids, attention_mask=MASK).last_hidden_state
    found = fastpool.nn.Splade(decoder=distil.vocab_projector, transform=parts)(states, MASK)
    expected = fastpool.splade(distil(ids, attention_mask=MASK).logits, MASK)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert repr(fastpool.nn.Splade("sum", normalize=True)) == "Splade(pooling='sum', normalize=True)"


def test_module_with_a_decoder_hands_everything_on() -> None:
    layer, hidden = nn.Linear(16, 90), torch.randn(3, 6, 16)
    starts, ends = torch.tensor([0, 1, 2]), torch.tensor([4, 4, 6])
    module = fastpool.nn.Splade("max", "log1p_relu", layer, chunk=40, normalize=True, out_dtype=torch.float64)
    found = module(hidden, starts=starts, ends=ends)
    expected = fastpool.splade(
        layer(hidden), starts=starts, ends=ends, activation="log1p_relu", normalize=True, out_dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found.dtype == torch.float64
    packed = fastpool.nn.Splade(decoder=layer)(hidden.flatten(0, 1), cu_seqlens=torch.tensor([0, 5, 18]))
    assert packed.shape == (2, 90)


def test_a_head_whose_activation_is_said() -> None:
    head = nn.Sequential(nn.LayerNorm(16))
    head.decoder = nn.Linear(16, 30)
    hidden = torch.randn(2, 4, 16)
    for activation in ACTIVATION:
        pooling = fastpool.nn.Splade.from_mlm_head(head, activation=activation)
        torch.testing.assert_close(pooling(hidden), fastpool.splade(head(hidden), activation=activation))


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


class Adapter(nn.Linear):
    """More than its weight and bias."""


@pytest.mark.parametrize("top", [None, 1, 3, 8])
def test_csr(top: int | None) -> None:
    x = torch.tensor([[0.0, 2, 1, 2, 0, 2, 0, 0], [0] * 8, [0, 0, 0, 0, 0, 0, 0, 5]], requires_grad=True)
    found = fastpool.sparse_csr(x, top)
    kept = {
        None: x, 8: x, 1: torch.tensor([[0.0, 2, 0, 0, 0, 0, 0, 0], [0] * 8, [0] * 7 + [5]]),
        3: torch.tensor([[0.0, 2, 0, 2, 0, 2, 0, 0], [0] * 8, [0] * 7 + [5]]),
    }[top]  # fmt: skip
    assert torch.equal(found.to_dense(), kept)
    assert found.shape == x.shape
    if top is not None:
        assert found.values().numel() == 3 * top
        assert found.col_indices().view(3, top).diff(dim=1).gt(0).all()
    (gradient,) = torch.autograd.grad((found @ torch.ones(8, 2)).sum(), x)
    stored = torch.zeros(3, 8)  # zeros among them, which a store of everything that is not 0 does not have
    stored[torch.arange(3).repeat_interleave(found.crow_indices().diff()), found.col_indices()] = 2.0
    assert torch.equal(gradient, stored if top is not None else torch.full((3, 8), 2.0))
    assert (stored[kept != 0] == 2).all()


def test_csr_of_many_ties_keeps_the_lower_columns() -> None:
    x = (torch.arange(3000) % 3).float()[None]
    found = fastpool.sparse_csr(x, 700)
    assert torch.equal(found.col_indices(), (x[0] == 2).nonzero()[:700, 0])


def test_csr_keeps_nan_first() -> None:
    found = fastpool.sparse_csr(torch.tensor([[3.0, torch.nan, 9.0]]), 1)
    assert found.col_indices().tolist() == [1]


HIDDEN = torch.randn(3, 6, 8)
WEIGHT = torch.randn(20, 8)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fastpool.splade(LOGITS, pooling="mean"), ValueError, "splade: pooling must be one of sum, max, got 'mean'"),
    (lambda: fastpool.splade(LOGITS, activation="none"), ValueError, "splade: activation must be one of relu, log1p_relu, got 'none'"),
    (lambda: fastpool.splade(LOGITS, pooling=1), TypeError, "splade: pooling must be a name, got int"),
    (lambda: fastpool.splade(LOGITS, dim=1), TypeError, "splade has no dim: "),
    (lambda: fastpool.splade(LOGITS.long()), TypeError, "splade_max_relu: logits must be float16, .* got int64"),
    (lambda: fastpool.splade(LOGITS, MASK.float()), TypeError, "splade_max_relu: mask must be bool"),
    (lambda: fastpool.pool(HIDDEN, modes=("mean", "splade_max_relu")), ValueError, "modes must be one of mean, .* which is for logits: fastpool.splade"),
    (lambda: fastpool.nn.Pooling("splade_max_relu"), ValueError, "mode must be one of mean, .* which is for logits"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT.T), ValueError, r"weight must have shape \[V, 8\], as wide as hidden, got \[8, 20\]"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT[:0]), ValueError, r"weight must have shape \[V, 8\]"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT.double()), TypeError, "weight must be float32 as hidden is, got float64"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT.to("meta")), ValueError, "weight must be on hidden's device, cpu, got meta"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, torch.ones(3)), ValueError, r"bias must have shape \[20\], .* got \[3\]"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, torch.ones(20).double()), TypeError, "bias must be float32 as hidden is, got float64"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, torch.ones(20, device="meta")), ValueError, "bias must be on hidden's device, cpu, got meta"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, pooling="mean"), ValueError, "splade_linear: pooling must be one of"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, mask=MASK[:2]), ValueError, r"mask must have hidden's shape without its last dimension, \[3, 6\], got \[2, 6\]"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, cu_seqlens=torch.tensor([0, 3])), ValueError, r"cu_seqlens goes with packed \[T, H\] hidden, got shape \[3, 6, 8\]"),
    (lambda: fastpool.splade_linear(HIDDEN[None], WEIGHT), ValueError, r"hidden must be padded .* got shape \[1, 3, 6, 8\]"),
    (lambda: fastpool.splade_linear(torch.nested.nested_tensor([HIDDEN[0]]), WEIGHT), TypeError, "a nested hidden must be jagged"),
    (lambda: fastpool.nn.Splade(decoder=nn.Linear(8, 20), transform=nn.Identity())(None), TypeError, "nn.Splade: hidden must be a torch.Tensor, got NoneType"),
    (lambda: fastpool.nn.Splade(decoder=Adapter(8, 20)), TypeError, "decoder must be a torch.nn.Linear and no subclass, got Adapter"),
    (lambda: fastpool.nn.Splade(decoder=with_hook(nn.Linear(8, 20))), ValueError, "decoder must have no forward hooks"),
    (lambda: fastpool.nn.Pooling("splade"), ValueError, "mode must be one of mean, .* fastpool.nn.Splade"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, chunk=0), ValueError, "chunk must be at least 1, got 0"),
    (lambda: fastpool.splade_linear(HIDDEN[0, 0], WEIGHT), ValueError, r"hidden must be padded .* got shape \[8\]"),
    (lambda: fastpool.splade_linear(HIDDEN.long(), WEIGHT), TypeError, "hidden must be float16, .* got int64"),
    (lambda: fastpool.splade_linear([1.0], WEIGHT), TypeError, "hidden must be a torch.Tensor, got list"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, normalize=1), TypeError, "normalize must be a bool, got int"),
    (lambda: fastpool.splade_linear(HIDDEN, WEIGHT, truncate_dim=3), TypeError, "unexpected keyword argument 'truncate_dim'"),
    (lambda: fastpool.sparse_csr(LOGITS), ValueError, r"x must have shape \[B, V\], got \[3, 6, 50\]"),
    (lambda: fastpool.sparse_csr(LOGITS[0], 51), ValueError, "top must be at most x's columns, 50, got 51"),
    (lambda: fastpool.sparse_csr(LOGITS[0], 0), ValueError, "top must be at least 1, got 0"),
    (lambda: fastpool.sparse_csr(MASK), TypeError, "x must be float16, .* got bool"),
    (lambda: fastpool.nn.Splade("mean"), ValueError, "nn.Splade: pooling must be one of sum, max"),
    (lambda: fastpool.nn.Splade(decoder=nn.Identity()), TypeError, "decoder must be a torch.nn.Linear and no subclass, got Identity"),
    (lambda: fastpool.nn.Splade(transform=nn.Identity()), ValueError, "transform goes with a decoder, got none"),
    (lambda: fastpool.nn.Splade(chunk=4), ValueError, "chunk goes with a decoder, got none"),
    (lambda: fastpool.nn.Splade(decoder=nn.Linear(8, 20), truncate_dim=4), ValueError, "truncate_dim is for logits"),
    (lambda: fastpool.nn.Splade.from_mlm_head(nn.Linear(8, 20)), TypeError, "head must be a module whose last step is its `decoder`, .* got Linear with none"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert re.match(r"fastpool\.", str(caught.value))
