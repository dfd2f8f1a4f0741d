"""How many ops reach torch's dispatcher, without views, for 32 requests of 100 tokens: vLLM's and fastpool's, the table
of docs/vllm.md."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpool.integrations import vllm as plugin
from tests.helpers.vllm_batches import WIDTH, Ops, metadata, tokens

REQUESTS, LENGTH, WORDS = 32, 100, 30522


def splade(engine: Any, pooling: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    ids = [torch.tensor([101] + [9] * (LENGTH - 2) + [102])] * REQUESTS
    head = engine.BertMLMHead(WIDTH, WORDS).to(torch.bfloat16)
    return engine.SPLADESparsePooler(head, pooling=pooling), metadata(engine, [LENGTH] * REQUESTS, ids=ids)


def embeddings(engine: Any, width: int | None, chunk: int | None, *dimensions: int | None) -> tuple[Any, Any]:
    """Of tokens, projected to `width`, or of chunks; requests take turns in `dimensions`."""
    pooling = engine.AllPool.__new__(engine.AllPool)
    torch.nn.Module.__init__(pooling)
    vars(pooling).update(output_sizes_fn=None, enable_chunked_prefill=False, clone_finished=True)
    projector = None if width is None else torch.nn.Linear(WIDTH, width, bias=False)
    head = engine.TokenEmbeddingPoolerHead(torch.float32, projector, engine.PoolerNormalize())
    wanted = [(dimensions[row % len(dimensions)], True) for row in range(REQUESTS)]
    chunks = None if chunk is None else [chunk] * REQUESTS
    return engine.TokenPooler(pooling, head), metadata(engine, [LENGTH] * REQUESTS, wanted, chunks=chunks)


# What makes a pooler and its requests; vLLM's ops, of a version that has such a thing; fastpool's.
CASES: dict[str, tuple[Callable[[Any], tuple[Any, Any]], dict[str, int], int]] = {
    "splade_max": (lambda engine: splade(engine, "max"), {"0.32": 321, "0.33": 164}, 10),
    "splade_sum": (lambda engine: splade(engine, "sum"), {"0.32": 321, "0.33": 321}, 10),
    "tokens": (lambda engine: embeddings(engine, None, None, None), {"0.32": 160, "0.33": 160}, 1),
    "tokens_of_sizes": (lambda engine: embeddings(engine, None, None, 16, 32), {"0.32": 160, "0.33": 160}, 1),
    "projected": (lambda engine: embeddings(engine, 24, None, None), {"0.32": 192, "0.33": 192}, 3),
    "late_chunking": (lambda engine: embeddings(engine, None, 16, None), {"0.33": 224}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_operations(request: pytest.FixtureRequest, engine: SimpleNamespace, case: str) -> None:
    make, of_version, expected = CASES[case]
    version = ".".join(engine.vllm.__version__.split(".")[:2])
    if version not in of_version:
        pytest.skip(f"vLLM {version} has no {case}")
    pooler, given = make(engine)
    hidden = tokens(torch.bfloat16, [LENGTH] * REQUESTS)
    if request.node.callspec.params["engine"] == "vllm":  # a stand-in has the results, not the ops
        assert _counted(pooler, hidden, given) == of_version[version]
    plugin.register()
    assert _counted(pooler, hidden, given) == expected


def _counted(pooler: Any, hidden: torch.Tensor, given: Any) -> int:
    with torch.no_grad(), Ops() as ops:
        pooler(hidden, given)
    return len(ops.names)
