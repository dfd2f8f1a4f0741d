"""The error table: every wrong call, with the words it gets, from functions and raw ops, on every backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fastpool
from fastpool.arguments import GRADIENTS_OF, codes
from fastpool.calls import PoolCall
from fastpool.modes import MODES
from fastpool.testing import backward_arguments, cpu_backends, function_of, required

HIDDEN = torch.randn(2, 5, 8)
PACKED = torch.randn(10, 8)
MASK = torch.ones(2, 5, dtype=torch.bool)
CU = torch.tensor([0, 4, 10])


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values)


# name, arguments, error, words
TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("integer hidden", {"hidden": HIDDEN.long()}, TypeError, "hidden must be float16, bfloat16, float32 or float64, got int64"),
    ("one dimension", {"hidden": HIDDEN[0, 0]}, ValueError, r"hidden must be padded \[B, S, H\] or packed \[T, H\], got shape \[8\]"),
    ("four dimensions", {"hidden": HIDDEN[None]}, ValueError, r"got shape \[1, 2, 5, 8\]"),
    ("truncate_dim 0", {"hidden": HIDDEN, "truncate_dim": 0}, ValueError, "truncate_dim must lie between 1 and the last dimension, 8, got 0"),
    ("truncate_dim negative", {"hidden": HIDDEN, "truncate_dim": -1}, ValueError, "8, got -1"),
    ("truncate_dim too large", {"hidden": HIDDEN, "truncate_dim": 9}, ValueError, "8, got 9"),
    ("integer out_dtype", {"hidden": HIDDEN, "out_dtype": torch.int32}, TypeError, "out_dtype must be float16, .*, got int32"),
    ("float mask", {"hidden": HIDDEN, "mask": MASK.float()}, TypeError, r"mask must be bool or an integer type .*, got float32; an additive mask \(0 / -inf\)"),
    ("complex mask", {"hidden": HIDDEN, "mask": MASK.to(torch.complex64)}, TypeError, "mask must be .* got complex64"),
    ("numbered mask", {"hidden": HIDDEN, "mask": MASK + index(0, 0, 1, 1, 2)}, ValueError, r"mask must hold 0 and 1 alone, got mask\[0, 2\] = 2; where it numbers the texts of a row, fastpool\.segments\(ids\) gives"),
    ("numbered mask of packed", {"hidden": PACKED, "cu_seqlens": CU, "mask": index(*[1] * 9, -3)}, ValueError, r"got mask\[9\] = -3"),
    ("numbered mask of no columns", {"hidden": HIDDEN[..., :0], "mask": MASK + index(0, 0, 1, 1, 2)}, ValueError, r"got mask\[0, 2\] = 2"),
    ("mask too short", {"hidden": HIDDEN, "mask": MASK[:, :4]}, ValueError, r"mask must have hidden's shape without its last dimension, \[2, 5\], got \[2, 4\]"),
    ("mask of one row", {"hidden": HIDDEN, "mask": MASK[0]}, ValueError, r"\[2, 5\], got \[5\]"),
    ("mask of packed", {"hidden": PACKED, "cu_seqlens": CU, "mask": MASK}, ValueError, r"\[10\], got \[2, 5\]"),
    ("cu_seqlens of padded", {"hidden": HIDDEN, "cu_seqlens": CU}, ValueError, r"cu_seqlens goes with packed \[T, H\] hidden, got shape \[2, 5, 8\]"),
    ("packed alone", {"hidden": PACKED}, ValueError, r"packed \[T, H\] hidden needs cu_seqlens, or starts and ends, got none of them"),
    ("packed starts alone", {"hidden": PACKED, "starts": index(0)}, ValueError, "got starts alone"),
    ("packed ends alone", {"hidden": PACKED, "ends": index(1)}, ValueError, "got ends alone"),
    ("two descriptions", {"hidden": PACKED, "cu_seqlens": CU, "starts": index(0, 1), "ends": index(1, 2)}, ValueError, "cu_seqlens already says where segments start and end, got starts and ends too"),
    ("cu_seqlens and ends", {"hidden": PACKED, "cu_seqlens": CU, "ends": index(1, 2)}, ValueError, "got ends too"),
    ("float cu_seqlens", {"hidden": PACKED, "cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be int32 or int64, got float32"),
    ("short starts dtype", {"hidden": HIDDEN, "starts": index(0, 0).short()}, TypeError, "starts must be int32 or int64, got int16"),
    ("2-D cu_seqlens", {"hidden": PACKED, "cu_seqlens": CU[None]}, ValueError, r"cu_seqlens must have one dimension, got shape \[1, 3\]"),
    ("0-D ends", {"hidden": HIDDEN, "ends": torch.tensor(3)}, ValueError, r"ends must have one dimension, got shape \[\]"),
    ("empty cu_seqlens", {"hidden": PACKED, "cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens must have B \+ 1 values, got none"),
    ("starts too short", {"hidden": HIDDEN, "starts": index(0)}, ValueError, "starts must have 2 values, one for each row of hidden, got 1"),
    ("ends too long", {"hidden": HIDDEN, "ends": index(1, 2, 3)}, ValueError, "ends must have 2 values, one for each row of hidden, got 3"),
    ("starts and ends differ", {"hidden": PACKED, "starts": index(0, 1), "ends": index(1)}, ValueError, "ends must have 2 values, as starts has, got 1"),
    ("decreasing cu_seqlens", {"hidden": PACKED, "cu_seqlens": index(0, 6, 4, 10)}, ValueError, r"cu_seqlens must not decrease, got cu_seqlens\[1\] = 6 before cu_seqlens\[2\] = 4"),
    ("cu_seqlens beyond T", {"hidden": PACKED, "cu_seqlens": index(0, 11)}, ValueError, r"cu_seqlens must lie between 0 and 10, got cu_seqlens\[1\] = 11"),
    ("negative cu_seqlens", {"hidden": PACKED, "cu_seqlens": index(-1, 4)}, ValueError, r"got cu_seqlens\[0\] = -1"),
    ("negative start", {"hidden": HIDDEN, "starts": index(0, -2)}, ValueError, r"starts must lie between 0 and 5, got starts\[1\] = -2"),
    ("end beyond S", {"hidden": HIDDEN, "ends": index(5, 6).int()}, ValueError, r"ends must lie between 0 and 5, got ends\[1\] = 6"),
    ("enormous end", {"hidden": HIDDEN, "ends": index(5, 2**62)}, ValueError, r"got ends\[1\] = 4611686018427387904"),
    ("start behind end", {"hidden": HIDDEN, "starts": index(0, 4), "ends": index(5, 3)}, ValueError, r"starts must not be greater than ends, got starts\[1\] = 4 and ends\[1\] = 3"),
    ("packed start behind end", {"hidden": PACKED, "starts": index(4), "ends": index(3)}, ValueError, r"got starts\[0\] = 4 and ends\[0\] = 3"),
]  # fmt: skip

WEIGHTS_TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("integer weights", {"hidden": HIDDEN, "weights": MASK.long()}, TypeError, "weights must be float16, .*, got int64"),
    ("bool weights", {"hidden": HIDDEN, "weights": MASK}, TypeError, "weights must be float16, .*, got bool"),
    ("weights too long", {"hidden": HIDDEN, "weights": torch.ones(2, 6)}, ValueError, r"weights must have hidden's shape without its last dimension, \[2, 5\], got \[2, 6\]"),
    ("weights beyond float32", {"hidden": HIDDEN, "weights": torch.full((2, 5), -1e300, dtype=torch.float64)}, ValueError, r"weights beside float32 states are float32, so .* between 1.17549e-38 and 3.40282e\+38 in size, got weights\[0, 0\] = -1e\+300; scale them"),
    ("weights per column", {"hidden": HIDDEN, "weights": torch.ones(2, 5, 8)}, ValueError, r"got \[2, 5, 8\]"),
]  # fmt: skip

# What only a function can be handed.
FUNCTION_TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("list mask", {"hidden": HIDDEN, "mask": [[1] * 5] * 2}, TypeError, "mask must be a torch.Tensor, got list"),
    ("numpy hidden", {"hidden": HIDDEN.numpy()}, TypeError, "hidden must be a torch.Tensor, got ndarray"),
    ("string out_dtype", {"hidden": HIDDEN, "out_dtype": "float32"}, TypeError, "out_dtype must be .*, got str"),
    ("list lengths", {"hidden": HIDDEN, "lengths": [5, 5]}, TypeError, "lengths must be a torch.Tensor, got list"),
    ("lengths of packed", {"hidden": PACKED, "lengths": index(3)}, ValueError, r"lengths goes with padded \[B, S, H\] hidden"),
    ("long lengths", {"hidden": HIDDEN, "lengths": index(5, 6)}, ValueError, r"lengths must lie between 0 and 5, got lengths\[1\] = 6"),
    ("lengths before starts", {"hidden": HIDDEN, "starts": index(0, 4), "lengths": index(5, 3)}, ValueError, r"starts must not be greater than lengths, got starts\[1\] = 4 and lengths\[1\] = 3"),
    ("float lengths", {"hidden": HIDDEN, "lengths": index(5, 5).float()}, TypeError, "lengths must be int32 or int64, got float32"),
    ("many lengths", {"hidden": HIDDEN, "lengths": index(5, 5, 5)}, ValueError, "lengths must have 2 values, one for each row of hidden, got 3"),
    ("lengths elsewhere", {"hidden": HIDDEN, "lengths": index(5, 5).to("meta")}, ValueError, "lengths must be on hidden's device, cpu, got meta"),
    ("lengths of a list", {"hidden": [1.0], "lengths": index(1)}, TypeError, "hidden must be a torch.Tensor, got list"),
    ("lengths and ends", {"hidden": HIDDEN, "lengths": index(3, 3), "ends": index(3, 3)}, ValueError, "lengths is another name for ends, got both"),
    ("sparse hidden", {"hidden": HIDDEN.to_sparse()}, TypeError, "hidden must be a dense strided tensor, got layout torch.sparse_coo"),
    ("mask elsewhere", {"hidden": HIDDEN, "mask": MASK.to("meta")}, ValueError, "mask must be on hidden's device, cpu, got meta"),
    ("cu_seqlens elsewhere", {"hidden": PACKED, "cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens must be on hidden's device, cpu, got meta"),
]  # fmt: skip


def ids(row: object) -> str | None:
    return row.replace(" ", "-") if isinstance(row, str) and " " in row and len(row) < 30 else None


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("name", "arguments", "error", "words"), TABLE + FUNCTION_TABLE, ids=ids)
def test_functions(name: str, arguments: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    """Where gradients are recorded, too."""
    hidden = arguments["hidden"]
    recorded = isinstance(hidden, torch.Tensor) and hidden.is_floating_point()
    shape = hidden.shape if isinstance(hidden, torch.Tensor) and hidden.dim() > 1 else HIDDEN.shape
    for given in (hidden, hidden.detach().requires_grad_()) if recorded else (hidden,):
        for mode in (*MODES, "tokens"):
            own = required(mode, shape) if mode in MODES else {}
            said = words.replace("hidden", "logits") if mode in MODES and MODES[mode].of_logits else words
            with fastpool.backend(backend), pytest.raises(error, match=said) as caught:
                function_of(mode)(**{**arguments, **own, "hidden": given})
            assert str(caught.value).startswith(f"fastpool.{mode}: ")
    with pytest.raises(error, match=words):
        fastpool.explain(**arguments)


@pytest.mark.parametrize("backend", cpu_backends())
def test_what_no_schema_takes(backend: str) -> None:
    with fastpool.backend(backend):
        for truncate_dim in (3.5, "x"):
            with pytest.raises(
                TypeError, match=f"fastpool.mean: truncate_dim must be an int, got {type(truncate_dim).__name__}"
            ):
                fastpool.mean(HIDDEN, truncate_dim=truncate_dim)  # type: ignore[arg-type]  # on purpose
        with pytest.raises(TypeError, match=r"fastpool\.max: normalize must be a bool, got str"):
            fastpool.max(HIDDEN, normalize="l2")  # type: ignore[arg-type]  # on purpose
        with pytest.raises(TypeError, match=r"fastpool\.l2_normalize: eps must be a float, got str"):
            fastpool.l2_normalize(HIDDEN, eps="small")  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("given", ["dim", "dims"])
def test_dim_is_no_axis(given: str) -> None:
    """In torch dim=1 is an axis: whoever means one is told what there is instead. Raw ops refuse it in torch's words."""
    pools = [partial(function_of(mode), **required(mode, HIDDEN.shape)) for mode in MODES]
    functions: list[Any] = [*pools, fastpool.l2_normalize, fastpool.explain]
    calls = [lambda function=function: function(HIDDEN, **{given: 1}) for function in functions]
    modules: list[Any] = [partial(fastpool.nn.Pooling, "mean"), fastpool.nn.Normalize]
    modules += [partial(fastpool.nn.AttentionPooling, 8), partial(fastpool.nn.MultiheadPooling, 8, 2)]
    for call in (*calls, *(lambda module=module: module(**{given: 1}) for module in modules)):
        with pytest.raises(TypeError, match=r"^fastpool\.\S+ has no dim: .*truncate_dim .*last dimension$"):
            call()
    with pytest.raises(TypeError, match=r"fastpool\.mean\(\) got an unexpected keyword argument 'normalise'"):
        fastpool.mean(HIDDEN, normalise=True)  # type: ignore[call-arg]  # on purpose
    with pytest.raises(RuntimeError, match="dim"):
        torch.ops.fastpool.mean(HIDDEN, dim=1)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("name", "arguments", "error", "words"), WEIGHTS_TABLE, ids=ids)
def test_weights(name: str, arguments: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    with fastpool.backend(backend), pytest.raises(error, match=words):
        fastpool.weighted_mean(**arguments)


@pytest.mark.parametrize(("name", "arguments", "error", "words"), TABLE + WEIGHTS_TABLE, ids=ids)
def test_raw_ops_say_the_same(name: str, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    for mode in ("weighted_mean",) if "weights" in arguments else ("mean", "tokens"):
        with pytest.raises(error) as proper:
            function_of(mode)(**arguments)
        for backend in cpu_backends():
            with fastpool.backend(backend), pytest.raises(error) as raw:
                getattr(torch.ops.fastpool, mode)(**arguments)
            assert str(raw.value) == str(proper.value)


NORMALIZE_TABLE: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fastpool.l2_normalize(MASK), TypeError, "x must be float16, .*, got bool"),
    (lambda: fastpool.l2_normalize([1.0]), TypeError, "x must be a torch.Tensor, got list"),  # type: ignore[arg-type]  # on purpose
    (lambda: fastpool.l2_normalize(torch.tensor(1.0)), ValueError, "x must have at least one dimension"),
    (
        lambda: fastpool.l2_normalize(torch.randn(8).view([1] * 64 + [8])),
        ValueError,
        "x must have at most 64 dimensions, got 65",
    ),
    (
        lambda: fastpool.l2_normalize(HIDDEN, truncate_dim=9),
        ValueError,
        "truncate_dim must lie between 1 and the last dimension, 8, got 9",
    ),
    (lambda: fastpool.l2_normalize(HIDDEN, eps=-1.0), ValueError, "eps must be at least 0, got -1"),
    (lambda: fastpool.l2_normalize(HIDDEN, out_dtype=torch.int8), TypeError, "out_dtype must be .*, got int8"),
]


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("call", "error", "words"), NORMALIZE_TABLE)
def test_l2_normalize(call: Callable[[], object], error: type[Exception], words: str, backend: str) -> None:
    with fastpool.backend(backend), pytest.raises(error, match=words) as caught:
        call()
    assert str(caught.value).startswith("fastpool.l2_normalize: ")


X = torch.randn(2, 3, 8)
# name, arguments, error, words
DIMS_TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("float truncate_dims", {"truncate_dims": torch.ones(2, 3)}, TypeError, "truncate_dims must be int32 or int64, got float32"),
    ("short truncate_dims", {"truncate_dims": torch.ones(2, 3).short()}, TypeError, "truncate_dims must be int32 or int64, got int16"),
    ("truncate_dims of one row", {"truncate_dims": index(1, 2, 3)}, ValueError, r"truncate_dims must have x's shape without its last dimension, \[2, 3\], got \[3\]"),
    ("truncate_dims of columns", {"truncate_dims": torch.ones(2, 3, 8).int()}, ValueError, r"\[2, 3\], got \[2, 3, 8\]"),
    ("0-d truncate_dims", {"truncate_dims": torch.tensor(3)}, ValueError, r"\[2, 3\], got \[\]"),
    ("truncate_dims beyond columns", {"truncate_dims": index(8, 0, 1, 9, 8, 8).view(2, 3)}, ValueError, r"truncate_dims must lie between 0 and 8, got truncate_dims\[1, 0\] = 9"),
    ("truncate_dims beyond truncate_dim", {"truncate_dims": index(4, 5, 1, 9, 8, 8).view(2, 3).int(), "truncate_dim": 4}, ValueError, r"truncate_dims must lie between 0 and 4, got truncate_dims\[0, 1\] = 5"),
    ("negative truncate_dims", {"truncate_dims": index(4, 5, 1, 0, 8, -1).view(2, 3)}, ValueError, r"got truncate_dims\[1, 2\] = -1"),
    ("enormous truncate_dims", {"truncate_dims": index(2**62).expand(2, 3)}, ValueError, r"got truncate_dims\[0, 0\] = 4611686018427387904"),
    ("truncate_dims of a vector", {"x": X[0, 0], "truncate_dims": torch.tensor(9)}, ValueError, r"truncate_dims must lie between 0 and 8, got truncate_dims\[\] = 9"),
    ("truncate_dims of no columns", {"x": X[..., :0], "truncate_dims": torch.ones(2, 3).int()}, ValueError, r"truncate_dims must lie between 0 and 0, got truncate_dims\[0, 0\] = 1"),
]  # fmt: skip


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("name", "arguments", "error", "words"), DIMS_TABLE, ids=ids)
def test_dims(name: str, arguments: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    """By the function, where gradients are recorded too, by the raw op and by that of the gradient."""
    arguments = dict(arguments)
    x = arguments.pop("x", X)
    truncate_dims, truncate_dim = arguments["truncate_dims"], arguments.get("truncate_dim", x.shape[-1])
    with fastpool.backend(backend):
        with pytest.raises(error, match=words) as proper:
            fastpool.l2_normalize(x, **arguments)
        assert str(proper.value).startswith("fastpool.l2_normalize: ")
        with pytest.raises(error, match=words):
            fastpool.l2_normalize(x.detach().requires_grad_(), **arguments)
        for call in (
            lambda: torch.ops.fastpool.l2_normalize(x, **arguments),
            lambda: torch.ops.fastpool._l2_normalize_backward(
                torch.ones(*x.shape[:-1], truncate_dim), x, 1e-12, truncate_dims
            ),
        ):
            with pytest.raises(error) as raw:
                call()
            assert str(raw.value) == str(proper.value)


@pytest.mark.parametrize("backend", cpu_backends())
def test_what_are_no_dims(backend: str) -> None:
    with fastpool.backend(backend):
        with pytest.raises(TypeError, match=r"fastpool\.l2_normalize: truncate_dims must be a torch.Tensor, got list"):
            fastpool.l2_normalize(X[0], truncate_dims=[1, 2, 3])  # type: ignore[arg-type]  # on purpose
        with pytest.raises(
            ValueError, match=r"fastpool\.l2_normalize: truncate_dims must be on x's device, cpu, got meta"
        ):
            fastpool.l2_normalize(X[0], truncate_dims=torch.ones(3, dtype=torch.int32, device="meta"))


def test_nested() -> None:
    jagged = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match="a nested hidden says itself where segments start and end"):
        fastpool.mean(jagged, starts=index(0, 0))
    with pytest.raises(TypeError, match="must be jagged"):
        fastpool.mean(torch.nested.nested_tensor([torch.randn(3, 4)]))
    with pytest.raises(ValueError, match="ragged in dimension 1"):
        fastpool.mean(jagged.transpose(1, 2))
    with pytest.raises(TypeError, match=r"fastpool\.mean: mask must be a dense strided tensor, got a nested one"):
        fastpool.mean(X, jagged)


NESTED_TABLE: list[tuple[str, list[int], list[int] | None, dict[str, Any], str]] = [
    ("offsets go back", [0, 6, 4, 10], None, {}, r"hidden.offsets\(\) must not decrease, got hidden.offsets\(\)\[1\] = 6 before hidden.offsets\(\)\[2\] = 4"),
    ("offsets beyond rows", [0, 4, 11], None, {}, r"hidden.offsets\(\) must lie between 0 and 10, got hidden.offsets\(\)\[2\] = 11"),
    ("lengths beyond rows", [0, 4, 10], [4, 7], {}, r"hidden.offsets\(\)\[:-1\] \+ hidden.lengths\(\) must lie between 0 and 10, got .* = 11"),
    ("a padded mask", [0, 4, 10], None, {"mask": MASK}, r"mask must have hidden.values\(\)'s shape without its last dimension, \[10\], got \[2, 5\]"),
]  # fmt: skip


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("name", "offsets", "lengths", "more", "words"), NESTED_TABLE, ids=ids)
def test_parts_of_a_nested_hidden(
    name: str, offsets: list[int], lengths: list[int] | None, more: dict[str, Any], words: str, backend: str
) -> None:
    held = None if lengths is None else index(*lengths)
    jagged = torch.nested.nested_tensor_from_jagged(PACKED, index(*offsets), held, min_seqlen=1, max_seqlen=9)
    for call in (fastpool.mean, fastpool.weighted_mean, fastpool.explain):
        with fastpool.backend(backend), pytest.raises(ValueError, match=rf"^fastpool.(weighted_)?mean: {words}"):
            call(jagged, **more)


def test_weights_where_there_are_none() -> None:
    with pytest.raises(TypeError, match="weights"):
        fastpool.mean(HIDDEN, weights=torch.ones(2, 5))  # type: ignore[call-arg]  # on purpose
    with pytest.raises(ValueError, match="mean takes no weights"):
        fastpool.explain(HIDDEN, weights=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mode must be one of mean, .*, got 'median'"):
        fastpool.explain(HIDDEN, mode="median")


RESULT = torch.ones(2, 8)
# name, arguments of _pool_backward beside those that are well, words
BACKWARD_TABLE: list[tuple[str, dict[str, Any], str]] = [
    ("scalar gradient", {"gradient": RESULT[0, 0]}, r"gradient must have shape \[2, 8\], got \[\]"),
    ("gradient of three", {"gradient": torch.ones(3, 8)}, r"gradient must have shape \[2, 8\], got \[3, 8\]"),
    ("wide gradient", {"gradient": torch.ones(2, 9)}, "truncate_dim must lie between 1 and the last dimension, 8, got 9"),
    ("half gradient", {"gradient": RESULT.half()}, "gradient must be float32, got float16"),
    ("strided gradient", {"gradient": torch.ones(2, 16)[:, ::2]}, r"gradient must be contiguous, got strides \[16, 2\]"),
    ("integer hidden", {"hidden": HIDDEN.long()}, "hidden must be float16, .* got int64"),
    ("float mask", {"mask": MASK.float()}, "mask must be bool or an integer type"),
    ("ends beyond S", {"ends": index(5, 6)}, r"ends must lie between 0 and 5, got ends\[1\] = 6"),
    ("cu_seqlens of padded", {"cu_seqlens": CU}, "cu_seqlens goes with packed"),
    ("sparse result", {"result": RESULT.to_sparse()}, "must be a dense strided tensor"),
    ("result elsewhere", {"result": RESULT.to("meta")}, "must be on hidden's device, cpu, got meta"),
    ("no result", {"result": None}, "result must be a torch.Tensor, got NoneType"),
    ("narrow result", {"result": RESULT[:, :7]}, r"result must have shape \[2, 8\], got \[2, 7\]"),
    ("double result", {"result": RESULT.double()}, "result must be float32, got float64"),
]  # fmt: skip


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("name", "arguments", "words"), BACKWARD_TABLE, ids=ids)
def test_backward_ops(name: str, arguments: dict[str, Any], words: str, backend: str) -> None:
    """Autograd gets them right; whoever calls them by hand is told."""
    own = [(mode, argument.name) for mode in MODES for argument in MODES[mode].arguments if argument.differentiable]
    for mode, of in [*((mode, "hidden") for mode in MODES if not MODES[mode].of_logits), *own]:
        if words.startswith("result") and not MODES[mode].gradient_reads_hidden(of):
            continue
        well = {"gradient": RESULT, "result": RESULT, "hidden": HIDDEN, **required(mode, HIDDEN.shape)}
        well |= {"weights": MASK.float()} if MODES[mode].takes_weights else {}
        with fastpool.backend(backend), pytest.raises((TypeError, ValueError), match=words):
            torch.ops.fastpool._pool_backward(*backward_arguments(mode, of, **{**well, **arguments}))


@pytest.mark.parametrize("backend", cpu_backends())
def test_backward_of_weights_needs_them(backend: str) -> None:
    for mode in MODES:
        for argument in MODES[mode].arguments:
            if argument.differentiable:
                arguments = backward_arguments(mode, argument.name, RESULT, RESULT, hidden=HIDDEN)
                with fastpool.backend(backend), pytest.raises(ValueError, match=f"{argument.name} must be given"):
                    torch.ops.fastpool._pool_backward(*arguments)
    _, _, *arguments = backward_arguments("mean", "hidden", RESULT, RESULT, hidden=HIDDEN)
    for mode, of, words in (
        (-1, 0, "mode must lie between 0 and .*, got -1"),
        (len(MODES), 0, f"mode must lie between 0 and .*, got {len(MODES)}"),
        (list(MODES).index("splade_sum_relu"), 0, "mode must not be splade_sum_relu: .* goes through sum"),
        (*codes("mean", "hidden")[:1], 1, r"of must be one of \[0\] for mean, got 1"),
        (*codes("weighted_mean", "scores"), r"of must be one of \[0, 2\] for weighted_mean, got 3"),
        (*codes("softmax_mean", "weights"), r"of must be one of \[0, 3\] for softmax_mean, got 2"),
        (*codes("attention", "scores"), r"of must be one of \[0, 1\] for attention, got 3"),
        (list(MODES).index("mean"), len(GRADIENTS_OF), rf"of must be one of \[0\] for mean, got {len(GRADIENTS_OF)}"),
    ):
        with fastpool.backend(backend), pytest.raises(ValueError, match=words):
            torch.ops.fastpool._pool_backward(mode, of, *arguments)
    for gradient, words in (
        (RESULT[:1], r"gradient must have shape \[2, 8\], got \[1, 8\]"),
        (RESULT.double(), "float32"),
    ):
        with fastpool.backend(backend), pytest.raises((TypeError, ValueError), match=words):
            torch.ops.fastpool._l2_normalize_backward(gradient, torch.ones(2, 8), 1e-12)


def test_what_has_no_gradient() -> None:
    hidden = HIDDEN.detach().requires_grad_()
    for name, given in (("mask", MASK.long()), ("ends", index(3, 4))):
        with pytest.raises(RuntimeError, match=r"only Tensors of floating point .* can require gradients"):
            given.requires_grad_()
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(fastpool.mean(hidden, **{name: given}).sum(), given)
    with pytest.raises(TypeError, match=r"mean\(\) got an unexpected keyword argument 'weights'"):
        fastpool.mean(hidden, weights=MASK.float())  # type: ignore[call-arg]  # on purpose


def test_bounds_of_more_rows_than_their_dtype_counts() -> None:
    hidden = torch.ones(1).as_strided((1, 2**33, 8), (0, 0, 0))
    PoolCall("mean", hidden, starts=index(5).int()).check_bounds()
    with pytest.raises(ValueError, match=r"got starts\[0\] = -1"):
        PoolCall("mean", hidden, starts=index(-1).int()).check_bounds()
