"""What the tests of `fastpool doctor` share."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpool.doctor.trace import Trace
from fastpool.models import Decision, PoolingConfig

CONFIG = PoolingConfig(
    modes=("mean",),
    normalize=True,
    decisions=(
        Decision("modes", ("mean",), "1_Pooling/config.json: pooling_mode", "stated"),
        Decision("normalize", True, "modules.json [2]: type", "stated"),
    ),
)

REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()  # of Model's batch

# The extra is not installed wherever the tests run: vLLM's environment has none of it.
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rich", "sentence_transformers")),
    reason='needs pip install "fastpool[doctor]"',
)


def write(path: Path, *lines: str) -> Path:
    """A file of these lines."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


class Model:
    """The parts of a SentenceTransformer that are used, around a module from embedded tokens to states of two texts."""

    device = torch.device("cpu")

    def __init__(self, inner: nn.Module) -> None:
        self.first = First(inner)

    def preprocess(self, texts: list[str], prompt: str | None = None) -> dict[str, Tensor]:
        return {"x": self.first.x[: len(texts)], "attention_mask": REAL[: len(texts)].long()}

    def __getitem__(self, index: int) -> nn.Module:
        return self.first


class First(nn.Module):
    """As sentence-transformers has it: calls the forward of its model, writes into the dict that it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.auto_model = inner
        self.x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
        self.x[0, 0, 0] = 2.0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.auto_model.forward(batch["x"])
        batch["token_embeddings"] = out if isinstance(out, Tensor) else out[0]
        return batch


class Step(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Chain(nn.Module):
    """Named modules, one after the other, what they give handed on as it is."""

    def __init__(self, **steps: nn.Module) -> None:
        super().__init__()
        for name, step in steps.items():
            setattr(self, name, step)
        self.order = list(steps)

    def forward(self, x: Any) -> Any:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def traced(inner: nn.Module, x: Tensor | None = None) -> Trace:
    """After one batch of a model around this, whose hooks are gone."""
    model = Model(inner)
    if x is not None:
        model.first.x = x
    trace = Trace(model.first)
    batch = model.preprocess(["a", "b"])
    with torch.inference_mode(), trace.watch(batch):
        model[0](batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.first.modules())
    return trace
