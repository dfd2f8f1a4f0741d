"""The same search among vectors of a byte, or a bit, per column."""

from dataclasses import dataclass

import torch
from torch import Tensor

import fastpool

from .search import found_by_name

KINDS = ("int8", "binary")


@dataclass(frozen=True)
class Stored:
    """What keeping the docs' vectors in some way takes, and what is found among them."""

    bytes: int
    same_first: float  # of all questions, those with float32's first answer
    same_ten: float  # of float32's first ten answers, the share among the first ten, on average
    by_name: float


def stored(names: Tensor, docs: Tensor) -> dict[str, Stored]:
    """In float32 and in each kind. Questions, which are the docs' names, stay float32 and are compared with what the
    bytes stand for."""
    ranges = fastpool.quantization_ranges(docs)
    found = {"float32": Stored(docs.nbytes, 1.0, 1.0, found_by_name(names, docs))}
    exact = _best(names, docs)
    for kind in KINDS:
        own = ranges if kind == "int8" else None
        kept = fastpool.quantize(docs, kind, ranges=own)
        vectors = fastpool.dequantize(kept, kind, ranges=own)
        best = _best(names, vectors)
        same = (best[:, :, None] == exact[:, None]).any(1).to(torch.float64).mean().item()
        first = (best[:, 0] == exact[:, 0]).to(torch.float64).mean().item()
        found[kind] = Stored(kept.nbytes, first, same, found_by_name(names, vectors))
    return found


def _best(names: Tensor, docs: Tensor) -> Tensor:
    """The numbers of the first ten answers to each."""
    return (names @ docs.T).topk(min(10, len(docs))).indices
