"""SGLang's CLS, LAST and MEAN pooling by fastpool.

SGLang calls `register` in each of its processes, by the entry point `sglang.srt.plugins`, and replaces its function by
the hook registered here, wherever it has been imported to. Its Pooler truncates and normalises as before. Read against
SGLang 0.5.21 to 0.5.23, sglang/srt/layers/pooler.py and sglang/srt/plugins/hook_registry.py.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ._plugin import UnexpectedEngineError, expect_signature, start

_MODES = {"LAST": "last", "CLS": "cls", "MEAN": "mean"}


@cache
def register() -> None:
    """Makes fastpool pool for SGLang in this process, once SGLang applies its hooks; a second call does nothing.

    Where FASTPOOL_SGLANG=0 nothing happens; where SGLang is not as expected, nothing but a warning in the log.
    """
    start("SGLang", ("0.5.21", "0.5.22", "0.5.23"), _attach)


def _attach() -> None:
    pooler: Any = import_module("sglang.srt.layers.pooler")
    hooks: Any = import_module("sglang.srt.plugins.hook_registry")
    parameters = "pooling_type", "hidden_states", "forward_batch"
    expect_signature(pooler.pool_hidden_states, pooler.Pooler, *parameters)
    kinds = {kind.name: kind for kind in pooler.PoolingType}
    if set(kinds) != set(_MODES):
        raise UnexpectedEngineError(f"PoolingType has {', '.join(kinds)}, expected {', '.join(_MODES)}")
    modes = {kinds[name]: mode for name, mode in _MODES.items()}

    def pool_hidden_states(pooling_type: Any, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        if pooling_type not in modes:
            raise ValueError(f"Unsupported pooling type: {pooling_type}")
        return _pool(modes[pooling_type], hidden_states, forward_batch.extend_seq_lens)

    target = "sglang.srt.layers.pooler.pool_hidden_states"
    hooks.HookRegistry.register(target, pool_hidden_states, hooks.HookType.REPLACE)


def _pool(mode: str, hidden: Tensor, lengths: Tensor) -> Tensor:
    """[B, H] of hidden's dtype, as SGLang gives it; nothing is read back from the device."""
    # Filled in place: concatenating a zero costs a kernel more.
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=hidden.device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    result: Tensor = getattr(functional, mode)(hidden, cu_seqlens=cu_seqlens)
    return result
