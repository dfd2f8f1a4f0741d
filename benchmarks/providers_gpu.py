"""Who pools on a GPU: each of fastpool's backends by each spelling, and the ways people pool today.

The engines' ways are written here from descriptions of what they do; what they keep between calls, or get from the
engine, is made before the clock starts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody names it
from torch import Tensor

import fastpool
from cases import Batch
from providers import Call, Provider, bmm, compiled, embedding_bag, fastpool_packed, fastpool_padded, segment_reduce

_VLLM_CHUNK_BYTES = 16 << 20


def fastpool_lengths(batch: Batch) -> Call:
    lengths = batch.cu_seqlens.diff()
    return lambda: fastpool.mean(batch.hidden, lengths=lengths, normalize=True)


def sentence_transformers(batch: Batch) -> Call:
    """Its modules' eager formula: the masked states are a tensor of their own, sums are float32."""

    def call() -> Tensor:
        mask = batch.mask[..., None].to(batch.hidden.dtype)
        total = (batch.hidden * mask).sum(1, dtype=torch.float32)
        mean = total / batch.mask.sum(1, keepdim=True).float().clamp(min=1e-9)
        return F.normalize(mean.to(batch.hidden.dtype), dim=-1)

    return call


def vllm(batch: Batch) -> Call:
    """MeanPool: a float32 copy, chunk by chunk, added to its sequence's row by atomics; the result is float32."""
    packed, count = batch.packed, len(batch.cu_seqlens) - 1
    lengths = batch.cu_seqlens.diff().long()
    tokens, width = packed.shape
    step = max(1, _VLLM_CHUNK_BYTES // (4 * width))

    def call() -> Tensor:
        sequences = torch.repeat_interleave(torch.arange(count, device=packed.device), lengths, output_size=tokens)
        total = torch.zeros(count, width, dtype=torch.float32, device=packed.device)
        for start in range(0, tokens, step):
            total.index_add_(0, sequences[start : start + step], packed[start : start + step].float())
        return F.normalize(total / lengths[:, None], dim=-1)

    return call


def sglang(batch: Batch) -> Call:
    """Prefix sums over the whole batch and their differences. In float32, as it has them for EmbeddingGemma 2: prefix
    sums in a 16-bit model's own dtype are far off."""
    packed = batch.packed
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()

    def call() -> Tensor:
        sums = packed.cumsum(0, dtype=torch.float32)
        mean = (sums[starts + lengths - 1] - sums[starts] + packed[starts]) / lengths[:, None]
        return F.normalize(mean, dim=-1).to(packed.dtype)

    return call


def _ours(backend: str, spelling: str, layout: str, prepare: Callable[[Batch], Call]) -> Provider:
    return Provider(f"fastpool {backend}, {spelling}", layout, prepare, backend)


BACKENDS = ("triton", "native", "auto")
FASTPOOL = tuple(
    _ours(backend, *spelling)
    for backend in BACKENDS
    for spelling in (
        ("mask", "padded", fastpool_padded),
        ("lengths", "padded", fastpool_lengths),
        ("packed", "packed", fastpool_packed),
    )
)
COMPILED = Provider("torch.compile", "padded", compiled)
PEERS = (
    Provider("sentence-transformers", "padded", sentence_transformers),
    COMPILED,
    Provider("bmm", "padded", bmm),
    Provider("embedding_bag", "packed", embedding_bag),
    Provider("segment_reduce", "packed", segment_reduce),
    Provider("vLLM", "packed", vllm),
    Provider("SGLang", "packed", sglang),
)


def must_move(provider: Provider, batch: Batch) -> int:
    """Bytes that no pooling with this input can spare: real tokens, the tensors that say where they are, the result."""
    by = batch.cu_seqlens if provider.layout == "packed" or "lengths" in provider.name else batch.mask
    result = batch.packed.element_size() * batch.packed.shape[-1] * (len(batch.cu_seqlens) - 1)
    return batch.real_bytes + by.nbytes + result


def backend_of(provider: Provider, batch: Batch) -> tuple[str, str]:
    """Which of fastpool's backends serves the provider's calls, and why the one asked for does not: one of them empty.

    Empty both for other providers."""
    if provider not in FASTPOOL:
        return "", ""
    hidden = batch.packed if provider.layout == "packed" else batch.hidden
    found = fastpool.explain(hidden, cu_seqlens=batch.cu_seqlens if provider.layout == "packed" else None)
    return (found.backend, "") if found.backend else ("", found.reasons[provider.backend])
