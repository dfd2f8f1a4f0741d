"""quantize, quantization_ranges and dequantize as functions and ops: errors, ranges, back again, compile and export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.quantize_cases import cases, expected, options, ranges_of, values
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpool
from fastpool.kinds import KINDS
from fastpool.testing import DTYPES, same_bits

X = torch.linspace(-1, 1, 24).view(3, 8)
RANGES = torch.tensor([[-1.0] * 8, [1.0] * 8])
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantize(x: Any = X, kind: Any = "int8", **more: Any) -> Tensor:
    return fastpool.quantize(x, kind, **more)


def with_ranges(ranges: Tensor, **more: Any) -> Callable[[], object]:
    return lambda: quantize(ranges=ranges, **more)


def changed(column: int, low: float, high: float) -> Tensor:
    ranges = RANGES.clone()
    ranges[:, column] = torch.tensor([low, high])
    return ranges


ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: quantize([1.0], "binary"), TypeError, "x must be a torch.Tensor, got list"),
    (lambda: quantize(X.int(), "binary"), TypeError, "x must be float16, .*, got int32"),
    (lambda: quantize(torch.tensor(1.0), "binary"), ValueError, r"x must have 1 to 64 dimensions, got 0"),
    (lambda: quantize(torch.ones([1] * 65), "binary"), ValueError, r"x must have 1 to 64 dimensions, got 65"),
    (
        lambda: quantize(X, "int4"),
        ValueError,
        "kind must be one of int8, uint8, binary, ubinary, int8_tanh, got 'int4'",
    ),
    (lambda: quantize(X, 0), TypeError, "kind must be a kind's name, got int"),
    (lambda: quantize(X, "binary", truncate_dim=9), ValueError, "truncate_dim must lie between 1 and .*, 8, got 9"),
    (lambda: quantize(X, "binary", truncate_dim=2.5), TypeError, "truncate_dim must be an int, got float"),
    (lambda: quantize(X, "binary", zero_bit=1), TypeError, "zero_bit must be a bool, got int"),
    (with_ranges(RANGES, zero_bit=True), ValueError, "zero_bit goes with binary and ubinary, got kind int8"),
    (lambda: quantize(X), ValueError, "int8 needs ranges.*batch at hand would be wrong: the same byte.*queries"),
    (lambda: quantize(X, "uint8"), ValueError, "uint8 needs ranges.*keep them with the index"),
    (with_ranges(RANGES, kind="binary"), ValueError, "ranges go with int8 and uint8, got kind binary"),
    (with_ranges(RANGES, kind="int8_tanh"), ValueError, "ranges go with int8 and uint8, got kind int8_tanh"),
    (with_ranges([1.0]), TypeError, "ranges must be a torch.Tensor, got list"),  # type: ignore[arg-type]  # on purpose
    (with_ranges(RANGES.double()), TypeError, "ranges must be float32, got float64"),
    (with_ranges(RANGES.to("meta")), ValueError, "ranges must be on x's device, cpu, got meta"),
    (with_ranges(RANGES[0]), ValueError, r"ranges must have shape \[2, 8\], got \[8\]"),
    (with_ranges(RANGES.T), ValueError, r"ranges must have shape \[2, 8\], got \[8, 2\]"),
    (with_ranges(RANGES[:, :7]), ValueError, r"ranges must have shape \[2, 8\], got \[2, 7\]"),
    (with_ranges(RANGES[:, :4], truncate_dim=5), ValueError, r"shape \[2, 8\] or \[2, 5\], got \[2, 4\]"),
    (with_ranges(changed(3, torch.nan, 1.0)), ValueError, "finite minimum and a maximum.*got nan and 1.0 in column 3"),
    (with_ranges(changed(7, -1.0, torch.inf)), ValueError, "got -1.0 and inf in column 7"),
    (with_ranges(changed(0, 0.5, 0.25)), ValueError, "got 0.5 and 0.25 in column 0"),
    (with_ranges(changed(1, -2.5e38, 2.5e38)), ValueError, "difference must be finite, got .* in column 1"),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("call", "error", "words"), ERRORS, ids=range(len(ERRORS)))
def test_errors(call: Callable[[], object], error: type[Exception], words: str, backend: str) -> None:
    with fastpool.backend(backend), pytest.raises(error, match=words) as caught:
        call()
    assert str(caught.value).startswith("fastpool.quantize: ")


def test_errors_of_arguments_that_there_are_not() -> None:
    with pytest.raises(TypeError, match=r"fastpool\.quantize has no dim: .*write truncate_dim"):
        quantize(dim=2)
    with pytest.raises(TypeError, match=r"fastpool\.quantize\(\) got an unexpected keyword argument 'precision'"):
        quantize(precision="int8")


@pytest.mark.parametrize("code", [-1, 5, 2**40])
def test_errors_of_the_op(code: int) -> None:
    for backend in ("native", "reference"):
        with fastpool.backend(backend), pytest.raises(ValueError, match=f"place in KINDS, from 0 to 4, got {code}"):
            torch.ops.fastpool.quantize(X, code)


def test_columns_of_ranges_that_are_not_used_may_be_anything() -> None:
    ranges = changed(5, torch.nan, torch.nan)
    whole = quantize(X[:, :5], ranges=RANGES[:, :5])
    assert torch.equal(quantize(X, ranges=ranges, truncate_dim=5), whole)


def test_memory_that_was_freed() -> None:
    for name in ("x", "ranges"):
        given = {"x": X.clone(), "ranges": RANGES.clone()}
        given[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} must have memory for its elements"):
            quantize(**given)


def test_memory_that_was_freed_beside_the_op() -> None:
    ranges, bytes_, bits = torch.tensor([[0.0] * 4, [1.0] * 4]), torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 4)
    calls: list[tuple[str, torch.Tensor, Callable[[torch.Tensor], object]]] = [
        ("x", bits, fastpool.quantization_ranges),
        ("q", bytes_, lambda q: fastpool.dequantize(q, "int8_tanh")),
        ("q", bytes_, lambda q: fastpool.dequantize(q, "binary")),
        ("q", bytes_, lambda q: fastpool.dequantize(q, "int8", ranges=ranges)),
        ("ranges", ranges, lambda r: fastpool.dequantize(bytes_, "int8", ranges=r)),
        ("x", bits, fastpool.sparse_csr),
    ]
    for name, tensor, call in calls:
        freed = tensor.clone()
        freed.untyped_storage().resize_(4)
        with pytest.raises(ValueError, match=f"{name} must have memory for its elements"):
            call(freed)


def test_buckets_too_narrow_for_a_width() -> None:
    """Values that are all but alike come back as they are."""
    ranges = torch.tensor([[0.0], [1e-44]])
    q = fastpool.quantize(torch.tensor([[1e-44]]), "uint8", ranges=ranges)
    assert fastpool.dequantize(q, "uint8", ranges=ranges).tolist() == [[0.0]]


def test_what_comes_back_in_another_dtype() -> None:
    ranges = torch.tensor([[0.1], [0.7]])
    q = torch.tensor([[3]], dtype=torch.uint8)
    exact = 0.1 + 3.5 * (0.7 - 0.1) / 255
    assert abs(fastpool.dequantize(q, "uint8", ranges=ranges, dtype=torch.float64).item() - exact) < 1e-7
    for kind in ("ubinary", "int8_tanh"):
        for dtype in (torch.float64, torch.bfloat16):
            signs = q if kind == "ubinary" else q.view(torch.int8)
            assert fastpool.dequantize(signs, kind, dtype=dtype).dtype == dtype


def test_validation_names_what_is_not_finite() -> None:
    x = torch.zeros(2, 3, 8)
    x[1, 2, 5] = torch.nan
    assert quantize(x, ranges=RANGES)[1, 2, 5] == 0
    fastpool.validate()
    with pytest.raises(ValueError, match=r"fastpool\.quantize: x must be finite, got x\[1, 2, 5\] = nan"):
        quantize(x, "ubinary")
    quantize(x, "ubinary", truncate_dim=5)


def test_flags_and_numbers_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    packed = quantize(X, "binary", truncate_dim=np.int64(4), zero_bit=np.True_)
    assert torch.equal(packed, quantize(X, "binary", truncate_dim=4, zero_bit=True))


# ---- ranges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranges(dtype: torch.dtype) -> None:
    x = torch.randn(4, 50, 33, dtype=torch.float64).to(dtype)
    flat = x.reshape(-1, 33).double()
    expected = torch.stack([flat.min(0).values, flat.max(0).values]).float()
    for view in (x, x.transpose(0, 1), x.requires_grad_()):
        ranges = fastpool.quantization_ranges(view)
        assert same_bits(ranges, expected)
        assert not ranges.requires_grad
    parts = [fastpool.quantization_ranges(part) for part in x.flatten(0, 1).split(17)]
    assert same_bits(fastpool.quantization_ranges(torch.cat(parts)), expected)
    assert same_bits(fastpool.quantization_ranges(x[0, 0]), x[0, 0].detach().float().expand(2, -1))
    assert fastpool.quantization_ranges(x[..., :0]).shape == (2, 0)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int8), TypeError, "x must be float16, .*, got int8"),
        (torch.tensor(1.0), ValueError, r"x must have at least one dimension, got shape \[\]"),
        (torch.ones(0, 3), ValueError, r"x must have at least one row, got shape \[0, 3\]"),
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), ValueError, r"x must be finite, got x\[1, 1\] = nan"),
        (torch.tensor([[[1.0, 2.0], [-torch.inf, 2.0]]]), ValueError, r"x must be finite, got x\[0, 1, 0\] = -inf"),
        (torch.tensor([[1e300], [0.0]], dtype=torch.float64), ValueError, "must fit float32, and do not"),
        (torch.tensor([[3e38], [-3e38]]), ValueError, "must fit float32, and do not"),
    ],
    ids=range(8),
)
def test_errors_of_ranges(x: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^fastpool\.quantization_ranges: .*{words}"):
        fastpool.quantization_ranges(x)


# ---- back again


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_buckets_and_back(kind: str) -> None:
    """Half a bucket off at most within the ranges; a constant column is itself."""
    x = torch.randn(200, 40)
    x[:, 3] = 0.7
    ranges = fastpool.quantization_ranges(x)
    back = fastpool.dequantize(fastpool.quantize(x, kind, ranges=ranges), kind, ranges=ranges)
    assert back.dtype == torch.float32
    half = (ranges[1] - ranges[0]) / 255 / 2
    assert ((back - x).abs() <= half * 1.001 + 1e-6).all()
    assert (back[:, 3] == x[:, 3]).all()
    again = fastpool.quantize(back, kind, ranges=ranges)
    assert torch.equal(again, fastpool.quantize(x, kind, ranges=ranges))


@pytest.mark.parametrize("kind", ["binary", "ubinary"])
@pytest.mark.parametrize("width", [1, 8, 13, 64])
def test_bits_and_back(kind: str, width: int) -> None:
    x = torch.randn(5, 3, width)
    packed = fastpool.quantize(x, kind)
    assert torch.equal(fastpool.dequantize(packed, kind, columns=width), torch.where(x > 0, 1.0, -1.0))
    assert fastpool.dequantize(packed, kind).shape == (5, 3, 8 * packed.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tanh_and_back(dtype: torch.dtype) -> None:
    x = torch.randn(50, 9, dtype=torch.float64)
    back = fastpool.dequantize(fastpool.quantize(x, "int8_tanh"), "int8_tanh", dtype=dtype)
    assert back.dtype == dtype
    assert ((back - x.tanh()).abs() <= 0.5 / 127 + torch.finfo(dtype).eps).all()


Q = torch.zeros(2, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("q", "kind", "more", "error", "words"),
    [
        ([1], "int8", {}, TypeError, "q must be a torch.Tensor, got list"),
        (Q, "uint8", {}, TypeError, "q of uint8 must be uint8, got int8"),
        (Q, "float", {}, ValueError, "kind must be one of int8, .*, got 'float'"),
        (Q[0, 0], "binary", {}, ValueError, "q must have at least one dimension"),
        (Q, "int8", {}, ValueError, "int8 needs its ranges"),
        (Q, "binary", {"ranges": torch.zeros(2, 3)}, ValueError, "binary takes no ranges"),
        (
            Q,
            "int8",
            {"ranges": torch.zeros(2, 4)},
            ValueError,
            r"ranges must be float32 \[2, 3\] .*got float32 \[2, 4\]",
        ),
        (Q, "int8", {"ranges": torch.zeros(2, 3).half()}, ValueError, r"ranges must be float32 .*got float16"),
        (Q, "int8_tanh", {"columns": 3}, ValueError, "columns goes with binary and ubinary, got kind int8_tanh"),
        (Q, "binary", {"columns": 16}, ValueError, "columns must lie between 17 and 24, got 16"),
        (Q, "binary", {"columns": 25}, ValueError, "columns must lie between 17 and 24, got 25"),
        (Q, "binary", {"dtype": torch.int8}, TypeError, "dtype must be .*, got int8"),
    ],
    ids=range(12),
)
def test_errors_of_dequantize(q: Any, kind: str, more: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^fastpool\.dequantize: .*{words}"):
        fastpool.dequantize(q, kind, **more)


# ---- what torch knows


@every_kind
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(kind: str, backend: str) -> None:
    with fastpool.backend(backend):
        for x, _, more in list(cases(kind, torch.float32))[::3]:
            for recorded in (False, True):
                x = x.nan_to_num(1.0).requires_grad_(recorded)
                torch.library.opcheck(torch.ops.fastpool.quantize.default, (x, list(KINDS).index(kind)), more)
                x = x.detach()


@every_kind
def test_not_differentiable(kind: str) -> None:
    for more in options(kind, ranges_of(9)):
        result = fastpool.quantize(torch.ones(2, 9, requires_grad=True), kind, **more)
        assert not result.requires_grad


@every_kind
def test_fakes_and_meta(kind: str) -> None:
    shape = (3, 2, KINDS[kind].out_columns(13))
    for more in options(kind, ranges_of(20)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = fastpool.quantize(torch.empty(3, 2, 20), kind, truncate_dim=13, **more)
        moved = {name: one.to("meta") if name == "ranges" else one for name, one in more.items()}
        meta = fastpool.quantize(torch.empty(3, 2, 20, device="meta"), kind, truncate_dim=13, **moved)
        for result in (fake, meta):
            assert (result.shape, result.dtype, result.is_contiguous()) == (shape, KINDS[kind].dtype, True)


class Model(torch.nn.Module):
    """Quantises what it has pooled."""

    def __init__(self, kind: str, more: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.more = kind, more

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return fastpool.quantize(fastpool.mean(hidden, mask), self.kind, truncate_dim=13, **self.more)


@every_kind
def test_whole_graphs(kind: str) -> None:
    """Compiled once for all numbers of rows, and exported."""
    hidden, mask = torch.randn(4, 9, 20), torch.rand(4, 9) > 0.3
    for more in options(kind, ranges_of(20)):
        torch._dynamo.reset()
        model, counter = Model(kind, more), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        for rows in (4, 2, 3):
            given = hidden[:rows].clone(), mask[:rows].clone()
            assert torch.equal(compiled(*given), model(*given))
        assert counter.frame_count == 1
        batch = torch.export.Dim("batch", min=1)
        exported = torch.export.export(model, (hidden, mask), dynamic_shapes=({0: batch}, {0: batch}))
        assert torch.equal(exported.module()(hidden[:2], mask[:2]), model(hidden[:2], mask[:2]))


@every_kind
def test_transforms(kind: str) -> None:
    x = values(12, 33, torch.float32).view(3, 4, 33)
    for more in options(kind, ranges_of(33)):
        mapped = torch.func.vmap(lambda y, more=more: fastpool.quantize(y, kind, **more))(x)
        assert torch.equal(mapped, expected((x, kind, more)))
