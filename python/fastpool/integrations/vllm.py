"""vLLM's CLS, LAST and MEAN pooling by fastpool, with the embedding head's truncation and normalisation in one pass;
its SPLADE pooling; and its embeddings of tokens and of their chunks (late chunking).

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. It has no registry of pooling
methods, so `forward` is replaced in the classes: objects, isinstance and everything else about them stay. Read against
vLLM 0.32.0 and 0.33.0, vllm/model_executor/layers/pooler and models/bert.py.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import functional, sparse
from ..calls import accumulator
from ..checks import FLOATS
from ._plugin import UnexpectedEngineError, expect_signature, start


@cache
def register() -> None:
    """Makes fastpool pool for vLLM in this process; a second call does nothing.

    Where FASTPOOL_VLLM=0 nothing happens; where vLLM is not as expected, nothing but a warning in the log.
    """
    start("vLLM", ("0.32", "0.33"), _attach, ("SPLADE", _attach_splade), ("token", _attach_tokens))


def _attach() -> None:
    seqwise: Any = import_module("vllm.model_executor.layers.pooler.seqwise")
    normalize: Any = import_module("vllm.model_executor.layers.pooler.activations").PoolerNormalize
    cursor: Any = import_module("vllm.v1.pool.metadata").PoolingCursor
    pooler, head = seqwise.SequencePooler, seqwise.EmbeddingPoolerHead
    modes = {seqwise.CLSPool: "cls", seqwise.LastPool: "last", seqwise.MeanPool: "mean"}

    for method in modes:
        expect_signature(method.forward, method, "self", "hidden_states", "pooling_metadata")
    expect_signature(pooler.__init__, pooler, "self", "pooling", "head")
    expect_signature(pooler.forward, pooler, "self", "hidden_states", "pooling_metadata")
    expect_signature(head.__init__, head, "self", "projector", "head_dtype", "activation")
    expect_signature(head.forward, head, "self", "pooled_data", "pooling_metadata")
    expect_signature(cursor.is_partial_prefill, cursor, "self")
    _expect_fields(cursor, "first_token_indices_gpu", "last_token_indices_gpu")

    theirs = pooler.forward

    def forward(self: Any, hidden_states: Tensor, pooling_metadata: Any) -> Tensor | list[Tensor]:
        mode = modes.get(type(self.pooling))
        requests = len(pooling_metadata.pooling_params)
        segments = len(pooling_metadata.get_pooling_cursor().first_token_indices_gpu)
        plain = _only_normalizes(self.head, head, normalize) and self.head.projector is None
        if mode is None or requests != segments or not plain:
            result: Tensor | list[Tensor] = theirs(self, hidden_states, pooling_metadata)
            return result
        return _embed(mode, hidden_states, pooling_metadata, self.head)

    for method, mode in modes.items():
        method.forward = _method_forward(mode)
    pooler.forward = forward


def _expect_fields(owner: Any, *names: str) -> None:
    """Raises UnexpectedEngineError unless a dataclass has these fields."""
    if missing := set(names) - {field.name for field in fields(owner)}:
        raise UnexpectedEngineError(f"{owner.__name__} has no {' and no '.join(sorted(missing))}")


def _only_normalizes(given: Any, head: Any, normalize: Any) -> bool:
    """Whether it is vLLM's own head, and what it does behind its projector is fastpool's to do."""
    return (
        type(given) is head
        and (given.activation is None or type(given.activation) is normalize)
        and (given.head_dtype is None or given.head_dtype in FLOATS)
    )


def _attach_splade() -> None:
    bert: Any = import_module("vllm.model_executor.models.bert")
    metadata: Any = import_module("vllm.v1.pool.metadata").PoolingMetadata
    pooler, head = bert.SPLADESparsePooler, bert.BertMLMHead

    options = ("self", "mlm_head", "cls_token_id", "sep_token_id", "pooling", "remove_cls_sep")
    expect_signature(pooler.__init__, pooler, *options)
    expect_signature(pooler.forward, pooler, "self", "hidden_states", "pooling_metadata")
    expect_signature(head.__init__, head, "self", "hidden_size", "vocab_size", "layer_norm_eps")
    expect_signature(head.forward, head, "self", "hidden_states")
    _expect_fields(metadata, "prompt_lens", "prompt_token_ids_cpu")

    theirs = pooler.forward

    def forward(self: Any, hidden_states: Tensor, pooling_metadata: Any) -> Tensor:
        lengths, ids = pooling_metadata.prompt_lens.tolist(), pooling_metadata.prompt_token_ids_cpu
        plain = type(self.mlm_head) is head and type(self.mlm_head.decoder) is nn.Linear
        if not plain or ids is None or not lengths or sum(lengths) != len(hidden_states):
            result: Tensor = theirs(self, hidden_states, pooling_metadata)
            return result
        return _splade(self, hidden_states, lengths, ids)

    pooler.forward = forward


def _splade(pooler: Any, hidden: Tensor, lengths: list[int], token_ids: Tensor) -> Tensor:
    """[N, V]; of a text without anything between CLS and SEP zeros. `token_ids`: on the CPU."""
    cls, sep = (pooler.cls_token_id, pooler.sep_token_id) if pooler.remove_cls_sep else (None, None)
    starts, ends, begin = list[int](), list[int](), 0
    for length, ids in zip(lengths, token_ids.numpy(), strict=True):
        starts.append(begin + (int(ids[0]) == cls))
        ends.append(max(starts[-1], begin + length - (int(ids[length - 1]) == sep)))
        begin += length
    head = pooler.mlm_head
    states = head.layer_norm(head.activation(head.dense(hidden)))
    bounds = _on_device([starts, ends], hidden.device)
    return sparse.splade_linear(
        states, head.decoder.weight, head.decoder.bias, pooling=pooler.pooling, starts=bounds[0], ends=bounds[1]
    )


def _attach_tokens() -> None:
    tokwise: Any = import_module("vllm.model_executor.layers.pooler.tokwise")
    normalize: Any = import_module("vllm.model_executor.layers.pooler.activations").PoolerNormalize
    cursor: Any = import_module("vllm.v1.pool.metadata").PoolingCursor
    pooler, method, head = tokwise.TokenPooler, tokwise.AllPool, tokwise.TokenEmbeddingPoolerHead

    expect_signature(pooler.__init__, pooler, "self", "pooling", "head")
    expect_signature(pooler.forward, pooler, "self", "hidden_states", "pooling_metadata")
    expect_signature(method.forward, method, "self", "hidden_states", "pooling_metadata")
    expect_signature(head.__init__, head, "self", "head_dtype", "projector", "activation")
    expect_signature(head.forward, head, "self", "pooled_data", "pooling_metadata")
    expect_signature(head.forward_chunk, head, "self", "pooled_data", "pooling_param")
    params: Any = import_module("vllm.pooling_params")
    if late := hasattr(params.PoolingParams, "late_chunking_params"):  # 0.32 has none
        heads: Any = import_module("vllm.model_executor.layers.pooler.tokwise.heads")
        expect_signature(heads._mean_pool_chunks, head, "data", "chunk_size")
        if not hasattr(params.LateChunkingParams, "chunk_size"):
            raise UnexpectedEngineError("LateChunkingParams has no chunk_size")
    expect_signature(method.__init__, method, "self", *(["output_sizes_fn"] if late else []))
    expect_signature(cursor.is_partial_prefill, cursor, "self")
    _expect_fields(cursor, "num_scheduled_tokens_cpu")

    theirs = pooler.forward

    def forward(self: Any, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        plain = type(self.pooling) is method and _only_normalizes(self.head, head, normalize)
        # Where LoRAs have classes each request has its own width.
        plain = plain and getattr(self.pooling, "output_sizes_fn", None) is None and _by_rows(self.head.projector)
        if not plain or not _whole(pooling_metadata):
            result: list[Tensor | None] = theirs(self, hidden_states, pooling_metadata)
            return result
        return [*_embed_tokens(hidden_states, pooling_metadata, self.head)]

    pooler.forward = forward


def _whole(metadata: Any) -> bool:
    """Whether this step has all tokens of its prompts, and some prompt: of parts vLLM keeps states until the rest is
    there."""
    cursor = metadata.get_pooling_cursor()
    requests = len(metadata.pooling_params)
    return not cursor.is_partial_prefill() and 0 < requests == len(cursor.num_scheduled_tokens_cpu)


_BY_ROWS = (nn.Linear, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh)


def _by_rows(projector: Any) -> bool:
    """Whether a row's result is known to depend on that row alone: none, a ColBERT's or chains of Dense layers."""
    layers = list(projector) if type(projector) is nn.Sequential else [projector]
    return projector is None or all(type(layer) in _BY_ROWS for layer in layers)


def _embed_tokens(hidden: Tensor, metadata: Any, head: Any) -> list[Tensor]:
    """The head's vectors of each request's tokens, or of the means of its chunks: [their number, truncate_dim or
    width]."""
    rows, states = metadata.get_pooling_cursor().num_scheduled_tokens_cpu.tolist(), hidden
    out_dtype = head.head_dtype or hidden.dtype
    late = [getattr(request, "late_chunking_params", None) for request in metadata.pooling_params]
    if any(one is not None for one in late):
        # A token is the mean of a chunk of one, where others are not chunked.
        starts, ends, rows = _chunks(rows, [1 if one is None else one.chunk_size for one in late], hidden.device)
        mean_dtype = accumulator(hidden.dtype) if head.projector is None else out_dtype
        states = functional.mean(hidden, starts=starts, ends=ends, out_dtype=mean_dtype)
    if head.projector is not None:
        states = head.projector(states.to(out_dtype))
        out_dtype = states.dtype
    wanted = _wanted(metadata, head, states.shape[-1])
    if states is hidden and out_dtype == hidden.dtype and not all(normalize for _, normalize in wanted):
        states = hidden.clone()  # vLLM's next step overwrites hidden, and results may still be read then
    return _finish(states, wanted, out_dtype, rows)


def _chunks(lengths: list[int], sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Starts and ends of the chunks of requests, one request behind another, and how many each of them has."""
    starts, ends, counts, begin = list[int](), list[int](), list[int](), 0
    for length, size in zip(lengths, sizes, strict=True):
        firsts = range(begin, begin + length, size)
        starts += firsts
        ends += [min(first + size, firsts.stop) for first in firsts]
        counts.append(len(firsts))
        begin = firsts.stop
    bounds = _on_device([starts, ends], device)
    return bounds[0], bounds[1], counts


def _method_forward(mode: str) -> Callable[[Any, Tensor, Any], Tensor]:
    def forward(self: Any, hidden_states: Tensor, pooling_metadata: Any) -> Tensor:
        return _pool(mode, hidden_states, pooling_metadata, out_dtype=_pooled_dtype(mode, hidden_states))

    return forward


def _pooled_dtype(mode: str, hidden: Tensor) -> torch.dtype:
    """What vLLM's method gives: a mean is float32 whatever the model's dtype."""
    return torch.float32 if mode == "mean" else hidden.dtype


def _pool(mode: str, hidden: Tensor, metadata: Any, **epilogue: Any) -> Tensor:
    """[N, truncate_dim or H]; of every request the tokens of this step. Nothing is read back from the device.

    Raises RuntimeError for a part of a prompt. The last token of a part is allowed: vLLM drops the result until the
    prompt is complete.
    """
    cursor = metadata.get_pooling_cursor()
    if mode != "last" and cursor.is_partial_prefill():
        raise RuntimeError(f"partial prefill is not supported with {mode.upper()} pooling")
    starts, ends = cursor.first_token_indices_gpu, cursor.last_token_indices_gpu + 1
    result: Tensor = getattr(functional, mode)(hidden, starts=starts, ends=ends, **epilogue)
    return result


def _embed(mode: str, hidden: Tensor, metadata: Any, head: Any) -> Tensor | list[Tensor]:
    """The pooling method and its head: [N, truncate_dim or H], or a list of vectors where requests ask for different
    things."""
    out_dtype = head.head_dtype or _pooled_dtype(mode, hidden)
    wanted = _wanted(metadata, head, hidden.shape[-1])
    if len(set(wanted)) <= 1:
        truncate_dim, normalize = wanted[0] if wanted else (None, False)
        return _pool(mode, hidden, metadata, truncate_dim=truncate_dim, normalize=normalize, out_dtype=out_dtype)
    # One pooling for all, in the accumulator's dtype, and one normalisation of what wants it: a request keeps the bits
    # it has where all requests want the same (but for float64 states, which .to rounds to 16 bits by way of float32).
    pooled = _pool(mode, hidden, metadata, out_dtype=accumulator(hidden.dtype))
    return _finish(pooled, wanted, out_dtype)


def _wanted(metadata: Any, head: Any, width: int) -> list[tuple[int | None, bool]]:
    """Of each request: how many columns, None for all there are, and whether normalised."""
    return [
        (
            None if request.dimensions is None else min(request.dimensions, width),
            head.activation is not None and bool(request.use_activation),
        )
        for request in metadata.pooling_params
    ]


def _finish(
    x: Tensor, wanted: list[tuple[int | None, bool]], out_dtype: torch.dtype, rows: list[int] | None = None
) -> list[Tensor]:
    """Of x [N, width] what each request wants, of its one row, or of so many as `rows` say: in one normalisation."""
    sizes = [x.shape[-1] if truncate_dim is None else truncate_dim for truncate_dim, _ in wanted]
    normalized = [size if normalize else 0 for size, (_, normalize) in zip(sizes, wanted, strict=True)]

    def apart(x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind() if rows is None else x.split(rows)

    plain = apart(x.to(out_dtype)) if 0 in normalized else ()
    unit: tuple[Tensor, ...] = ()
    if most := max(normalized):
        truncate_dims = None
        if not {0, most} >= set(normalized):  # else they need no tensor, nor its copy to the device
            each = np.repeat(normalized, 1 if rows is None else rows)
            truncate_dims = _on_device(each.tolist(), x.device)
        unit = apart(functional.l2_normalize(x, truncate_dim=most, truncate_dims=truncate_dims, out_dtype=out_dtype))
    return [(unit if normalized[row] else plain)[row][..., :size] for row, size in enumerate(sizes)]


def _on_device(values: list[Any], device: torch.device) -> Tensor:
    """Without waiting for it, as vLLM's own async_tensor_h2d copies lists."""
    host = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
