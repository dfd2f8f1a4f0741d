"""What type checkers and editors see of the pooling functions, which functional.py makes from the table of modes."""

from typing import Protocol

import torch
from torch import Tensor


class Pooling(Protocol):
    """A pooling function whose mode takes no arguments of its own."""

    def __call__(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class WeightedPooling(Protocol):
    """A pooling function whose mode takes weights."""

    def __call__(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class ScoredPooling(Protocol):
    """A pooling function whose mode takes scores."""

    def __call__(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scores: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class AttentionPooling(Protocol):
    """A pooling function whose mode takes a query."""

    def __call__(
        self,
        hidden: Tensor,
        query: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        scale: float = 1.0,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...
