"""`fastpool doctor` on a model whose states are not finite: which module began, and how large all got."""

import json
import math
import re
from collections import OrderedDict

import pytest
import torch
from helpers.doctor_cases import CONFIG, REAL, Chain, Model, Step, needs_packages, traced
from helpers.tiny_bert import tiny_bert
from torch import nn

from fastpool.cli import main
from fastpool.doctor import embed, report
from fastpool.doctor.finite import HINT
from fastpool.doctor.trace import Trace

INF, NAN = math.inf, math.nan


def test_the_error_says_which_module_began():
    bad = Step(lambda x: x.index_fill(1, torch.tensor([1]), NAN))
    with pytest.raises(ValueError, match=f"text 'bb', token 1 .*column 0; {HINT}"):
        embed.vectors(Model(bad), CONFIG, ["bb", "a"], lambda count: None)
    model = Model(bad)
    with pytest.raises(ValueError, match=r"column 0; the model itself \(Step\) was the first"):
        embed.vectors(model, CONFIG, ["bb", "a"], lambda count: None, Trace(model.first))


def test_padding_is_not_watched():
    model = Model(Step(lambda x: x.masked_fill(~REAL[..., None], NAN)))
    trace = Trace(model.first)
    embed.vectors(model, CONFIG, ["bb", "a"], lambda count: None, trace)
    assert trace.within is None
    assert trace.largest.largest == model.first.x[REAL].abs().max()


OVERFLOWS = Step(lambda x: x.half() * 6e4)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, None), lambda given: given[0]),
        (lambda x: [1, (x,)], lambda given: given[1][0]),
        (lambda x: {"states": x, "n": 1}, lambda given: given["states"]),
        (lambda x: OrderedDict(last_hidden_state=x), lambda given: given["last_hidden_state"]),  # a ModelOutput
        (lambda x: x.flatten(0, 1), lambda given: given.view(2, 5, 3)),
        (lambda x: x[:, :, None, :], lambda given: given[:, :, 0]),
    ],
    ids=["tuple", "list", "dict", "ModelOutput", "flattened", "heads"],
)
def test_the_first_module_is_named(wrap, unwrap):
    overflows = Step(lambda x: wrap(x.half() * 6e4))
    trace = traced(Chain(a=nn.Identity(), b=Chain(c=overflows), d=Step(unwrap), e=Step(lambda x: x * 2)))
    assert trace.why().startswith("b.c (Step) was the first whose output is not finite: it took states up to ")
    assert "in float16, whose maximum is 65504; load the model in bfloat16 or float32: " in trace.why()


def test_figures():
    x = torch.zeros(2, 5, 3)
    x[0, 0] = torch.tensor([-2.0, 0.5, 0.0])
    x[1, 4] = 9.0  # padding
    said = traced(Chain(a=OVERFLOWS), x=x).why()
    assert "it took states up to 2 and gave up to 30000 where finite, in float16" in said
    assert "gave nothing finite, in" in traced(Chain(a=Step(lambda x: x.half() * NAN))).why()


def test_a_sum_between_modules_is_its_modules():
    """LayerNorm gives NaN, but was given inf: what holds both began."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3, dtype=torch.float16)

        def forward(self, x):
            return self.norm(x + x)

    trace = traced(Chain(a=Step(lambda x: x.half().clamp(-1, 1) * 6e4), b=Residual()))
    assert trace.why().startswith("b (Residual) was the first whose output is not finite: it took states up to 60000 ")
    between = Step(lambda x: x.half() * 6e4)  # in the model's own forward, whose hooks the wrapper goes past
    assert traced(between).why().startswith("the model itself (Step) was the first ")


def test_a_module_that_runs_again():
    shared = Step(lambda x: x.half() * 256)
    trace = traced(Chain(a=shared, b=shared, never=Chain()), x=torch.ones(2, 5, 3))
    said = "a (Step) was the first, in its run 2 for this batch, whose output is not finite: it took states up to 256 "
    assert trace.why().startswith(said)


def test_a_module_that_writes_into_its_input():
    trace = traced(Chain(a=Step(lambda x: x.clone()), b=Step(lambda x: x.mul_(INF))))
    assert trace.why().startswith("b (Step) was the first whose output is not finite: it took states up to ")


def test_padding_and_masks_of_attention_begin_nothing():
    padding = Step(lambda x: x.masked_fill(~REAL[..., None], INF))
    scores = Step(lambda x: (x, torch.full((2, 4, 5, 5), -INF)))
    alike = Step(lambda x: (x[0], torch.full((2, 5, 5, 5), -INF)))  # as many heads as tokens
    back = Step(lambda given: given[0])
    trace = traced(Chain(a=padding, b=scores, c=alike, d=back, e=OVERFLOWS))
    assert trace.why().startswith("e (Step) was the first ")


def test_positions_are_every_texts():
    positions = nn.Embedding(5, 3)
    positions.weight.data[1, 2] = NAN
    inner = Chain(a=nn.Identity())
    inner.positions = positions
    inner.forward = lambda x: x + inner.positions(torch.arange(5)[None])
    assert (
        traced(inner).why().startswith("positions (Embedding) was the first whose output is not finite: it gave up to ")
    )
    assert traced(inner).why().endswith("; its parameter positions.weight[1, 2] is nan: no other dtype mends that")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [NAN, -INF])
def test_weights_that_are_not_finite_are_named(dtype, value):
    linear = nn.Linear(3, 3, dtype=dtype)
    linear.weight.data[2, 1] = value
    said = traced(Chain(a=Step(lambda x: x.to(dtype)), b=linear)).why()
    advice = f"its parameter b.weight[2, 1] is {value}: "
    if dtype == torch.float16 and value == -INF:
        assert f"{advice}if the file's is finite, load the model in bfloat16 or float32: " in said
    else:
        assert said.endswith(f"{advice}no other dtype mends that")


def test_weights_of_other_modules_are_no_cause():
    linear = nn.Linear(3, 3)
    linear.weight.data[0, 0] = NAN
    said = traced(Chain(a=Step(lambda x: x * 3e38 * 3e38), b=linear)).why()
    assert said.startswith("a (Step) was the first ")
    assert "parameter" not in said


def test_weights_are_named_as_in_the_checkpoint():
    """The wrapper calls its model's forward past hooks, and so is the one that began."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, NAN, 1.0]))

        def forward(self, x):
            return x * self.scale

    said = traced(Inner()).why()
    assert said.startswith("the model itself (Inner) was the first ")
    assert said.endswith("; its parameter scale[1] is nan: no other dtype mends that")


def test_a_wide_dtype_has_no_wider_one():
    said = traced(Chain(a=Step(lambda x: x * 3e38 * 3e38))).why()
    assert said.endswith("another dtype is unlikely to help, for bfloat16 and float32 have the same range")


def test_hooks_go_when_the_model_does_not_run():
    def fails(x):
        raise RuntimeError("no")

    model = Model(Chain(a=Step(fails)))
    with pytest.raises(ValueError, match="does not run"):
        embed.vectors(model, CONFIG, ["bb", "a"], lambda count: None, Trace(model.first))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.first.modules())


def test_the_cause_is_the_last_batchs():
    model = Model(Chain(a=OVERFLOWS, b=Step(lambda x: x.nan_to_num())))
    trace = Trace(model.first)
    batch = model.preprocess(["a", "b"])
    with trace.watch(batch):
        model[0](batch)
    assert trace.within is not None
    assert trace.within.name == "a"
    assert trace.why().startswith("a (Step) ")
    model.first.x = model.first.x * 0
    batch = model.preprocess(["a", "b"])
    with trace.watch(batch):
        model[0](batch)
    assert trace.why() == "no module was seen that was given finite states and gave others"
    assert trace.within.name == "a"


def test_within_is_the_first_batchs():
    a, b = Step(lambda x: x), Step(lambda x: x * INF)
    model = Model(Chain(a=a, b=b, c=Step(lambda x: x.nan_to_num())))
    trace = Trace(model.first)
    for earlier in (a.function, b.function):
        a.function = earlier
        batch = model.preprocess(["a", "b"])
        with trace.watch(batch):
            model[0](batch)
    assert trace.why().startswith("a (Step) ")
    assert trace.within is not None
    assert trace.within.name == "b"


def test_without_a_mask_nothing_is_watched():
    """Such a model has no states, which is another error."""
    model = Model(nn.Identity())
    model.preprocess = lambda texts, prompt=None: {"x": model.first.x}
    with pytest.raises(ValueError, match="must give attention_mask, got x, token_embeddings"):
        embed.vectors(model, CONFIG, ["a", "b"], lambda count: None, Trace(model.first))


# How large all got.


def test_layers_are_the_outermost_lists():
    class Parts(nn.Module):
        def __init__(self, *steps: nn.Module) -> None:
            super().__init__()
            self.unused = nn.ModuleList([nn.Identity()])
            self.parts = nn.ModuleList(steps)

        def forward(self, x):
            for step in self.parts:
                x = step(x)
            return x

    def layer(factor: float) -> Parts:
        return Parts(Step(lambda x: x * factor), Step(lambda x: x / factor))

    trace = traced(Chain(encoder=Parts(layer(10.0), layer(655.04), layer(2.0))), x=torch.ones(2, 5, 3))
    peaks = [(block.name, block.peak) for block in trace.blocks()]
    blocks = [(name, round(peak.largest, 2), peak.dtype) for name, peak in peaks if peak is not None]
    assert blocks == [(f"encoder.parts.{i}", x, "float32") for i, x in enumerate((10.0, 655.04, 2.0))]
    assert trace.largest is not None
    assert trace.largest.name == "encoder.parts.1.parts.0"
    assert trace.largest.of_float16 == pytest.approx(0.01)


def test_layer_1_is_not_layer_10():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList([Step(lambda x, i=i: x * 0 + 2.0**i) for i in range(12)])

        def forward(self, x):
            for layer in self.layer:
                x = layer(x)
            return x

    trace = traced(Layers(), x=torch.zeros(2, 5, 3))
    largest = [block.peak and block.peak.largest for block in trace.blocks()]
    assert largest == [2.0**i for i in range(12)]


def test_the_largest_counts_what_is_taken_and_every_run():
    shared = Step(lambda x: x / 2)
    inside = Step(lambda x: shared(x * 20))  # a product that no module gives
    inside.shared = shared
    trace = traced(Chain(a=inside, b=inside), x=torch.full((2, 5, 3), -3.0))
    assert (trace.largest.name, trace.largest.largest) == ("a.shared", 600.0)
    trace = traced(Chain(a=shared, b=shared), x=torch.full((2, 5, 3), -3.0))
    assert (trace.largest.name, trace.largest.largest) == ("a", 3.0)


# The command.


def _overflowing(model) -> None:
    model.encoder.layer[1].intermediate.dense.weight.data.normal_().mul_(2e4)


def _broken(model) -> None:
    model.encoder.layer[0].attention.self.query.weight.data[3, 4] = NAN


@needs_packages
def test_a_model_that_overflows(capsys, tmp_path):
    folder = str(tiny_bert(tmp_path, torch.float16, _overflowing))
    where = (
        r"fastpool doctor: states must be finite, got nan in float16: text '.*, token 0 '\[CLS\]' \(the first is 0\), "
    )
    for options, words in (
        ([], f"column 0; {HINT}"),
        (
            ["--trace"],
            r"column 0; encoder\.layer\.1\.intermediate\.dense \(Linear\) was the first .*load the model in ",
        ),
        (["--trace", "--json"], "column 0; encoder"),
    ):
        assert main(["doctor", folder, *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("fastpool doctor: ")]
        assert re.match(where + words, line), line


@needs_packages
def test_a_model_with_a_broken_weight(capsys, tmp_path):
    folder = str(tiny_bert(tmp_path, change=_broken))
    assert main(["doctor", folder, "--trace"]) == 2
    said = "its parameter encoder.layer.0.attention.self.query.weight[3, 4] is nan: no other dtype mends that\n"
    assert capsys.readouterr().err.endswith(said)


class Aside(nn.Module):
    """Hands its input on, and overflows beside."""

    def __init__(self):
        super().__init__()
        self.over = Step(lambda x: x * INF)

    def forward(self, x):
        self.over(x)
        return x


@needs_packages
def test_a_model_that_is_finite_again(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    load = embed.load

    def changed(folder, config):
        model = load(folder, config)
        model[0].auto_model.encoder.layer[1].output.dropout = Aside()
        return model

    monkeypatch.setattr(embed, "load", changed)
    folder = str(tiny_bert(tmp_path))
    assert main(["doctor", folder, "--trace"]) in (0, 1)
    words = " ".join(capsys.readouterr().out.split())
    gave = "Within, encoder.layer.1.output.dropout.over (Step) gave what is not finite, which later ones made finite"
    assert gave in words
    assert "overflow" not in words  # its values are small
    assert main(["doctor", folder, "--json", "--trace"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["trace"]["not_finite_within"] == "encoder.layer.1.output.dropout.over"


@pytest.mark.parametrize("largest", [65504.0, 65519.99, 65520.0])
def test_what_rounds_to_the_maximum_does_not_overflow(largest):
    overflows = torch.tensor(largest).half().isinf().item()
    told = report._about_trace(traced(nn.Identity(), x=torch.full((2, 5, 3), largest)))
    assert ("In float16 it would overflow." in told) == overflows == (largest == 65520)


@needs_packages
def test_a_finite_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = str(tiny_bert(tmp_path, change=_overflowing))  # float32: float16 would not do
    assert main(["doctor", folder, "--json", "--trace"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)["trace"]
    assert found["not_finite_within"] is None
    largest = found["largest"]
    assert (largest["name"], largest["dtype"]) == ("encoder.layer.1.intermediate.dense", "float32")
    assert largest["of_float16_maximum"] == pytest.approx(largest["largest"] / 65504)
    assert largest["of_float16_maximum"] > 1
    assert [block["name"] for block in found["blocks"]] == ["encoder.layer.0", "encoder.layer.1"]
    assert found["blocks"][1]["largest"] == largest["largest"] > found["blocks"][0]["largest"]

    assert main(["doctor", folder, "--trace"]) in (0, 1)
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "All final states are finite. The largest that a module took or gave was " in words
    assert " in float32, in encoder.layer.1.intermediate.dense: " in words
    assert "In float16 it would overflow." in words
    assert found["not_counted"] == []
    assert "not counted" not in words
    assert "Within" not in words
    assert any(line.startswith("encoder.layer.0 ") and line.endswith("%") for line in map(str.strip, out.splitlines()))

    assert main(["doctor", folder, "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["trace"] is None
