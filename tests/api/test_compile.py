"""torch.compile, torch.export and AOTInductor: whole graphs, any shape, no copies, the same bits."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import fastpool
from fastpool.backends.native import LIBRARY
from fastpool.modes import MODES
from fastpool.testing import LAYOUTS, function_of, same_bits, sequences, taking_turns

HOST = Path(__file__).parents[1] / "cpp" / "aoti_host.cpp"


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "given", "layout", "recorded"),
    taking_turns(True, False, layouts=[name for name in LAYOUTS if name != "nested"]),
)
def test_whole_graph_and_its_gradient(mode: str, given: str | None, layout: str, recorded: bool) -> None:
    pool = function_of(mode)
    arguments = LAYOUTS[layout].make(sequences([3, 0, 40], 12, torch.float32), given)
    hidden = arguments.pop("hidden")
    compiled = torch.compile(
        lambda x: pool(x * 2, truncate_dim=6, normalize=True, **arguments), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda x: pool(x * 2, truncate_dim=6, normalize=True, **arguments)):
        x = hidden.clone().requires_grad_(recorded)
        result = function(x)
        results.append(result.detach())
        if recorded:
            result.pow(2)[:, :3].sum().backward()
            assert x.grad is not None
            results.append(x.grad)
    half = len(results) // 2
    assert all(same_bits(a, b) for a, b in zip(results[:half], results[half:], strict=True))


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12)])
def test_whole_graph_and_the_gradient_of_a_query(shape: tuple[int, ...]) -> None:
    """What a module learns; a scale that is computed."""
    hidden, mask = torch.randn(2, 40, 12), torch.rand(2, 40) > 0.3
    compiled = torch.compile(
        lambda q: fastpool.attention(hidden, q * 2, mask, scale=q.shape[-1] ** -0.5, normalize=True),
        fullgraph=True,
        backend="aot_eager",
    )
    found = []
    for function in (compiled, lambda q: fastpool.attention(hidden, q * 2, mask, scale=12**-0.5, normalize=True)):
        query = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
        result = function(query)
        found.append((result.detach(), *torch.autograd.grad(result.pow(3).sum(), query)))
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_whole_graph_of_dims_and_its_gradient() -> None:
    compiled = torch.compile(
        lambda x, truncate_dims: fastpool.l2_normalize(x * 2, truncate_dim=9, truncate_dims=truncate_dims),
        fullgraph=True,
        backend="aot_eager",
    )
    x, truncate_dims = torch.randn(4, 12), torch.tensor([9, 0, 3, 1])
    results = []
    for function in (
        compiled,
        lambda x, truncate_dims: fastpool.l2_normalize(x * 2, truncate_dim=9, truncate_dims=truncate_dims),
    ):
        leaf = x.clone().requires_grad_()
        result = function(leaf, truncate_dims)
        result.pow(3).sum().backward()
        assert leaf.grad is not None
        results.append((function(x, truncate_dims), result.detach(), leaf.grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_inductor_compiles_once_for_all_shapes() -> None:
    linear = torch.nn.Linear(8, 8)
    counter = CompileCounterWithBackend("inductor")

    def model(x: Tensor, mask: Tensor) -> Tensor:
        return fastpool.mean(linear(x), mask, truncate_dim=5, normalize=True)

    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch, rows in ((2, 3), (5, 7), (4, 90), (64, 2)):
        x, mask = torch.randn(batch, rows, 8), torch.rand(batch, rows) > 0.3
        for recorded in (True, False):
            gradients = []
            for function in (compiled, model):
                linear.zero_grad()
                with torch.set_grad_enabled(recorded):
                    result = function(x, mask)
                if recorded:
                    result.pow(2)[:, :2].sum().backward()
                    gradients.append(linear.weight.grad)
            assert all(torch.allclose(gradient, gradients[0]) for gradient in gradients)
    assert counter.frame_count == 2  # with gradients, and without


def test_inductor_copies_nothing() -> None:
    """A view goes to the op as it is: nothing is computed in between."""
    hidden, mask = torch.randn(4, 9, 2, 16), torch.rand(4, 9) > 0.3
    compiled = torch.compile(lambda x, m: fastpool.mean(x[:, 1:, 1], m[:, 1:], normalize=True), fullgraph=True)
    result, (code,) = run_and_get_code(compiled, hidden, mask)
    assert same_bits(result, fastpool.mean(hidden[:, 1:, 1], mask[:, 1:], normalize=True))
    assert "torch.ops.fastpool.mean.default(reinterpret_tensor(" in code
    assert "cpp_fused" not in code
    assert "copy_" not in code


class Model(torch.nn.Module):
    """All modes, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("query", torch.arange(32.0).view(2, 16) / 32)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        pooled = []
        for mode, taken in MODES.items():
            own = {"scores": hidden[..., 0]} if taken.takes_scores else {}
            own |= {"query": self.query, "scale": 0.5} if taken.takes_query else {}
            pooled.append(function_of(mode)(hidden + 1, mask=mask, truncate_dim=7, normalize=True, **own))
        return torch.cat([one.flatten(1) for one in pooled], 1)


def exported() -> torch.export.ExportedProgram:
    hidden, mask = torch.randn(3, 50, 16), torch.ones(3, 50, dtype=torch.bool)
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    with torch.no_grad():
        return torch.export.export(
            Model(), (hidden, mask), dynamic_shapes={"hidden": {0: batch, 1: rows}, "mask": {0: batch, 1: rows}}
        )


def batch_and_result(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Another shape than the exported one."""
    hidden, mask = torch.randn(5, 33, 16), torch.rand(5, 33) > 0.3
    torch.save((hidden, mask), folder / "batch.pt")
    return hidden, mask, Model()(hidden, mask)


def test_export_in_another_process(tmp_path: Path) -> None:
    torch.export.save(exported(), tmp_path / "model.pt2")
    *_, expected = batch_and_result(tmp_path)
    code = """
        import sys, torch, fastpool
        model = torch.export.load(sys.argv[1] + "/model.pt2").module()
        torch.save(model(*torch.load(sys.argv[1] + "/batch.pt")), sys.argv[1] + "/result.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)
    assert same_bits(torch.load(tmp_path / "result.pt"), expected)


def test_aot_inductor_from_python_and_from_cpp(tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "model.pt2"))
    hidden, mask, expected = batch_and_result(tmp_path)
    assert same_bits(torch._inductor.aoti_load_package(package)(hidden, mask), expected)

    host, torch_folder = tmp_path / "host", Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    options = ["-std=c++20", "-O0", f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}"]
    options += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", f"-Wl,-rpath,{lib}"]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run(["c++", str(HOST), *options, *libraries, "-o", str(host)], check=True)
    files = [tmp_path / name for name in ("hidden", "mask", "result")]
    for tensor, file in zip((hidden, mask), files, strict=False):
        file.write_bytes(tensor.numpy().tobytes())
    arguments = [package, LIBRARY.with_name("libfastpool_schemas.so"), *map(str, hidden.shape), *files]
    subprocess.run([host, *arguments], check=True)
    result = torch.frombuffer(bytearray(files[2].read_bytes()), dtype=torch.float32).view_as(expected)
    assert same_bits(result, expected)


def test_schemas_without_python_are_the_same() -> None:
    public = [*MODES, "l2_normalize", "quantize", "tokens"]
    code = f"""
        import torch
        torch.ops.load_library({str(LIBRARY.with_name("libfastpool_schemas.so"))!r})
        for op in {public!r}:
            print(getattr(torch.ops.fastpool, op).default._schema)
        print(torch.ops.fastpool.mean(torch.ones(1, 2, 3)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *schemas, result = done.stdout.splitlines()
    assert schemas == [str(getattr(torch.ops.fastpool, op).default._schema) for op in public]
    assert result == "tensor([[1., 1., 1.]])"
