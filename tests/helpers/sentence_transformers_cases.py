"""What the tests of sentence-transformers share: batches as its transformers hand them on, pooled in both ways."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpool.integrations.sentence_transformers import patch
from fastpool.models.pooling import POOLING_MODES

modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

MODES = tuple(POOLING_MODES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = [7, 1, 40, 33]
LONG = [7, 40, 33]  # longer than any prompt here
WIDTH = 24
THREE = torch.tensor([[1.0], [2.0], [4.0]])  # tokens of one column
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},  # one unit in the last place
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}


class Calls(TorchDispatchMode):
    """The ops of fastpool that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastpool":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def texts(dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) + 0.25).to(dtype) for n in lengths]


def padded(batch: list[Tensor], side: str = "right", filling: float = 0.0) -> dict[str, Tensor]:
    rows = max(map(len, batch)) + 2
    hidden = torch.full((len(batch), rows, batch[0].shape[1]), filling, dtype=batch[0].dtype)
    mask = torch.zeros(len(batch), rows, dtype=torch.int64)
    for i, text in enumerate(batch):
        begin = rows - len(text) if side == "left" else 0
        hidden[i, begin : begin + len(text)] = text
        mask[i, begin : begin + len(text)] = 1
    if side == "holes":
        mask[2, 3:30:4] = 0
    return {"token_embeddings": hidden, "attention_mask": mask}


def packed(batch: list[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(text) for text in batch])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0)]).int()
    index = torch.repeat_interleave(torch.arange(len(batch)), lengths)
    return {"token_embeddings": torch.cat(batch)[None], "cu_seq_lens_q": bounds, "seq_idx": index[None].int()}


LAYOUTS: dict[str, Callable[[list[Tensor]], dict[str, Tensor]]] = {
    "right": lambda batch: padded(batch, "right"),
    "left": lambda batch: padded(batch, "left"),
    "holes": lambda batch: padded(batch, "holes"),
    "no mask": lambda batch: {"token_embeddings": padded(batch)["token_embeddings"]},
    "another mask": lambda batch: {**padded(batch), "attention_mask": torch.ones(len(batch), 3, dtype=torch.int64)},
    "packed": packed,
    "packed without seq_idx": lambda batch: {name: x for name, x in packed(batch).items() if name != "seq_idx"},
}


def run(pooling: nn.Module, features: dict[str, Any]) -> Tensor:
    given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in features.items()}
    result: Tensor = pooling(given)["sentence_embedding"]
    assert given.keys() == {*features, "sentence_embedding"}
    for name, x in features.items():  # theirs leaves its input alone, and so must ours
        assert not isinstance(x, Tensor) or torch.equal(given[name].nan_to_num(), x.nan_to_num())
    return result


def both(features: dict[str, Any], mode: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Their result, and the patched module's."""
    pooling = modules.Pooling(features["token_embeddings"].shape[-1], pooling_mode=mode, **options)
    theirs = run(pooling, features)
    with Calls() as calls:
        ours = run(patch(pooling), features)
    own = "token_weights_sum" in features or "cls_token_embeddings" in features
    assert own or calls.names == ([POOLING_MODES[mode]] if isinstance(mode, str) else ["_pool_several"])
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    return theirs, ours


def assert_same(theirs: Tensor, ours: Tensor, dtype: torch.dtype | None = None) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype or ours.dtype])
