"""Stand-ins for what fastpool touches of vLLM 0.32 and 0.33: the same names, modules, signatures and results.

Written from vLLM's interfaces, in the plainest words; scripts/check_vllm.sh runs the same tests against vLLM itself.
"""

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(slots=True)
class LateChunkingParams:
    chunk_size: int


@dataclass
class PoolingParams:
    use_activation: bool | None = None
    dimensions: int | None = None
    step_tag_id: int | None = None
    task: str | None = None
    late_chunking_params: LateChunkingParams | None = None


class PoolingStates:
    def __init__(self) -> None:
        self.hidden_states_cache: list[Tensor] = []


@dataclass
class PoolingCursor:
    first_token_indices_gpu: Tensor
    last_token_indices_gpu: Tensor
    prompt_lens_cpu: Tensor
    seq_lens_cpu: Tensor
    num_scheduled_tokens_cpu: Tensor
    partial_prefill: bool
    finished_mask: list[bool]

    def __getitem__(self, indices: slice) -> "PoolingCursor":
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: part if isinstance(part, bool) else part[indices] for name, part in parts.items()}
        parts["partial_prefill"] = not torch.equal(parts["prompt_lens_cpu"], parts["num_scheduled_tokens_cpu"])
        return PoolingCursor(**parts)

    def is_partial_prefill(self) -> bool:
        return self.partial_prefill


@dataclass
class PoolingMetadata:
    prompt_lens: Tensor
    prompt_token_ids: Tensor | None
    prompt_token_ids_cpu: Tensor | None
    pooling_params: list[PoolingParams]
    pooling_states: list[PoolingStates]
    pooling_cursor: PoolingCursor | None = None

    def __getitem__(self, indices: slice) -> "PoolingMetadata":
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return PoolingMetadata(**{name: None if part is None else part[indices] for name, part in parts.items()})

    def get_prompt_token_ids_cpu(self) -> list[Tensor]:
        if self.prompt_token_ids_cpu is None:
            raise ValueError("prompt_token_ids is required but was not set")
        return [self.prompt_token_ids_cpu[row, :length] for row, length in enumerate(self.prompt_lens)]

    def get_pooling_cursor(self) -> PoolingCursor:
        if self.pooling_cursor is None:
            raise RuntimeError("pooling_cursor has not been initialized")
        return self.pooling_cursor

    def build_pooling_cursor(
        self,
        num_scheduled_tokens_np: np.ndarray,
        seq_lens_cpu: Tensor,
        device: torch.device,
        query_start_loc_gpu: Tensor | None = None,
    ) -> None:
        scheduled = torch.from_numpy(num_scheduled_tokens_np)
        if query_start_loc_gpu is None:
            query_start_loc_gpu = nn.functional.pad(scheduled.cumsum(0), (1, 0)).to(device)
        self.pooling_cursor = PoolingCursor(
            first_token_indices_gpu=query_start_loc_gpu[:-1],
            last_token_indices_gpu=query_start_loc_gpu[1:] - 1,
            prompt_lens_cpu=self.prompt_lens,
            seq_lens_cpu=seq_lens_cpu,
            num_scheduled_tokens_cpu=scheduled,
            partial_prefill=not torch.equal(self.prompt_lens, scheduled),
            finished_mask=(self.prompt_lens == seq_lens_cpu).tolist(),
        )


class PoolerActivation(nn.Module):
    def forward(self, pooled_data: Any) -> Any:
        if isinstance(pooled_data, list):
            return [self.forward_chunk(one) for one in pooled_data]
        return self.forward_chunk(pooled_data)


class PoolerIdentity(PoolerActivation):
    def forward_chunk(self, pooled_data: Tensor) -> Tensor:
        return pooled_data


class PoolerNormalize(PoolerActivation):
    def forward_chunk(self, pooled_data: Tensor) -> Tensor:
        return nn.functional.normalize(pooled_data, dim=-1)


class SequencePoolingMethod(nn.Module):
    pass


class CLSPool(SequencePoolingMethod):
    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Tensor:
        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill():
            raise RuntimeError("partial prefill is not supported with CLS pooling")
        return hidden_states[cursor.first_token_indices_gpu]


class LastPool(SequencePoolingMethod):
    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Tensor:
        return hidden_states[pooling_metadata.get_pooling_cursor().last_token_indices_gpu]


class MeanPool(SequencePoolingMethod):
    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Tensor:
        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill():
            raise RuntimeError("partial prefill is not supported with MEAN pooling")
        result = hidden_states.new_zeros((len(cursor.prompt_lens_cpu), hidden_states.shape[-1]), dtype=torch.float32)
        for row, tokens in enumerate(hidden_states.split(cursor.prompt_lens_cpu.tolist())):
            result[row] = tokens.float().mean(0)
        return result


def get_seq_pooling_method(pooling_type: str) -> SequencePoolingMethod:
    return {"CLS": CLSPool, "LAST": LastPool, "MEAN": MeanPool}[pooling_type]()


class EmbeddingPoolerHead(nn.Module):
    def __init__(self, projector: Any = None, head_dtype: Any = None, activation: Any = None) -> None:
        super().__init__()
        self.projector, self.head_dtype, self.activation = projector, head_dtype, activation

    def forward(self, pooled_data: Any, pooling_metadata: PoolingMetadata) -> Any:
        params = pooling_metadata.pooling_params
        if len(pooled_data) != len(params):
            raise ValueError(f"pooled_data length ({len(pooled_data)}) does not match ({len(params)})")
        if isinstance(pooled_data, list):
            pooled_data = torch.stack(pooled_data)
        if self.head_dtype is not None:
            pooled_data = pooled_data.to(self.head_dtype)
        if self.projector is not None:
            pooled_data = self.projector(pooled_data)
        vectors = [vector[: one.dimensions] for vector, one in zip(pooled_data, params, strict=True)]
        if self.activation is not None:
            vectors = [
                self.activation(vector) if one.use_activation else vector
                for vector, one in zip(vectors, params, strict=True)
            ]
        alike = len({(one.dimensions, self.activation and one.use_activation) for one in params}) == 1
        return torch.stack(vectors) if alike else vectors


class SequencePooler(nn.Module):
    def __init__(self, pooling: Any, head: Any) -> None:
        super().__init__()
        self.pooling, self.head = pooling, head

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Any:
        return self.head(self.pooling(hidden_states, pooling_metadata), pooling_metadata)


class AllPool(nn.Module):
    def __init__(self, output_sizes_fn: Any = None) -> None:
        super().__init__()
        self.output_sizes_fn, self.enable_chunked_prefill, self.clone_finished = output_sizes_fn, False, False

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        cursor = pooling_metadata.get_pooling_cursor()
        texts = hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist())
        if self.output_sizes_fn is not None:
            texts = [text[:, :size] for text, size in zip(texts, self.output_sizes_fn(), strict=True)]
        if not self.enable_chunked_prefill:
            return [text.clone() if self.clone_finished else text for text in texts]
        result: list[Tensor | None] = []
        for text, state, finished in zip(texts, pooling_metadata.pooling_states, cursor.finished_mask, strict=True):
            state.hidden_states_cache.append(text.clone())
            result.append(torch.cat(state.hidden_states_cache) if finished else None)
            if finished:
                state.hidden_states_cache.clear()
        return result


class StepPool(AllPool):
    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        texts = super().forward(hidden_states, pooling_metadata)
        ids_of_texts = pooling_metadata.get_prompt_token_ids_cpu()
        return [
            None if text is None else text[(ids == one.step_tag_id).nonzero()[:, 0]]
            for text, ids, one in zip(texts, ids_of_texts, pooling_metadata.pooling_params, strict=True)
        ]


def _mean_pool_chunks(data: Tensor, chunk_size: int) -> Tensor:
    return torch.stack([chunk.float().mean(0) for chunk in data.split(min(chunk_size, len(data)))])


class TokenEmbeddingPoolerHead(nn.Module):
    def __init__(self, head_dtype: Any = None, projector: Any = None, activation: Any = None) -> None:
        super().__init__()
        self.projector, self.head_dtype, self.activation = projector, head_dtype, activation

    def forward(self, pooled_data: Any, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        params = pooling_metadata.pooling_params
        if len(pooled_data) != len(params):
            raise ValueError(f"pooled_data length ({len(pooled_data)}) does not match ({len(params)})")
        return [self.forward_chunk(text, one) for text, one in zip(pooled_data, params, strict=True)]

    def forward_chunk(self, pooled_data: Tensor | None, pooling_param: PoolingParams) -> Tensor | None:
        if pooled_data is None:
            return None
        if pooling_param.late_chunking_params is not None:
            means = _mean_pool_chunks(pooled_data, pooling_param.late_chunking_params.chunk_size)
            pooled_data = means if self.head_dtype else means.to(pooled_data.dtype)
        if self.head_dtype is not None:
            pooled_data = pooled_data.to(self.head_dtype)
        if self.projector is not None:
            pooled_data = self.projector(pooled_data)
        pooled_data = pooled_data[:, : pooling_param.dimensions]
        normalizes = self.activation is not None and pooling_param.use_activation
        return self.activation(pooled_data) if normalizes else pooled_data


class TokenPooler(nn.Module):
    def __init__(self, pooling: Any, head: Any = None) -> None:
        super().__init__()
        self.pooling, self.head = pooling, head

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Any:
        pooled_data = self.pooling(hidden_states, pooling_metadata)
        return pooled_data if self.head is None else self.head(pooled_data, pooling_metadata)


class BertMLMHead(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int, layer_norm_eps: float = 1e-12) -> None:
        super().__init__()
        self.dense, self.activation = nn.Linear(hidden_size, hidden_size), nn.GELU()
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))


class SPLADESparsePooler(nn.Module):
    def __init__(
        self,
        mlm_head: nn.Module,
        cls_token_id: int | None = 101,
        sep_token_id: int | None = 102,
        pooling: str = "max",
        remove_cls_sep: bool = True,
    ) -> None:
        super().__init__()
        self.mlm_head, self.pooling = mlm_head, pooling
        self.cls_token_id, self.sep_token_id, self.remove_cls_sep = cls_token_id, sep_token_id, remove_cls_sep

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Tensor:
        vectors = []
        lengths = pooling_metadata.prompt_lens.tolist()
        texts = hidden_states[: sum(lengths)].split(lengths)
        for states, ids in zip(texts, pooling_metadata.get_prompt_token_ids_cpu(), strict=True):
            first, behind = 0, len(states)
            if self.remove_cls_sep:
                first += int(ids[0]) == self.cls_token_id
                behind = max(first, behind - (int(ids[-1]) == self.sep_token_id))
            if first == behind:
                vectors.append(states.new_zeros(self.mlm_head.decoder.out_features))
                continue
            words = torch.log1p(torch.relu(self.mlm_head(states[first:behind])))
            vectors.append(words.sum(0) if self.pooling == "sum" else words.amax(0))
        return torch.stack(vectors)


_POOLER = "vllm.model_executor.layers.pooler"
_HOLDS: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": "0.33.0"},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    _POOLER: {},
    f"{_POOLER}.activations": {"PoolerIdentity": PoolerIdentity, "PoolerNormalize": PoolerNormalize},
    f"{_POOLER}.seqwise": {
        "CLSPool": CLSPool,
        "EmbeddingPoolerHead": EmbeddingPoolerHead,
        "LastPool": LastPool,
        "MeanPool": MeanPool,
        "SequencePooler": SequencePooler,
        "SequencePoolingMethod": SequencePoolingMethod,
        "get_seq_pooling_method": get_seq_pooling_method,
    },
    f"{_POOLER}.seqwise.methods": {"_MEAN_POOL_ACCUMULATION_CHUNK_BYTES": 16 * 1024 * 1024},
    f"{_POOLER}.tokwise": {
        "AllPool": AllPool,
        "StepPool": StepPool,
        "TokenEmbeddingPoolerHead": TokenEmbeddingPoolerHead,
        "TokenPooler": TokenPooler,
    },
    f"{_POOLER}.tokwise.heads": {"_mean_pool_chunks": _mean_pool_chunks},
    "vllm.model_executor.models": {},
    "vllm.model_executor.models.bert": {"BertMLMHead": BertMLMHead, "SPLADESparsePooler": SPLADESparsePooler},
    "vllm.pooling_params": {"LateChunkingParams": LateChunkingParams, "PoolingParams": PoolingParams},
    "vllm.v1": {},
    "vllm.v1.pool": {},
    "vllm.v1.pool.metadata": {
        "PoolingCursor": PoolingCursor,
        "PoolingMetadata": PoolingMetadata,
        "PoolingStates": PoolingStates,
    },
}


def modules() -> dict[str, ModuleType]:
    """What `import` is to find, for sys.modules."""
    made = {}
    for name, holds in _HOLDS.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(holds)
    return made
