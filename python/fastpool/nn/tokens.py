"""Token states as rows, whatever their layout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rows(hidden: Tensor) -> Tensor:
    """[B, S, H] or [T, H]; of a jagged nested tensor its values."""
    jagged: Any = hidden  # torch's types do not know its methods
    values: Tensor = jagged.values() if hidden.is_nested else hidden
    return values


def each(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """What a function makes of each token's state, in hidden's layout."""
    result = function(rows(hidden))
    if not hidden.is_nested:
        return result
    jagged: Any = hidden
    nested: Tensor = torch.nested.nested_tensor_from_jagged(result, jagged.offsets(), jagged.lengths())
    return nested
