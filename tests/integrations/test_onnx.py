"""torch.onnx.export(dynamo=True) with fastpool's table, run by onnxruntime on batches other than the exported."""

import doctest
import functools
import importlib
import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.arguments import OPS
from fastpool.modes import MODES
from fastpool.testing import DTYPES, EPS, LAYOUTS, error, every_norm, function_of, required, sequences, variants

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import fastpool.onnx  # which needs them

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
EXPORTED, RUN = [3, 9], [7, 0, 1, 33, 300]  # lengths
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"normalize": True},
    {"truncate_dim": 5},
    {"truncate_dim": 7, "normalize": True},
)


class Calls(torch.nn.Module):
    """Several results of the same arguments."""

    def __init__(self, *functions: Callable[..., Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        lengths: Tensor | None = None,
        truncate_dims: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        given = {name: value for name, value in locals().items() if isinstance(value, Tensor)}
        return tuple(function(**given) for function in self.functions)


def export(*functions: Callable[..., Tensor], columns: bool = False, **arguments: Tensor) -> Callable[..., Any]:
    """The functions as onnxruntime computes them; all axes are dynamic, hidden's columns where asked."""
    axes = {name: dict.fromkeys(range(value.dim()), torch.export.Dim.DYNAMIC) for name, value in arguments.items()}
    if not columns:
        del axes["hidden"][arguments["hidden"].dim() - 1]
    shapes = {name: axes.get(name) for name in ("hidden", *arguments)}
    program = to_onnx(Calls(*functions), kwargs=arguments, dynamic_shapes=shapes)

    def run(**values: Tensor) -> tuple[Tensor, ...]:
        return tuple(program(*(values[one.name] for one in program.model.graph.inputs)))

    return run


def to_onnx(model: torch.nn.Module, *args: Any, **more: Any) -> Any:
    table = fastpool.onnx.translation_table()
    return torch.onnx.export(model.eval(), *args, custom_translation_table=table, verbose=False, **more)


# Those that have a translation.
EXPORTABLE = [mode for mode in MODES if not MODES[mode].softmax]


def pool_of(i: int, mode: str, given: str | None) -> Callable[..., Tensor]:
    def pool(weights: Tensor | None = None, **arguments: Any) -> Tensor:
        own = {"weights": weights} if given else {}
        result: Tensor = function_of(mode)(**arguments, **own, **OPTIONS[i % len(OPTIONS)])
        return result

    return pool


def no_segments(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Nothing of padded input; of packed, all rows, and no text among them."""
    cut = {"cu_seqlens": 1, "starts": 0, "ends": 0}
    if arguments["hidden"].dim() == 3:
        cut = dict.fromkeys(arguments, 0)
    return {name: value[: cut.get(name)] for name, value in arguments.items()}


def in_float64(function: Callable[..., Tensor], **arguments: Tensor) -> Tensor:
    """fastpool's own result, of the same values in float64."""
    return function(**{**arguments, "hidden": arguments["hidden"].double()})


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (result.shape, result.dtype) == (expected.shape, dtype)
    assert torch.equal(result.isnan(), expected.isnan())
    # Infinities and zeros are those of the other, and the rest is as close as its own backends must be.
    settled = expected.isnan() | expected.isinf() | (expected == 0)
    assert torch.equal(result[settled].double().nan_to_num(), expected[settled].double().nan_to_num())
    for row, wanted, known in zip(result, expected, settled, strict=True):
        assert error(row.masked_fill(known, 0), wanted.masked_fill(known, 0)) <= 1


def test_every_op_has_its_translation() -> None:
    public = {getattr(torch.ops.fastpool, op).default for op in OPS if not op.startswith("_")}
    assert set(fastpool.onnx.translation_table()) == public


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in EXPORTABLE])
def test_what_has_none_says_so(mode: str) -> None:
    hidden = torch.rand(2, 3, 4)
    model = Calls(functools.partial(function_of(mode), **required(mode, hidden.shape)))
    with pytest.raises(Exception, match=f"fastpool.onnx: {mode} has no translation; fastpool.weighted_mean has one"):
        to_onnx(model, kwargs={"hidden": hidden})


def test_quantize_has_none() -> None:
    with pytest.raises(Exception, match=r"fastpool\.onnx: quantize has no translation; export the embeddings"):
        to_onnx(Calls(lambda hidden: fastpool.quantize(hidden, "binary")), kwargs={"hidden": torch.rand(3, 16)})


def test_the_docstring() -> None:
    hidden, mask = torch.rand(2, 3, 4), torch.ones(2, 3)
    globs = {"torch": torch, "fastpool": fastpool, "hidden": hidden, "mask": mask.bool()}
    (example,) = doctest.DocTestFinder().find(fastpool.onnx.translation_table, globs=globs)
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    (result,) = example.globs["program"](hidden[:1, :2], mask.bool()[:1, :2])
    assert_close(result, fastpool.mean(hidden[:1, :2], normalize=True).double(), torch.float32)


# Each layout in one dtype, for exports are slow: what a dtype changes does not depend on the layout.
CASES = list(zip((name for name in LAYOUTS if name != "nested"), itertools.cycle(DTYPES), strict=False))


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=[f"{layout}-{dtype}" for layout, dtype in CASES])
def test_every_mode(layout: str, dtype: torch.dtype) -> None:
    """NaN stands wherever no real token is."""
    make, holes = LAYOUTS[layout].make, LAYOUTS[layout].holes
    exportable = [variant for variant in variants() if variant[0] in EXPORTABLE]
    functions = [pool_of(i + len(layout), *variant) for i, variant in enumerate(exportable)]
    run = export(*functions, **make(sequences(EXPORTED, 12, dtype, holes), "weights"))
    arguments = make(sequences(RUN, 12, dtype, holes, seed=1), "weights")
    for function, result in zip(functions, run(**arguments), strict=True):
        assert_close(result, in_float64(function, **arguments).double(), dtype)
        assert result.count_nonzero() > 0
    for result in run(**no_segments(arguments)):
        assert result.shape in ((0, 5), (0, 7), (0, 12))
    if layout == "packed":
        whole = {name: value.nan_to_num(0.5) for name, value in arguments.items()}
        cu, rows = arguments["cu_seqlens"], len(arguments["hidden"])
        clamped = {"cu_seqlens": cu.new_tensor([0, 90, rows])}
        same_result(functions, run, whole, {"cu_seqlens": cu.new_tensor([-2, 90, rows + 9])}, clamped)
        same_result(functions, run, arguments, {"cu_seqlens": cu.new_tensor([2, 2, 2])})
    if layout == "padded_left_mask":
        same_result(functions, run, arguments, {"mask": arguments["mask"] * 2}, {"mask": arguments["mask"]})


def same_result(
    functions: list[Callable[..., Tensor]],
    run: Callable[..., Any],
    arguments: dict[str, Tensor],
    values: dict[str, Tensor],
    taken_as: dict[str, Tensor] | None = None,
) -> None:
    """With values that fastpool may refuse, onnxruntime gives what fastpool does with those they are taken as."""
    like = values if taken_as is None else taken_as
    for function, result in zip(functions, run(**{**arguments, **values}), strict=True):
        assert_close(result, in_float64(function, **{**arguments, **like}).double(), arguments["hidden"].dtype)


def test_values_at_the_edges() -> None:
    """NaN and infinities in real tokens, weights that add up to nothing, a norm too large to square."""

    def out_dtype(hidden: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.fastpool.mean(hidden, mask, out_dtype=torch.bfloat16)

    def of_weights(hidden: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        return fastpool.weighted_mean(hidden, mask, weights=weights, normalize=True)

    def of_all(hidden: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        return fastpool.sum(hidden)

    def side_by_side(hidden: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        return fastpool.nn.Pooling(("max", "weighted_mean"), normalize=True)(hidden, mask, None, weights)

    modes = [pool_of(0, mode, None) for mode in EXPORTABLE]
    functions = [out_dtype, of_weights, of_all, side_by_side, *modes]
    run = export(
        *functions, columns=True, hidden=torch.rand(2, 3, 9), mask=torch.ones(2, 3).bool(), weights=torch.rand(2, 3)
    )
    hidden = torch.randn(6, 40, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 40, dtype=torch.bool)
    weights = torch.ones(6, 40)
    hidden[0, 3, 1] = hidden[0, 0, 2] = hidden[0, -1, 3] = torch.nan
    hidden[1, 3, 1], hidden[1, :, 2], hidden[1, 4, 3] = torch.inf, -torch.inf, -torch.inf
    mask[2], weights[3] = False, torch.tensor([1.0, -1.0] * 20)
    hidden[4] *= 1e30
    mask[5, ::3] = mask[5, :2] = False
    hidden[~mask] = torch.nan
    for function, result in zip(functions, run(hidden=hidden, mask=mask, weights=weights), strict=True):
        expected = function(hidden=hidden, mask=mask, weights=weights)
        assert_close(result, expected.double(), expected.dtype)


def test_l2_normalize() -> None:
    def plain(hidden: Tensor, truncate_dims: Tensor) -> Tensor:
        return fastpool.l2_normalize(hidden, eps=0.5)

    def of_sizes(hidden: Tensor, truncate_dims: Tensor) -> Tensor:
        return fastpool.l2_normalize(hidden, truncate_dim=6, truncate_dims=truncate_dims, out_dtype=torch.float32)

    def module(hidden: Tensor, truncate_dims: Tensor) -> Tensor:
        return fastpool.nn.Normalize(truncate_dim=3)(hidden)

    functions = [plain, of_sizes, module]
    sizes = torch.zeros(2, 3, dtype=torch.int32)
    run = export(*functions, hidden=torch.rand(2, 3, 8, dtype=torch.float16), truncate_dims=sizes)
    hidden = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).half()
    sizes = torch.arange(20, dtype=torch.int32).view(4, 5) % 7
    hidden[0, 0], hidden[0, 1] = 0, 0.01
    hidden[1, 1, 6:] = hidden[0, 3, 3:] = torch.nan
    for function, result in zip(functions, run(hidden=hidden, truncate_dims=sizes), strict=True):
        expected = function(hidden, sizes)
        wanted = in_float64(function, hidden=hidden, truncate_dims=sizes).double()
        assert_close(result.flatten(0, 1), wanted.flatten(0, 1), expected.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_of_any_size(dtype: torch.dtype) -> None:
    """Squares overflow or underflow; a vector of zeros over an eps of 0 is NaN."""
    functions = [functools.partial(fastpool.l2_normalize, eps=eps) for eps in EPS]
    run = export(*(lambda hidden, of=of: of(hidden) for of in functions), hidden=torch.rand(2, 3, 20, dtype=dtype))
    hidden = every_norm(dtype)[:, None]
    close = {"rtol": 1e-6, "atol": 1e-44} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 0.0}
    for of, result in zip(functions, run(hidden=hidden), strict=True):
        torch.testing.assert_close(result, of(hidden), **close, equal_nan=True)


def test_packed_input_without_a_row() -> None:
    """Texts there are, and each is empty."""
    modes = [mode for mode in EXPORTABLE if mode not in ("cls", "last")]  # which the runtime refuses
    functions = [function_of(mode) for mode in modes]
    run = export(*functions, hidden=torch.rand(5, 4), cu_seqlens=torch.tensor([0, 2, 5]))
    for result in run(hidden=torch.rand(0, 4), cu_seqlens=torch.tensor([0, 0, 0, 0])):
        assert torch.equal(result, torch.zeros(3, 4))


def test_long_texts_are_added_as_exactly() -> None:
    """100,000 equal tokens, which added one after another are wrong in the fourth digit."""
    run = export(fastpool.mean, hidden=torch.rand(2, 3, 4))
    assert error(run(hidden=torch.full((1, 100_000, 4), 0.1))[0], torch.full((1, 4), 0.1).double()) <= 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of no sense, with a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_the_page(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example as it stands there, but for the model's folder."""
    monkeypatch.chdir(tmp_path)
    blocks = PAGE.read_text().split("```python\n")[1:]
    names: dict[str, Any] = {}
    for code in [block.partition("```")[0] for block in blocks][:2]:
        exec(code.replace('"path/of/all-MiniLM-L6-v2"', repr(str(encoder))), names)
    tokens = {name: torch.from_numpy(names["tokens"][name]) for name in ("input_ids", "attention_mask")}
    assert tokens["input_ids"].shape != names["example"]["input_ids"].shape
    with torch.inference_mode():
        expected = names["model"](**tokens)
    torch.testing.assert_close(torch.from_numpy(names["embeddings"]), expected, rtol=1e-5, atol=1e-6)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("imported", ["before", "after"])
def test_the_torchscript_exporter_says_where_to_turn(imported: str) -> None:
    """Whether torch.onnx was imported before fastpool or after, which does not import it."""
    said = run_python(
        f"""
        import sys, torch
        if {imported == "before"}:
            import torch.onnx
        import fastpool
        assert ("torch.onnx" in sys.modules) == {imported == "before"}
        import torch.onnx
        # Nothing of it is left: not in the way of other imports, and not in the module.
        assert not any(type(finder).__module__.startswith("fastpool.torch") for finder in sys.meta_path)
        assert type(torch.onnx.__spec__.loader).__module__ == type(torch.__spec__.loader).__module__
        last = torch.nn.Module()
        last.forward = lambda hidden, mask: fastpool.last(hidden, mask)
        for module, *given in ((last, torch.ones(2, 3, 4), torch.ones(2, 3).bool()),
                               (fastpool.nn.Normalize(), torch.ones(3, 4))):
            try:
                torch.onnx.export(module, tuple(given), "unused.onnx", dynamo=False)
            except torch.onnx.OnnxExporterError as error:
                print("said:", error)
        """
    )
    for op in ("last", "l2_normalize"):
        assert f"said: fastpool.{op}: the TorchScript exporter, torch.onnx.export(dynamo=False)" in said
    assert "dynamo=True, custom_translation_table=fastpool.onnx.translation_table())" in said


def test_without_the_table() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function found for .*fastpool\.l2_normalize"):
        torch.onnx.export(fastpool.nn.Normalize().eval(), (torch.ones(3, 4),), verbose=False)


def test_missing_packages_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "fastpool.onnx")
    with pytest.raises(
        ImportError, match=r'fastpool.onnx needs onnx and onnxscript .*: pip install "fastpool\[onnx\]"'
    ):
        importlib.import_module("fastpool.onnx")
