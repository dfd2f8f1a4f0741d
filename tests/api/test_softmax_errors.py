"""The error table of scores and queries: from functions, raw ops and explain, on every backend."""

from functools import partial
from typing import Any

import pytest
import torch

import fastpool
from fastpool.modes import MODES
from fastpool.testing import backward_arguments, cpu_backends, function_of, required

HIDDEN = torch.randn(2, 5, 8)
PACKED = torch.randn(10, 8)
MASK = torch.ones(2, 5, dtype=torch.bool)
CU = torch.tensor([0, 4, 10])
# name, arguments, error, words
SCORES_TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no scores", {"hidden": HIDDEN}, ValueError, "scores must be given, got none"),
    ("integer scores", {"hidden": HIDDEN, "scores": MASK.long()}, TypeError, "scores must be float16, .*, got int64"),
    ("scores too long", {"hidden": HIDDEN, "scores": torch.ones(2, 6)}, ValueError, r"scores must have hidden's shape without its last dimension, \[2, 5\], got \[2, 6\]"),
    ("scores per column", {"hidden": HIDDEN, "scores": torch.ones(2, 5, 8)}, ValueError, r"got \[2, 5, 8\]"),
    ("scores of packed", {"hidden": PACKED, "cu_seqlens": CU, "scores": torch.ones(2, 5)}, ValueError, r"\[10\], got \[2, 5\]"),
    ("scores beyond float32", {"hidden": HIDDEN, "scores": torch.full((2, 5), 1e300, dtype=torch.float64)}, ValueError, r"scores beside float32 states are float32, so none must be greater than 3.40282e\+38, got scores\[0, 0\] = 1e\+300; subtract their largest"),
]  # fmt: skip
QUERY = torch.ones(8)
QUERY_TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no query", {"hidden": HIDDEN, "query": None}, ValueError, "query must be given, got none"),
    ("integer query", {"hidden": HIDDEN, "query": QUERY.long()}, TypeError, "query must be float16, .*, got int64"),
    ("wide query", {"hidden": HIDDEN, "query": torch.ones(9)}, ValueError, r"query must have shape \[8\], \[K, 8\] or \[2, K, 8\], as wide as hidden, got \[9\]"),
    ("query as wide as the result", {"hidden": HIDDEN, "query": torch.ones(3, 5), "truncate_dim": 5}, ValueError, r"as wide as hidden, got \[3, 5\]"),
    ("0-D query", {"hidden": HIDDEN, "query": torch.tensor(1.0)}, ValueError, r"query must have shape .*, got \[\]"),
    ("4-D query", {"hidden": HIDDEN, "query": torch.ones(1, 2, 3, 8)}, ValueError, r"query must have shape .*, got \[1, 2, 3, 8\]"),
    ("queries of other texts", {"hidden": HIDDEN, "query": torch.ones(3, 1, 8)}, ValueError, r"query \[B, K, 8\] must have one row of queries for each of the 2 segments, got \[3, 1, 8\]"),
    ("scale beyond float32", {"hidden": HIDDEN, "query": QUERY, "scale": -1e39}, ValueError, r"scale beside float32 states is float32, so it must not be greater than 3.40282e\+38 in size, got -1e\+39; scale the query, or give float64 states"),
    ("queries of packed", {"hidden": PACKED, "cu_seqlens": CU, "query": torch.ones(10, 1, 8)}, ValueError, "for each of the 2 segments"),
]  # fmt: skip
OWN_TABLE = [
    (mode, *row) for mode, table in (("softmax_mean", SCORES_TABLE), ("attention", QUERY_TABLE)) for row in table
]
NESTED = torch.nested.nested_tensor([torch.ones(5), torch.ones(4)], layout=torch.jagged)
FUNCTION_OWN_TABLE: list[tuple[str, str, dict[str, Any], type[Exception], str]] = [
    ("softmax_mean", "list of scores", {"hidden": HIDDEN, "scores": [[1.0] * 5] * 2}, TypeError, "scores must be a torch.Tensor, got list"),
    ("softmax_mean", "scores elsewhere", {"hidden": HIDDEN, "scores": torch.ones(2, 5, device="meta")}, ValueError, "scores must be on hidden's device, cpu, got meta"),
    ("attention", "list as query", {"hidden": HIDDEN, "query": [1.0] * 8}, TypeError, "query must be a torch.Tensor, got list"),
    ("attention", "query elsewhere", {"hidden": HIDDEN, "query": QUERY.to("meta")}, ValueError, "query must be on hidden's device, cpu, got meta"),
    ("softmax_mean", "nested scores", {"hidden": HIDDEN, "scores": NESTED}, TypeError, "scores must be a dense strided tensor, got a nested one"),
    ("attention", "nested query", {"hidden": HIDDEN, "query": NESTED}, TypeError, "query must be a dense strided tensor, got a nested one"),
    ("attention", "sparse query", {"hidden": HIDDEN, "query": QUERY.to_sparse()}, TypeError, "query must be a dense strided tensor, got layout torch.sparse_coo"),
]  # fmt: skip


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(("mode", "name", "arguments", "error", "words"), OWN_TABLE + FUNCTION_OWN_TABLE)
def test_scores_and_queries(
    mode: str, name: str, arguments: dict[str, Any], error: type[Exception], words: str, backend: str
) -> None:
    """Functions, also where gradients are recorded, explain, and raw ops."""
    raw = [] if (mode, name, arguments, error, words) in FUNCTION_OWN_TABLE else [getattr(torch.ops.fastpool, mode)]
    recorded = {**arguments, "hidden": arguments["hidden"].detach().requires_grad_()}
    explain = partial(fastpool.explain, mode=mode)
    for given in (arguments, recorded):
        for call in (function_of(mode), explain, *raw):
            with fastpool.backend(backend), pytest.raises(error, match=rf"^fastpool\.{mode}: .*{words}"):
                call(**given)


def test_scores_and_queries_where_there_are_none() -> None:
    """A mode's own arguments are no other's."""
    scores = torch.ones(2, 5)
    for mode in MODES:
        pool = partial(function_of(mode), HIDDEN, **required(mode, HIDDEN.shape))
        for name, value in {"weights": scores, "scores": scores, "query": QUERY, "scale": 2.0}.items():
            if not MODES[mode].takes(name):
                said = "splade" if MODES[mode].of_logits else mode
                with pytest.raises(
                    TypeError, match=rf"^fastpool\.{said}\(\) got an unexpected keyword argument '{name}'"
                ):
                    pool(**{name: value})
                if name != "scale":
                    with pytest.raises(ValueError, match=rf"^fastpool\.explain: {mode} takes no {name}"):
                        fastpool.explain(HIDDEN, mode=mode, **{name: value})


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("name", ["weights", "scores", "query"])
def test_a_gradient_takes_no_argument_of_another_mode(name: str, backend: str) -> None:
    """None of them may be there: kernels would make room for as many queries, none here."""
    hidden, gradient = torch.randn(2, 5, 8), torch.ones(2, 8)
    value = torch.ones(0, 8) if name == "query" else torch.ones(2, 5)
    for mode in ("mean", "max", "cls"):
        more = {"result": gradient} if MODES[mode].gradient_reads_hidden("hidden") else {}
        arguments = backward_arguments(mode, "hidden", gradient, more.get("result"), hidden=hidden, **{name: value})
        with fastpool.backend(backend), pytest.raises(ValueError, match=f"{name} must not be given"):
            torch.ops.fastpool._pool_backward(*arguments)


def test_validation_lets_gradients_be_anything() -> None:
    fastpool.validate(True)
    try:
        query = torch.randn(8, requires_grad=True)
        fastpool.attention(torch.randn(3, 5, 8), query).backward(torch.full((3, 8), torch.inf))
    finally:
        fastpool.validate(False)
    assert query.grad is not None
    assert not query.grad.isfinite().any()


@pytest.mark.parametrize("backend", cpu_backends())
def test_a_query_beyond_float32(backend: str) -> None:
    hidden, query = torch.ones(2, 5, 8), torch.ones(3, 8, dtype=torch.float64)
    query[1, 2] = -1e39
    with fastpool.backend(backend), pytest.raises(ValueError, match=r"float32, .*, got query\[1, 2\] = -1e\+39; scale"):
        fastpool.attention(hidden, query)
    assert fastpool.attention(hidden.double(), query).isfinite().all()


def test_explain_takes_no_scale_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"fastpool\.explain: mean takes no scale"):
        fastpool.explain(torch.ones(2, 5, 8), mode="mean", scale=2.0)
