"""What the tests that need a GPU share; their fixture `backend` is conftest's."""

from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
BACKENDS = ("triton", "native")


def moved(value: Any, device: str | None = None) -> Tensor:
    """A tensor on the device, with its strides and the gaps between its elements."""
    if value.is_nested:
        return torch.nested.nested_tensor_from_jagged(moved(value.values(), device), moved(value.offsets(), device))
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return memory.to(device or DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())
