"""Providers of pooling: fastpool, by backend and input layout, and the ways people pool today, all doing the same work.

Every provider gets the input it is made for (padded or packed) and ends, where asked to, with L2 normalisation. What it
can prepare once and keep (modules, indices, a compiled function) is made before the clock starts. Engines' ways are
written here from descriptions of what they do, with their faults: those show in the columns of errors.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

import fastpool
from benchmarks.bandwidth_cpu import build_floor
from benchmarks.cases import Batch

Call = Callable[[], Tensor]
_BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Provider:
    """`prepare(batch, normalize)` -> a call that pools."""

    name: str
    layout: str  # "padded" or "packed"
    prepare: Callable[[Batch, bool], Call]
    backend: str = "auto"  # of fastpool
    devices: tuple[str, ...] = _BOTH


# ---- fastpool


def fastpool_mask(batch: Batch, normalize: bool) -> Call:
    return lambda: fastpool.mean(batch.hidden, batch.mask, normalize=normalize)


def fastpool_lengths(batch: Batch, normalize: bool) -> Call:
    lengths = batch.cu_seqlens.diff()
    return lambda: fastpool.mean(batch.hidden, lengths=lengths, normalize=normalize)


def fastpool_packed(batch: Batch, normalize: bool) -> Call:
    return lambda: fastpool.mean(batch.packed, cu_seqlens=batch.cu_seqlens, normalize=normalize)


# ---- the formulas people write


def _finish(mean: Tensor, normalize: bool) -> Tensor:
    return F.normalize(mean, dim=-1) if normalize else mean


def masked_mean(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """With float32 sums and one rounding at the end: what torch.compile gets."""
    total = (hidden * mask[..., None].to(hidden.dtype)).sum(1, dtype=torch.float32)
    return _finish(total / mask.sum(1, keepdim=True).clamp(min=1), normalize).to(hidden.dtype)


@cache
def _compiled_mean() -> Callable[[Tensor, Tensor, bool], Tensor]:
    return torch.compile(masked_mean, dynamic=False)  # for each shape by itself, the compiler's best case


def compiled(batch: Batch, normalize: bool) -> Call:
    pool = _compiled_mean()
    return lambda: pool(batch.hidden, batch.mask, normalize)


def sentence_transformers(batch: Batch, normalize: bool) -> Call:
    """Its own modules, as a model runs them."""
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = torch.nn.Sequential(Pooling(batch.hidden.shape[-1], "mean"), *[Normalize()] * normalize)

    def call() -> Tensor:
        result: Tensor = modules({"token_embeddings": batch.hidden, "attention_mask": batch.mask})["sentence_embedding"]
        return result

    return call


def model_card(batch: Batch, normalize: bool) -> Call:
    """`mean_pooling` as thousands of model cards print it: the mask, expanded to the states' shape, in float32."""

    def call() -> Tensor:
        mask = batch.mask.unsqueeze(-1).expand(batch.hidden.size()).float()
        return _finish(torch.sum(batch.hidden * mask, 1) / torch.clamp(mask.sum(1), min=1e-9), normalize)

    return call


def bmm(batch: Batch, normalize: bool) -> Call:
    def call() -> Tensor:
        mask = batch.mask.to(batch.hidden.dtype)
        total = torch.bmm(mask[:, None], batch.hidden)[:, 0]
        # Counted in int64: bfloat16 would count 257 tokens as 256.
        return _finish(total / batch.mask.sum(1, keepdim=True).clamp(min=1), normalize)

    return call


# ---- over packed tokens


def embedding_bag(batch: Batch, normalize: bool) -> Call:
    rows = torch.arange(len(batch.packed), device=batch.packed.device)
    offsets = batch.cu_seqlens[:-1].long()
    return lambda: _finish(F.embedding_bag(rows, batch.packed, offsets, mode="mean"), normalize)


def segment_reduce(batch: Batch, normalize: bool) -> Call:
    offsets, unsafe = batch.cu_seqlens.long(), batch.packed.is_cuda  # unsafe spares it two synchronisations there
    return lambda: _finish(torch.segment_reduce(batch.packed, "mean", offsets=offsets, unsafe=unsafe), normalize)


def segment_csr(batch: Batch, normalize: bool) -> Call:
    import torch_scatter

    offsets = batch.cu_seqlens.long()
    return lambda: _finish(torch_scatter.segment_csr(batch.packed, offsets, reduce="mean"), normalize)


def loop(batch: Batch, normalize: bool) -> Call:
    """A text at a time."""
    bounds = batch.cu_seqlens.tolist()
    slices = [slice(*pair) for pair in pairwise(bounds)]
    return lambda: _finish(torch.stack([batch.packed[one].mean(0) for one in slices]), normalize)


_VLLM_CHUNK_BYTES = 16 << 20


def vllm(batch: Batch, normalize: bool) -> Call:
    """MeanPool: a float32 copy, chunk by chunk, added to its text's row (on GPUs by atomics); the result is float32."""
    packed, count = batch.packed, len(batch.cu_seqlens) - 1
    lengths = batch.cu_seqlens.diff().long()
    tokens, width = packed.shape
    step = max(1, _VLLM_CHUNK_BYTES // (4 * width))

    def call() -> Tensor:
        texts = torch.repeat_interleave(torch.arange(count, device=packed.device), lengths, output_size=tokens)
        total = torch.zeros(count, width, dtype=torch.float32, device=packed.device)
        for start in range(0, tokens, step):
            total.index_add_(0, texts[start : start + step], packed[start : start + step].float())
        return _finish(total / lengths[:, None], normalize)

    return call


def sglang(batch: Batch, normalize: bool) -> Call:
    """Prefix sums over the whole batch in the model's dtype, and their differences."""
    packed = batch.packed
    last, lengths = batch.cu_seqlens[1:].long() - 1, batch.cu_seqlens.diff().long()

    def call() -> Tensor:
        sums = packed.cumsum(0)
        before = torch.zeros_like(sums[last])
        before[1:] = sums[last[:-1]]
        return _finish((sums[last] - before) / lengths[:, None], normalize)

    return call


def bare_loop(batch: Batch, normalize: bool) -> Call:
    """sums += row in C, and nothing else: what stands between one read and any pooling in address order."""
    library = build_floor().bare
    if library is None:
        raise RuntimeError("needs a C compiler")
    if batch.packed.dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError("knows float32 and bfloat16 only")
    count, width = len(batch.cu_seqlens) - 1, batch.packed.shape[-1]
    cu_seqlens, is_bfloat16 = batch.cu_seqlens.long(), batch.packed.dtype == torch.bfloat16
    sizes = [ctypes.c_size_t(count), ctypes.c_size_t(width)]

    def call() -> Tensor:
        out = torch.empty(count, width)
        tokens, ends, means = (ctypes.c_void_p(t.data_ptr()) for t in (batch.packed, cu_seqlens, out))
        library.bare_mean(tokens, int(is_bfloat16), ends, *sizes, means)
        return _finish(out, normalize).to(batch.packed.dtype)

    return call


# ---- the tables

BACKENDS = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "auto")}
INPUT_LAYOUTS = {
    "mask": ("padded", fastpool_mask),
    "lengths": ("padded", fastpool_lengths),
    "packed": ("packed", fastpool_packed),
}


def ours(backend: str, input_layout: str) -> str:
    """The name of one of fastpool's providers."""
    return f"fastpool {backend}, {input_layout}"


FASTPOOL = tuple(
    Provider(
        ours(backend, input_layout),
        *INPUT_LAYOUTS[input_layout],
        backend,
        tuple(d for d in _BOTH if backend in BACKENDS[d]),
    )
    for backend in dict.fromkeys(backend for device in _BOTH for backend in BACKENDS[device])
    for input_layout in INPUT_LAYOUTS
)
COMPILED = Provider("torch.compile", "padded", compiled)
BARE_LOOP = Provider("bare C loop", "packed", bare_loop, devices=("cpu",))
PEERS = (
    Provider("sentence-transformers", "padded", sentence_transformers),
    Provider("model card", "padded", model_card),
    COMPILED,
    Provider("bmm", "padded", bmm),
    Provider("embedding_bag", "packed", embedding_bag),
    Provider("segment_reduce", "packed", segment_reduce),
    Provider("segment_csr", "packed", segment_csr),
    Provider("loop", "packed", loop),
    Provider("vLLM", "packed", vllm),
    Provider("SGLang", "packed", sglang),
    BARE_LOOP,
)
PROVIDERS = (*FASTPOOL, *PEERS)
LAYOUTS = {provider.name: provider.layout for provider in PROVIDERS}


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
