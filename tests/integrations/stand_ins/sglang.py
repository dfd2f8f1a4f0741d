"""Stand-ins for what fastpool touches of SGLang 0.5.21 to 0.5.23: the same names, modules, signatures and results.

Written from SGLang's interfaces, in the plainest words; scripts/check_sglang.sh runs the same tests on SGLang itself.
"""

import functools
import logging
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn


class PoolingType(IntEnum):
    LAST = 0
    CLS = 1
    MEAN = 2


@dataclass
class EmbeddingPoolerOutput:
    embeddings: Any
    pooled_hidden_states: Any = None


def pool_hidden_states(pooling_type: PoolingType, hidden_states: Tensor, forward_batch: Any) -> Tensor:
    lengths = forward_batch.extend_seq_lens
    ends = lengths.cumsum(0)
    if pooling_type == PoolingType.LAST:
        return hidden_states[ends - 1]
    if pooling_type == PoolingType.CLS:
        return hidden_states[ends - lengths]
    if pooling_type == PoolingType.MEAN:
        running = nn.functional.pad(hidden_states.cumsum(0), (0, 0, 1, 0))
        return (running[ends] - running[ends - lengths]) / lengths[:, None]
    raise ValueError(f"Unsupported pooling type: {pooling_type}")


class Pooler(nn.Module):
    def __init__(self, pooling_type: PoolingType, normalize: bool) -> None:
        super().__init__()
        self.pooling_type, self.normalize = pooling_type, normalize

    def forward(self, hidden_states: Tensor, forward_batch: Any) -> EmbeddingPoolerOutput:
        # Looked up where the engine's own module would hold it, since that is what a hook replaces.
        pool = sys.modules["sglang.srt.layers.pooler"].pool_hidden_states
        pooled = pool(self.pooling_type, hidden_states, forward_batch)
        dimensions = forward_batch.dimensions
        if dimensions is not None:
            alike = len(set(dimensions)) == 1
            pooled = pooled[:, : dimensions[0]] if alike else [v[:d] for v, d in zip(pooled, dimensions, strict=True)]
        if self.normalize:
            each = isinstance(pooled, list)
            pooled = (
                [nn.functional.normalize(v, dim=-1) for v in pooled]
                if each
                else nn.functional.normalize(pooled, dim=-1)
            )
        return EmbeddingPoolerOutput(embeddings=pooled)


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Of REPLACE hooks on functions alone."""

    _hooks: ClassVar[dict[str, list[Any]]] = defaultdict(list)
    _patched: ClassVar[set[str]] = set()

    @classmethod
    def register(
        cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER, *, source: Any = None
    ) -> None:
        if cls._hooks[target]:
            logging.getLogger("sglang.srt.plugins.hook_registry").warning("Multiple REPLACE hooks on '%s'", target)
        cls._hooks[target].append((hook_type, hook, source))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hooks in cls._hooks.items():
            if target in cls._patched or not hooks:
                continue
            holder, _, name = target.rpartition(".")
            original = getattr(pkgutil.resolve_name(holder), name)
            (hook_type, hook, _source) = hooks[-1]
            assert hook_type == HookType.REPLACE

            @functools.wraps(original)
            def replacement(*args: Any, hook: Any = hook, **kwargs: Any) -> Any:
                return hook(*args, **kwargs)

            for module in list(sys.modules.values()):  # those too that have imported it by name
                if isinstance(module, ModuleType):
                    for key, value in list(vars(module).items()):
                        if value is original:
                            setattr(module, key, replacement)
            cls._patched.add(target)

    @classmethod
    def reset(cls) -> None:
        cls._hooks.clear()
        cls._patched.clear()


_HOLDS: dict[str, dict[str, Any]] = {
    "sglang": {"__version__": "0.5.23"},
    "sglang.srt": {},
    "sglang.srt.layers": {},
    "sglang.srt.layers.pooler": {
        "EmbeddingPoolerOutput": EmbeddingPoolerOutput,
        "Pooler": Pooler,
        "PoolingType": PoolingType,
        "pool_hidden_states": pool_hidden_states,
    },
    "sglang.srt.plugins": {},
    "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
}


def modules() -> dict[str, ModuleType]:
    """What `import` is to find, for sys.modules."""
    made = {}
    for name, holds in _HOLDS.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(holds)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made
