"""The canonical order of additions where it is an aligned binary tree: of leaves, and of columns."""

from collections.abc import Callable

import torch
from torch import Tensor


def tree(leaves: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """N states into one, [B, N, ...] -> [B, ...], N a power of two: neighbours are merged first."""
    while leaves.shape[1] > 1:
        leaves = merge(leaves[:, 0::2], leaves[:, 1::2])
    return leaves[:, 0]


def add_columns(x: Tensor) -> Tensor:
    """[..., 1]: x over its columns, neighbours first, in the same aligned binary tree as leaves; never -0."""
    columns = 1
    while columns < x.shape[-1]:
        columns *= 2
    x = torch.nn.functional.pad(x, (0, columns - x.shape[-1]))
    return tree(x.reshape(-1, columns), torch.add).reshape(*x.shape[:-1], 1) + 0.0
