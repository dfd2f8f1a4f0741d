"""Who pools on CPUs (providers_gpu.py: on GPUs): fastpool and the ways people pool today, one row each, all doing the
same work.

Every provider gets the input it is made for (padded or packed) and ends with L2 normalisation; what it can prepare
once and keep (modules, indices, a compiled function) is made before the clock starts.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody names it
from torch import Tensor

import fastpool
from cases import Batch
from floor import build_floor

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    layout: str  # "padded" or "packed"
    prepare: Callable[[Batch], Call]
    backend: str = "auto"  # of fastpool


def fastpool_padded(batch: Batch) -> Call:
    return lambda: fastpool.mean(batch.hidden, batch.mask, normalize=True)


def fastpool_packed(batch: Batch) -> Call:
    return lambda: fastpool.mean(batch.packed, cu_seqlens=batch.cu_seqlens, normalize=True)


def embedding_bag(batch: Batch) -> Call:
    rows = torch.arange(len(batch.packed), device=batch.packed.device)
    offsets = batch.cu_seqlens[:-1].long()
    return lambda: F.normalize(F.embedding_bag(rows, batch.packed, offsets, mode="mean"), dim=-1)


def segment_reduce(batch: Batch) -> Call:
    offsets, unsafe = batch.cu_seqlens.long(), batch.packed.is_cuda  # unsafe spares it two synchronisations there
    return lambda: F.normalize(torch.segment_reduce(batch.packed, "mean", offsets=offsets, unsafe=unsafe), dim=-1)


def bmm(batch: Batch) -> Call:
    def call() -> Tensor:
        mask = batch.mask.to(batch.hidden.dtype)
        total = torch.bmm(mask[:, None], batch.hidden)[:, 0]
        # Counted in int64: bfloat16 would count 257 tokens as 256.
        return F.normalize(total / batch.mask.sum(1, keepdim=True).clamp(min=1), dim=-1)

    return call


def bare_loop(batch: Batch) -> Call:
    """sums += row in C, and nothing else: what stands between the floor and any pooling in address order."""
    library = build_floor().bare
    if library is None:
        raise RuntimeError("needs a C compiler")
    count, width = len(batch.cu_seqlens) - 1, batch.packed.shape[-1]
    cu_seqlens, is_bfloat16 = batch.cu_seqlens.long(), batch.packed.dtype == torch.bfloat16
    sizes = [ctypes.c_size_t(count), ctypes.c_size_t(width)]

    def call() -> Tensor:
        out = torch.empty(count, width)
        tokens, ends, means = (ctypes.c_void_p(t.data_ptr()) for t in (batch.packed, cu_seqlens, out))
        library.bare_mean(tokens, int(is_bfloat16), ends, *sizes, means)
        return F.normalize(out, dim=-1).to(batch.packed.dtype)

    return call


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The formula everybody writes, with float32 sums and one rounding at the end."""
    total = (hidden * mask[..., None].to(hidden.dtype)).sum(1, dtype=torch.float32)
    return F.normalize(total / mask.sum(1, keepdim=True).clamp(min=1), dim=-1).to(hidden.dtype)


@cache
def _compiled_mean() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(masked_mean, dynamic=False)  # for each shape by itself, the compiler's best case


def compiled(batch: Batch) -> Call:
    pool = _compiled_mean()
    return lambda: pool(batch.hidden, batch.mask)


def sentence_transformers(batch: Batch) -> Call:
    """Its own modules, as a model runs them."""
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = torch.nn.Sequential(Pooling(batch.hidden.shape[-1], "mean"), Normalize())

    def call() -> Tensor:
        result: Tensor = modules({"token_embeddings": batch.hidden, "attention_mask": batch.mask})["sentence_embedding"]
        return result

    return call


FASTPOOL_PADDED = Provider("fastpool padded", "padded", fastpool_padded)
FASTPOOL_PACKED = Provider("fastpool packed", "packed", fastpool_packed)
BARE_LOOP = Provider("bare C loop", "packed", bare_loop)
EMBEDDING_BAG = Provider("embedding_bag", "packed", embedding_bag)
SEGMENT_REDUCE = Provider("segment_reduce", "packed", segment_reduce)
BMM = Provider("bmm", "padded", bmm)
COMPILED = Provider("torch.compile", "padded", compiled)
SENTENCE_TRANSFORMERS = Provider("sentence-transformers", "padded", sentence_transformers)

PROVIDERS = (
    FASTPOOL_PADDED,
    FASTPOOL_PACKED,
    BARE_LOOP,
    EMBEDDING_BAG,
    SEGMENT_REDUCE,
    BMM,
    COMPILED,
    SENTENCE_TRANSFORMERS,
)
