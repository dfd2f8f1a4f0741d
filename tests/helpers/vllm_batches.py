"""Batches of requests as vLLM hands them to its poolers, and what ops serve them."""

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = [7, 1, 130, 64, 33]
WIDTH = 48


def tokens(dtype: torch.dtype, lengths: list[int] = LENGTHS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(sum(lengths), WIDTH, generator=generator) + 0.25).to(dtype)


def metadata(
    engine: Any,
    lengths: list[int] = LENGTHS,
    wanted: Any = None,
    prompts: Any = None,
    index: torch.dtype = torch.int32,
    ids: Any = None,
    chunks: Any = None,
) -> Any:
    """For requests that are scheduled `lengths` tokens of their `prompts`; `wanted`: (dimensions, use_activation);
    `ids`: of their tokens; `chunks`: their sizes, or None."""
    scheduled, prompt_lens = torch.tensor(lengths, dtype=torch.int64), torch.tensor(prompts or lengths)
    wanted = wanted or [(None, True)] * len(lengths)
    made = engine.PoolingMetadata(
        prompt_lens=prompt_lens.to(torch.int64),
        prompt_token_ids=None,
        prompt_token_ids_cpu=None if ids is None else torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        pooling_params=[engine.PoolingParams(task="embed", dimensions=d, use_activation=a) for d, a in wanted],
        pooling_states=[engine.PoolingStates() for _ in lengths],
    )
    for params, size in zip(made.pooling_params, chunks or [None] * len(lengths), strict=True):
        if size is not None:  # before vLLM 0.33 there is no such field
            params.late_chunking_params = engine.LateChunkingParams(size)
    made.build_pooling_cursor(
        scheduled.numpy(), scheduled, torch.device("cpu"), torch.tensor(np.cumsum([0, *lengths]), dtype=index)
    )
    return made


class Ops(TorchDispatchMode):
    """The ops that reach the dispatcher, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, dict[str, Any]]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.called]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The keyword arguments of its calls."""
        return [options for called, options in self.called if called == name]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(a.alias_info is not None for a in op._schema.arguments):
            self.called.append((op.overloadpacket._qualified_op_name, kwargs or {}))
        return op(*args, **(kwargs or {}))
