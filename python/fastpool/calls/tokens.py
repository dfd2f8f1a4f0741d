"""The arguments of tokens and of its gradient, and their checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import TOKENS
from ..checks import check_dense, require
from ..known import Known, known, looked_up
from .common import accumulator, columns_of
from .segments import OfSegments

_TENSORS = tuple(argument.name for argument in TOKENS if argument.type.startswith("Tensor"))


@dataclass
class TokensCall(OfSegments):
    """The arguments of tokens (see fastpool.token_outputs for what they mean)."""

    kernel: ClassVar[str] = "tokens"  # what a backend calls it
    favours_cpp: ClassVar[bool] = False  # see PoolCall
    hidden: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    starts: Tensor | None = None
    ends: Tensor | None = None
    truncate_dim: int | None = None
    normalize: bool = False
    out_dtype: torch.dtype | None = None
    total: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)  # what messages call an argument that the caller wrote so

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        values = (self.kernel, self.truncate_dim, self.normalize, self.out_dtype, self.total)
        return known(values, tuple(getattr(self, name) for name in _TENSORS))

    @property
    def op_name(self) -> str:
        """The name of the op in torch.ops.fastpool."""
        return "tokens"

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        return vars(self)

    @property
    def op(self) -> str:
        """How messages begin."""
        return "fastpool.tokens"

    @property
    def tensor(self) -> Tensor:
        return self.hidden

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        given = ((name, getattr(self, name)) for name in _TENSORS)
        return [(self.name(name), tensor) for name, tensor in given if tensor is not None]

    @property
    def size(self) -> int | None:
        """How many rows the values have, where that does not depend on data."""
        if self.total is not None:
            return self.total
        told = any(tensor is not None for tensor in (self.mask, self.cu_seqlens, self.starts, self.ends))
        return None if told else self.batch * self.rows

    def output(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Empty values and cu_seqlens, of so many rows where `size` does not say it; else they are counted, which
        synchronises."""
        rows = self.size if self.size is not None else size
        if rows is None:
            rows = int(self.counts().sum())
        values = self.hidden.new_empty(rows, self.columns, dtype=self.out_dtype or self.hidden.dtype)
        return values, self.hidden.new_empty(self.batch + 1, dtype=torch.int64)

    def check(self) -> None:
        """Raises TypeError or ValueError for anything but the values of index tensors; reads no data."""
        self.check_states_and_mask(_TENSORS)
        self.check_bounds_shape()
        require(
            self.total is None or self.total >= 0,
            ValueError,
            f"{self.op}: total must be at least 0, got {self.total}",
        )

    def check_values(self) -> None:
        """Raises ValueError for bounds that point outside hidden or run backwards, for an integer mask that is not 0
        and 1 alone, and for more real tokens than total. Synchronises."""
        self.check_bounds_and_mask()
        if self.total is not None:
            found = int(self.counts().sum())
            require(
                found <= self.total,
                ValueError,
                f"{self.op}: total must be at least the number of real tokens, {found}, got {self.total}",
            )


@dataclass
class TokensBackwardCall:
    """The gradient of tokens' hidden. gradient [N or total, D] is that of the values before their rounding and without
    their normalisation, so in the accumulator's dtype; rows behind the real tokens are not looked at. Hidden's values
    never are: an expanded scalar of its shape and dtype will do."""

    kernel: ClassVar[str] = "tokens_backward"  # what a backend calls it
    favours_cpp: ClassVar[bool] = False  # see PoolCall
    tokens: TokensCall
    gradient: Tensor

    @classmethod
    def of_op(cls, gradient: Tensor, **tensors: Any) -> "TokensBackwardCall":
        """From the arguments of _tokens_backward."""
        return cls(TokensCall(**tensors, truncate_dim=columns_of(gradient)), gradient)

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        tensors = tuple(getattr(self.tokens, name) for name in _TENSORS)
        return known((self.kernel, self.tokens.truncate_dim), (*tensors, self.gradient))

    @property
    def op_name(self) -> str:
        """The name of the op in torch.ops.fastpool."""
        return "_tokens_backward"

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        return {**self.tokens.values(), **vars(self)}

    @property
    def op(self) -> str:
        """How messages begin."""
        return self.tokens.op

    @property
    def tensor(self) -> Tensor:
        return self.tokens.hidden

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        return [("gradient", self.gradient), *self.tokens.tensors()]

    def output(self) -> Tensor:
        """An empty gradient, contiguous."""
        return self.tokens.hidden.new_empty(*self.tokens.hidden.shape)

    def check(self) -> None:
        """Raises TypeError or ValueError; reads no data."""
        self.tokens.check()
        hidden, rows = self.tokens.hidden, self.gradient.shape[0] if self.gradient.dim() > 0 else 0
        shape = [rows, self.tokens.columns]
        check_dense(self.op, "gradient", self.gradient, shape, accumulator(hidden.dtype), "hidden", hidden)

    def check_values(self) -> None:
        """Raises ValueError for wrong values of bounds, and for more real tokens than gradients; tokens has checked the
        mask. Synchronises."""
        self.tokens.check_bounds()
        found, rows = int(self.tokens.counts().sum()), self.gradient.shape[0]
        require(
            found <= rows,
            ValueError,
            f"{self.op}: gradient must have a row for each of the {found} real tokens, got {rows}",
        )
