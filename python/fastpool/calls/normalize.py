"""The arguments of l2_normalize and of its gradient, and their checks."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import (
    check_columns,
    check_dense,
    check_float,
    check_index_dtype,
    check_leading,
    check_tensor,
    place,
    require,
)
from ..constants import NORM_EPS
from ..known import Known, known, looked_up
from ..options import check_eps
from .common import accumulator, columns_of


@dataclass
class NormalizeCall:
    """The arguments of l2_normalize."""

    kernel: ClassVar[str] = "l2_normalize"  # what a backend calls it
    favours_cpp: ClassVar[bool] = False  # see PoolCall
    x: Tensor
    truncate_dim: int | None = None
    truncate_dims: Tensor | None = None
    eps: float = NORM_EPS
    out_dtype: torch.dtype | None = None
    op: str = "fastpool.l2_normalize"  # how messages begin

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        values = (self.kernel, self.op, self.truncate_dim, self.eps, self.out_dtype)
        return known(values, (self.x, self.truncate_dims))

    @property
    def tensor(self) -> Tensor:
        return self.x

    @property
    def op_name(self) -> str:
        """The name of the op in torch.ops.fastpool."""
        return "l2_normalize"

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        return vars(self)

    @property
    def columns(self) -> int:
        """How many columns the result has."""
        return self.x.shape[-1] if self.truncate_dim is None else self.truncate_dim

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        return [("x", self.x), *([("truncate_dims", self.truncate_dims)] if self.truncate_dims is not None else [])]

    def output(self) -> Tensor:
        """An empty result."""
        return self.x.new_empty(*self.x.shape[:-1], self.columns, dtype=self.out_dtype or self.x.dtype)

    def check(self) -> None:
        """Raises TypeError or ValueError for anything but the values of truncate_dims; reads no data."""
        check_tensor(self.op, "x", self.x, optional=False)
        check_tensor(self.op, "truncate_dims", self.truncate_dims, optional=True)
        check_float(self.op, "x", self.x.dtype)
        require(
            self.x.dim() >= 1,
            ValueError,
            f"{self.op}: x must have at least one dimension, got shape []",
        )
        # As most of torch's own ops; a view may have more, and kernels have room for as many.
        require(self.x.dim() <= 64, ValueError, f"{self.op}: x must have at most 64 dimensions, got {self.x.dim()}")
        check_columns(self.op, self.x, self.truncate_dim)
        if self.out_dtype is not None:
            check_float(self.op, "out_dtype", self.out_dtype)
        check_eps(self.op, self.eps)
        if self.truncate_dims is None:
            return
        require(
            self.truncate_dims.device == self.x.device,
            ValueError,
            f"{self.op}: truncate_dims must be on x's device, {self.x.device}, got {self.truncate_dims.device}",
        )
        check_index_dtype(self.op, "truncate_dims", self.truncate_dims)
        check_leading(self.op, "truncate_dims", self.truncate_dims, "x", self.x)

    def check_values(self) -> None:
        """Raises ValueError for truncate_dims that are more columns than there are, or below 0. Synchronises."""
        if self.truncate_dims is None:
            return
        for at in ((self.truncate_dims < 0) | (self.truncate_dims > self.columns)).nonzero()[:1].tolist():
            raise ValueError(
                f"{self.op}: truncate_dims must lie between 0 and {self.columns}, got "
                f"truncate_dims{place(*at)} = {self.truncate_dims[tuple(at)].item()}"
            )


@dataclass
class NormalizeBackwardCall:
    """The gradient of l2_normalize's x. gradient [..., D] is that of the result before its rounding, so in the
    accumulator's dtype."""

    kernel: ClassVar[str] = "l2_normalize_backward"  # what a backend calls it
    favours_cpp: ClassVar[bool] = False  # see PoolCall
    normalize: NormalizeCall
    gradient: Tensor

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        call = self.normalize
        values = (self.kernel, call.op, call.truncate_dim, call.eps, call.out_dtype)
        return known(values, (call.x, call.truncate_dims, self.gradient))

    @classmethod
    def of_op(
        cls, gradient: Tensor, x: Tensor, eps: float, truncate_dims: Tensor | None = None
    ) -> "NormalizeBackwardCall":
        """From the arguments of _l2_normalize_backward."""
        return cls(NormalizeCall(x, columns_of(gradient), truncate_dims, eps), gradient)

    @property
    def op_name(self) -> str:
        """The name of the op in torch.ops.fastpool."""
        return "_l2_normalize_backward"

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        return {**self.normalize.values(), **vars(self)}

    @property
    def op(self) -> str:
        """How messages begin."""
        return self.normalize.op

    @property
    def tensor(self) -> Tensor:
        return self.normalize.x

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        return [("gradient", self.gradient), *self.normalize.tensors()]

    def output(self) -> Tensor:
        """An empty gradient, contiguous."""
        return self.normalize.x.new_empty(*self.normalize.x.shape)

    def check(self) -> None:
        """Raises TypeError or ValueError; reads no data."""
        self.normalize.check()
        x = self.normalize.x
        shape = [*x.shape[:-1], self.normalize.columns]
        check_dense(self.op, "gradient", self.gradient, shape, accumulator(x.dtype), "x", x)

    def check_values(self) -> None:
        """Raises ValueError for what NormalizeCall.check_values finds wrong. Synchronises."""
        self.normalize.check_values()
