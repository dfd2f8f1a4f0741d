"""SPLADE's pooling of logits on a CPU, beside a plain maximum of them, sentence-transformers' module and torch.

    python -m benchmarks.run --only sparse

Every token is real. Each way is checked against float64 before it is timed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fastpool
from benchmarks.attention import Calls, measure_calls, print_calls
from benchmarks.cases import Case
from benchmarks.timing_cpu import Cpu

UNIT = "max"
SHAPES = ((8, 64, 30522), (16, 128, 30522), (4, 64, 250002))  # BERT's words and XLM-RoBERTa's
CASES = tuple(Case(length, batch, width, dtype) for dtype in ("fp32", "bf16") for batch, length, width in SHAPES)


def calls_of(logits: Tensor) -> Calls:
    from sentence_transformers.sparse_encoder.modules import SpladePooling  # a GPU's machine may not have it

    mask = torch.ones(logits.shape[:2], dtype=torch.int64)
    calls: Calls = {UNIT: (lambda: fastpool.max(logits), lambda: logits.double().amax(1))}
    for pooling in ("max", "sum"):

        def exact(pooling: str = pooling) -> Tensor:
            x = logits.double().relu_().log1p_()
            return x.amax(1) if pooling == "max" else x.sum(1)

        def by_torch(pooling: str = pooling) -> Tensor:
            x = torch.log1p(torch.relu(logits))
            return x.amax(1) if pooling == "max" else x.sum(1)

        module = SpladePooling(pooling).eval()

        def by_module(module: Any = module) -> Tensor:
            result: Tensor = module({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"]
            return result

        calls |= {
            f"splade {pooling}": (partial(fastpool.splade, logits, pooling=pooling), exact),
            f"torch, {pooling}": (by_torch, exact),
            f"sentence-transformers, {pooling}": (by_module, exact),
        }
    return calls


def measure(device: Cpu, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each case, microseconds by call, medians, and why others have none."""
    return measure_calls(device, cases, calls_of)


def print_sparse(console: Console, found: list[dict[str, Any]]) -> None:
    print_calls(console, found, "SPLADE's pooling of logits: multiples of max", UNIT)
