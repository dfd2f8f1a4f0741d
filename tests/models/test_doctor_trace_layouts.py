"""`fastpool doctor --trace`: where in tensors the tokens are, what is said where that is not known, and padding."""

import math

import pytest
import torch
from helpers.doctor_cases import REAL, Chain, Step, traced
from torch import Tensor, nn

from fastpool.doctor import report
from fastpool.doctor.trace import Trace

INF, NAN = math.inf, math.nan


def packed(x: Tensor) -> Tensor:
    return x[REAL]


def padded(x: Tensor) -> Tensor:
    return torch.zeros(2, 5, *x.shape[1:], dtype=x.dtype).masked_scatter(REAL[..., None], x)


LAYOUTS = [
    (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
    (lambda x: x.transpose(0, 1)[..., None], lambda x: x[..., 0].transpose(0, 1)),
    (packed, padded),
    (lambda x: packed(x)[None], lambda x: padded(x[0])),
    (lambda x: packed(x)[:, None], lambda x: padded(x[:, 0])),
]
NAMES = ["[S, B, H]", "[S, B, H, 1]", "[N, H]", "[1, N, H]", "[N, 1, H]"]


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


@pytest.mark.parametrize(("to", "back"), LAYOUTS, ids=NAMES)
def test_real_tokens_are_found_in(to, back):
    at_padding = Step(lambda x: to(back(x).masked_fill(~REAL[..., None], INF)))
    large = Layers(Step(lambda x: x * 1e7), Step(lambda x: x / 1e7))
    trace = traced(Chain(a=Step(to), b=at_padding, c=large, d=Step(back)), x=torch.ones(2, 5, 3))
    assert trace.within is None
    assert trace.not_counted == []
    assert trace.largest is not None
    assert (trace.largest.name, trace.largest.largest) == ("c.layer.0", 1e7)
    trace = traced(Chain(a=Step(to), b=at_padding, c=Step(lambda x: x * NAN), d=Step(back)))
    assert trace.why().startswith("c (Step) was the first ")


def test_as_many_texts_as_tokens():
    """[B, S] looks like [S, B]: no size is missed, but what is padding in [B, S] is no error."""
    real = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0]])

    def watched(in_both: float, in_first: float, in_other: float) -> Trace:
        x = torch.zeros(3, 3, 4)
        x[0, 0], x[1, 2], x[2, 1] = in_both, in_first, in_other
        trace = Trace(model := Step(lambda ids: x))
        with trace.watch({"attention_mask": real}):
            model(real)
        return trace

    for sizes in ((7.0, 1.0, 2.0), (1.0, 7.0, 2.0), (1.0, 2.0, 7.0)):
        largest = watched(*sizes).largest
        assert largest is not None
        assert largest.largest == 7
    assert watched(1.0, 1.0, INF).within is None
    assert watched(1.0, INF, 1.0).within is not None
    assert watched(INF, 1.0, 1.0).within is not None


def test_layouts_that_are_not_known_are_said():
    def inside(x):  # [B, H, S], as convolutions take it
        return (x.transpose(1, 2) * 1e7).contiguous()

    layers = Layers(
        Chain(a=Step(inside)),
        Chain(a=Step(lambda x: x / 1e7)),
        Chain(a=Step(lambda x: x.transpose(1, 2))),
    )
    trace = traced(Chain(a=nn.Identity(), encoder=layers))
    assert trace.not_counted == ["encoder.layer.0.a", "encoder.layer.0", "encoder.layer.1.a", "encoder.layer.1"]
    # The first took known states, but what it made of them is not.
    seen = [(block.name, block.peak is not None, block.not_counted) for block in trace.blocks()]
    assert seen == [("encoder.layer.0", False, 2), ("encoder.layer.1", False, 2), ("encoder.layer.2", True, 0)]
    note = "4 modules give values in a layout that is not known here, as encoder.layer.0.a (Step); they are not counted"
    assert f" {note}." in report._about_trace(trace)
    assert "was seen to take or give" in report._about_trace(trace)
    plain = report._plain_trace(trace)
    assert plain["not_counted"] == trace.not_counted
    unseen = {"largest": None, "dtype": None, "of_float16_maximum": None}
    assert plain["blocks"][0] == {"name": "encoder.layer.0", **unseen, "not_counted": 2}
    assert trace.why() == f"no module was seen that was given finite states and gave others; {note}"


def test_what_plainly_is_no_state_is_not_said():
    beside = [
        Step(lambda x: x[:, 0]),  # a vector for each text
        Step(lambda x: x[:, :1]),
        Step(lambda x: x.sum()),
        Step(lambda x: x[0, :, 0]),
        Step(lambda x: x @ x.mT),
        Step(lambda x: (x @ x.mT)[:, None]),  # scores
        Step(lambda x: torch.full((1, 5, 5), -INF)),  # a mask
        Step(lambda x: torch.full((5, 5), -INF)),
        Step(lambda x: torch.zeros(5, 5, 4)),  # a bias for each head
        Step(lambda x: torch.ones(7, 7, 7).long()),
        Step(lambda x: x[0]),  # positions
    ]

    def forward(x):
        for step in beside:
            step(x)
        return x

    inner = Layers(*beside)
    inner.forward = forward
    trace = traced(inner)
    assert trace.not_counted == []
    assert trace.not_counted_told() is None
    assert trace.within is None


def test_a_turned_model_that_is_too_large_for_float16():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=20, d_model=16, n_layer=2, n_head=2, d_inner=32)
    model = transformers.XLNetModel(config).eval()
    with torch.no_grad():
        model.layer[0].ff.layer_1.weight.mul_(1e7)
    seen: list[float] = []
    model.layer[0].ff.layer_1.register_forward_hook(lambda module, args, out: seen.append(out.abs().max().item()))
    trace = Trace(model)
    batch = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5).long()}
    with torch.inference_mode(), trace.watch(batch):
        model(**batch)
    assert trace.largest is not None
    assert (trace.largest.name, trace.largest.largest) == ("layer.0.ff.layer_1", seen[0])
    assert seen[0] > 65520
    assert [block.name for block in trace.blocks() if block.peak is not None] == ["layer.0", "layer.1"]
    assert "In float16 it would overflow." in report._about_trace(trace)


# Padding.


@pytest.mark.parametrize("kind", ["right", "left"])
def test_padding_that_is_not_finite_is_the_cause(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "right":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=10, **shape))
        began, table = "encoder.layer.0.attention.self (", "embeddings.word_embeddings"
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=10, **shape))
        began, table = "layers.0.self_attn (", "embed_tokens"
    model.eval().get_input_embeddings().weight.data[0] = NAN
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0] if kind == "right" else [0, 0, 0, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    trace = Trace(model)
    with torch.inference_mode(), trace.watch(batch):
        model(**batch)
    said = trace.why()
    assert said.startswith(began)
    assert said.endswith(
        f"; but what it took at padding was not finite already, which {table} (Embedding) was the first to give; its "
        f"parameter {table}.weight[0, 0] is nan: no other dtype mends that"
    )


def test_padding_that_overflowed():
    large = Step(lambda x: x.half().masked_fill(~REAL[..., None], 6e4))
    twice = Step(lambda x: x * 2)
    weighed = Step(lambda x: x + 0 * x.sum(1, keepdim=True))
    said = traced(Chain(a=large, b=twice, c=Chain(d=weighed))).why()
    assert said.startswith("c.d (Step) was the first whose output is not finite: ")
    gave = (
        "; but what it took at padding was not finite already, which b (Step) was the first to give; load the model in "
    )
    assert gave in said
    filling = Chain(inner=nn.Identity())
    filling.forward = lambda x: filling.inner(x.masked_fill(~REAL[..., None], INF))  # inner hands on what it took
    said = traced(Chain(a=filling, b=weighed)).why()
    assert "already, which a (Chain) was the first to give; another dtype is unlikely to help" in said
    within = Step(lambda x: x.masked_fill(~REAL[..., None], INF) + 0 * x.sum(1, keepdim=True) * INF)
    assert "padding" not in traced(Chain(a=within)).why()  # which it was not given


# Tensors that cannot be looked at.


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(dtype):
    back = Step(lambda x: x.float())
    trace = traced(Chain(a=Step(lambda x: x.to(dtype)), b=back), x=torch.full((2, 5, 3), -40.0))
    assert trace.not_counted == []
    assert report._plain_trace(trace)["largest"]["largest"] == 40
    said = traced(Chain(a=Step(lambda x: (x * NAN).to(dtype)), b=back)).why()
    assert said.startswith("a (Step) was the first ")
    assert "in float8_e" in said
    assert "; load the model in bfloat16 or float32: " in said

    scaled = Step(lambda x: x * NAN)
    scaled.scale = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    assert traced(Chain(a=scaled)).why().endswith("have the same range")
    scaled.scale.data = torch.tensor([1.0, NAN, 1.0]).to(dtype)
    assert "; its parameter a.scale[1] is nan: " in traced(Chain(a=scaled)).why()


def test_weights_that_are_elsewhere_are_passed_over():
    linear = nn.Linear(3, 3, device="meta")
    last = nn.Parameter(torch.tensor([NAN]))
    linear.register_parameter("last", last)
    linear.forward = lambda x: x * NAN
    assert "its parameter a.last[0] is nan: " in traced(Chain(a=linear)).why()


def test_hooks_never_make_the_model_fail():
    class Unseen(Tensor):
        """One that torch cannot compare."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if "isfinite" in getattr(func, "__name__", ""):
                raise NotImplementedError("isfinite")
            return super().__torch_function__(func, types, args, kwargs or {})

    odd, back = Step(lambda x: x.as_subclass(Unseen)), Step(lambda x: x.as_subclass(Tensor) * 2)
    trace = traced(Chain(a=odd, b=back))
    assert trace.not_counted == ["a"]
    assert trace.largest is not None
    assert trace.largest.name == "b"
    told = "1 module gives values in a layout that is not known here, as a (Step); they are not counted"
    assert trace.not_counted_told() == told


def test_nested_tensors():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    inner = Chain(a=nn.Identity())
    inner.encoder = encoder
    inner.forward = lambda x: encoder(x, src_key_padding_mask=~REAL)
    trace = traced(inner, x=torch.randn(2, 5, 8))
    assert "encoder.layers.0" in trace.not_counted
    assert [(block.name, block.peak) for block in trace.blocks()] == [
        ("encoder.layers.0", None),
        ("encoder.layers.1", None),
    ]
    assert trace.largest is not None
    assert "of float16's maximum" in report._about_trace(trace)
