"""Tensors without the memory that they speak of, and results that no memory can hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool.models.layers import Normalize
from fastpool.modes import MODES
from fastpool.testing import backward_arguments, cpu_backends, function_of, required

OPS = torch.ops.fastpool
HIDDEN = torch.randn(2, 5, 8)
PACKED = torch.randn(10, 8)
# One call for each argument that is a tensor.
PADDED: dict[str, Tensor] = {
    "hidden": HIDDEN,
    "mask": torch.ones(2, 5, dtype=torch.bool),
    "starts": torch.tensor([0, 1]),
    "ends": torch.tensor([5, 4]).int(),
}
CALLS: dict[str, dict[str, Tensor]] = {
    **dict.fromkeys(PADDED, PADDED),
    "cu_seqlens": {"hidden": PACKED, "cu_seqlens": torch.tensor([0, 4, 10])},
    "lengths": {"hidden": HIDDEN, "lengths": torch.tensor([5, 4])},
}


def without_memory(tensor: Tensor, bytes: int) -> Tensor:
    """A copy of the tensor, all but its first `bytes` of memory taken away."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(bytes)
    return copy


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("bytes", [0, 4])
@pytest.mark.parametrize("argument", CALLS)
def test_pooling(argument: str, bytes: int, backend: str) -> None:
    given = {**CALLS[argument], argument: without_memory(CALLS[argument][argument], bytes)}
    words = rf"{argument} must have memory for its elements, \d+ bytes, got a storage of {bytes}, which has been freed"
    for mode in MODES:
        functions = [function_of(mode), *([getattr(OPS, mode)] if argument != "lengths" else [])]
        for function in functions:
            said = words.replace("hidden", "(hidden|logits)") if MODES[mode].of_logits else words
            with fastpool.backend(backend), pytest.raises(ValueError, match=rf"^fastpool.{mode}: {said}"):
                function(**given, **required(mode, given["hidden"].shape))
    with pytest.raises(ValueError, match=words):
        fastpool.explain(**given)  # type: ignore[arg-type]  # by their names


@pytest.mark.parametrize("backend", cpu_backends())
def test_others(backend: str) -> None:
    def freed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return without_memory(torch.ones(shape, dtype=dtype), 0)

    result = torch.ones(2, 8)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("weights", lambda: fastpool.weighted_mean(HIDDEN, weights=freed(2, 5))),
        ("scores", lambda: fastpool.softmax_mean(HIDDEN, scores=freed(2, 5))),
        ("query", lambda: fastpool.attention(HIDDEN, freed(3, 8))),
        ("x", lambda: fastpool.l2_normalize(freed(2, 8))),
        ("truncate_dims", lambda: fastpool.l2_normalize(result, truncate_dims=freed(2, dtype=torch.int32))),
        ("gradient", lambda: OPS._l2_normalize_backward(freed(2, 8), result, 1e-12)),
        ("x", lambda: OPS._l2_normalize_backward(result, freed(2, 8), 1e-12)),
        ("gradient", lambda: backward("mean", freed(2, 8), HIDDEN, None)),
        ("result", lambda: backward("max", result, HIDDEN, freed(2, 8))),
        ("hidden", lambda: backward("max", result, freed(2, 5, 8), result)),
    ]
    for argument, call in calls:
        with fastpool.backend(backend), pytest.raises(ValueError, match=f": {argument} must have memory"):
            call()


def backward(mode: str, gradient: Tensor, hidden: Tensor, result: Tensor | None) -> Tensor:
    of_hidden: Tensor = OPS._pool_backward(*backward_arguments(mode, "hidden", gradient, result, hidden=hidden))
    return of_hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bytes", [0, 4])
@pytest.mark.parametrize("strided", [False, True])
def test_gradients(dtype: torch.dtype, bytes: int, strided: bool) -> None:
    """Autograd's own, before anything makes them contiguous or wider; and a result that was saved for them."""
    for call in (fastpool.mean, fastpool.max, lambda x: fastpool.l2_normalize(x[:, 0])):
        result = call(HIDDEN.to(dtype).requires_grad_())
        gradient = torch.ones(8, 2, dtype=dtype).t() if strided else torch.ones(2, 8, dtype=dtype)
        gradient.untyped_storage().resize_(bytes)
        with pytest.raises(ValueError, match=rf"^fastpool\.\w+: gradient must have memory .* a storage of {bytes},"):
            result.backward(gradient)
    result = fastpool.max(HIDDEN.to(dtype).requires_grad_())
    result.untyped_storage().resize_(bytes)
    with pytest.raises(ValueError, match=r"^fastpool\.max: result must have memory"):
        result.backward(torch.ones(2, 8, dtype=dtype))


@pytest.mark.parametrize("part", ["offsets", "lengths"])
def test_parts_of_a_nested_tensor_with_gaps(part: str) -> None:
    starts, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
    nested: Any = torch.nested.narrow(HIDDEN, 1, starts, lengths, layout=torch.jagged)
    getattr(nested, part)().untyped_storage().resize_(0)
    for call in (fastpool.mean, fastpool.PoolingConfig(("mean",)).apply):
        with pytest.raises(ValueError, match=rf"^fastpool\.mean: hidden\.{part}\(\) must have memory"):
            call(nested)


def test_what_looks_at_tensors_before_an_op_does() -> None:
    freed, mask = without_memory(HIDDEN.bfloat16(), 0), without_memory(torch.ones(2, 5).bool(), 4)
    with pytest.raises(ValueError, match=r"^fastpool\.segments: ids must have memory"):
        fastpool.segments(without_memory(torch.ones(5).long(), 0))
    config = fastpool.PoolingConfig(("mean",), token_layers=(Normalize(),))
    with pytest.raises(ValueError, match=r"^fastpool\.mean: hidden must have memory"):
        config.apply(freed)
    config = fastpool.PoolingConfig(("weighted_mean",), include_prompt=False)
    with pytest.raises(ValueError, match=r"^fastpool\.weighted_mean: mask must have memory"):
        config.apply(HIDDEN, mask, starts=torch.tensor([0, 1]))
    nested = torch.nested.nested_tensor_from_jagged(PACKED.clone(), torch.tensor([0, 4, 10]))
    nested.values().untyped_storage().resize_(0)
    for call in (fastpool.mean, fastpool.PoolingConfig(("mean",), token_layers=(Normalize(),)).apply):
        with pytest.raises(ValueError, match=r"^fastpool\.mean: hidden\.values\(\) must have memory"):
            call(nested)


@pytest.mark.parametrize("backend", cpu_backends())
def test_null_is_right_where_nothing_is_read(backend: str) -> None:
    none = torch.empty(0)
    assert none.data_ptr() == 0
    with fastpool.backend(backend):
        assert fastpool.mean(none.view(0, 3, 8), torch.empty(0, 3, dtype=torch.bool)).shape == (0, 8)
        assert fastpool.mean(none.view(2, 0, 8), lengths=torch.tensor([0, 0])).equal(torch.zeros(2, 8))
        assert fastpool.mean(none.view(0, 8), cu_seqlens=torch.tensor([0, 0])).equal(torch.zeros(1, 8))
        assert fastpool.l2_normalize(none.view(0, 8)).shape == (0, 8)


MANY = 20_000_000
WIDE = torch.zeros(1, 1, 4096).expand(MANY, 1, 4096)
TOO_LARGE: list[tuple[str, int, Callable[[Any], object]]] = [
    ("mean", 4 * MANY * 4096, lambda ops: ops.mean(WIDE)),
    ("max", 4 * MANY * 4096, lambda ops: ops.max(WIDE, torch.ones(1, 1).long().expand(MANY, 1))),
    ("sum", 4 * MANY * 4096, lambda ops: ops.sum(WIDE, ends=torch.ones(1).long().expand(MANY))),
    ("last", 8 * MANY * 4096, lambda ops: ops.last(WIDE[0], cu_seqlens=torch.zeros(1).long().expand(MANY + 1),
                                                  out_dtype=torch.float64)),
    ("l2_normalize", 4 * MANY * 4096, lambda ops: ops.l2_normalize(WIDE)),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("op", "bytes", "call"), TOO_LARGE, ids=[op for op, *_ in TOO_LARGE])
def test_a_result_that_no_memory_holds(op: str, bytes: int, call: Callable[[Any], object], backend: str) -> None:
    for ops in (fastpool, OPS):
        with fastpool.backend(backend), pytest.raises(
            torch.OutOfMemoryError, match=rf"^fastpool\.{op}: not enough memory: .*\b{bytes} bytes"
        ):  # fmt: skip
            call(ops)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_result_that_no_number_counts(backend: str) -> None:
    hidden, words = torch.zeros(1, 1, 1).expand(2**31, 1, 2**31), f"more than {2**63 - 1} bytes were asked for"
    with (
        fastpool.backend(backend),
        pytest.raises(torch.OutOfMemoryError, match=rf"^fastpool\.mean: not enough memory: {words}$"),
    ):
        fastpool.mean(hidden)
