"""Where segments are: the part of a call that every input layout has, and the checks that every backend relies on.

A segment is the rows [start, end) of one sequence in a view [rows, H]. Padded [B, S, H] and packed [T, H] input differ
only in where start and end come from. csrc/arguments.cpp checks the same things without words: where it refuses an
argument, it turns to the op's Python kernel, what is wrong is said here, and errors.py brings it out.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checks import (
    MASK_DTYPES,
    check_columns,
    check_float,
    check_index_dtype,
    check_leading,
    check_mask_values,
    check_tensor,
    name_of,
    require,
)


class OfSegments:
    """What calls on token states in segments share: fields of theirs, and what follows from them."""

    hidden: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    starts: Tensor | None
    ends: Tensor | None
    truncate_dim: int | None
    normalize: bool
    out_dtype: torch.dtype | None
    names: Mapping[str, str]

    @property
    def op(self) -> str:
        """How messages begin."""
        raise NotImplementedError

    def name(self, argument: str) -> str:
        """What messages call it."""
        return self.names.get(argument, argument)

    @property
    def padded(self) -> bool:
        return self.hidden.dim() == 3

    @property
    def rows(self) -> int:
        """Rows a segment's bounds may reach: S of padded input, T of packed."""
        return self.hidden.shape[-2]

    @property
    def batch(self) -> int:
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        if self.padded:
            return self.hidden.shape[0]
        assert self.starts is not None
        return self.starts.shape[0]

    @property
    def columns(self) -> int:
        """How many columns the result has."""
        return self.hidden.shape[-1] if self.truncate_dim is None else self.truncate_dim

    def check_states_and_mask(self, tensors: Sequence[str]) -> None:
        """Raises TypeError or ValueError for hidden, the mask, options, and the devices of all these tensors of the
        call, the first of them hidden; reads no data."""
        op, hidden = self.op, self.hidden
        said = self.name("hidden")
        check_tensor(op, said, hidden, optional=False)
        for name in tensors[1:]:
            check_tensor(op, self.name(name), getattr(self, name), optional=True)
        check_float(op, said, hidden.dtype)
        require(
            hidden.dim() in (2, 3),
            ValueError,
            f"{op}: {said} must be padded [B, S, H] or packed [T, H], got shape {list(hidden.shape)}",
        )
        check_columns(op, hidden, self.truncate_dim)
        if self.out_dtype is not None:
            check_float(op, "out_dtype", self.out_dtype)
        for name in tensors[1:]:
            tensor = getattr(self, name)
            require(
                tensor is None or tensor.device == hidden.device,
                ValueError,
                f"{op}: {self.name(name)} must be on {said}'s device, {hidden.device}, "
                f"got {tensor.device if tensor is not None else None}",
            )
        if self.mask is not None:
            check_leading(op, "mask", self.mask, said, hidden)
            require(
                self.mask.dtype in MASK_DTYPES,
                TypeError,
                f"{op}: mask must be bool or an integer type with 1 where a token is real, "
                f"got {name_of(self.mask.dtype)}; an additive mask (0 / -inf) read that way would pick the padding",
            )

    def check_bounds_shape(self) -> None:
        """Raises TypeError or ValueError for cu_seqlens, starts and ends; reads no data."""
        op, said, cu, starts, ends = self.op, self.name("hidden"), self.cu_seqlens, self.starts, self.ends
        require(
            not (self.padded and cu is not None),
            ValueError,
            f"{op}: cu_seqlens goes with packed [T, H] {said}, got shape {list(self.hidden.shape)}",
        )
        alone = "starts alone" if starts is not None else "ends alone" if ends is not None else "none of them"
        require(
            self.padded or cu is not None or (starts is not None and ends is not None),
            ValueError,
            f"{op}: packed [T, H] {said} needs cu_seqlens, or starts and ends, got {alone}",
        )
        both = "starts and ends" if starts is not None and ends is not None else "starts" if ends is None else "ends"
        require(
            cu is None or (starts is None and ends is None),
            ValueError,
            f"{op}: cu_seqlens already says where segments start and end, got {both} too",
        )
        for name, tensor in (("cu_seqlens", cu), ("starts", starts), ("ends", ends)):
            if tensor is None:
                continue
            check_index_dtype(op, self.name(name), tensor)
            require(
                tensor.dim() == 1,
                ValueError,
                f"{op}: {self.name(name)} must have one dimension, got shape {list(tensor.shape)}",
            )
        require(
            cu is None or cu.shape[0] >= 1,
            ValueError,
            f"{op}: {self.name('cu_seqlens')} must have B + 1 values, got none",
        )
        for name, tensor in (("starts", starts), ("ends", ends)):
            why = f"one for each row of {said}" if self.padded else "as starts has"
            require(
                tensor is None or tensor.shape[0] == self.batch,
                ValueError,
                f"{op}: {self.name(name)} must have {self.batch} values, {why}, "
                f"got {tensor.shape[0] if tensor is not None else None}",
            )

    def bounds(self) -> tuple[Tensor, Tensor]:
        """starts [B] and ends [B], int64, whatever the layout; clamped to [0, rows]."""
        if self.cu_seqlens is not None:
            starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        else:
            none = torch.zeros(self.batch, dtype=torch.int64, device=self.hidden.device)
            starts = none if self.starts is None else self.starts.long()
            ends = none + self.rows if self.ends is None else self.ends.long()
        return starts.clamp(0, self.rows), ends.clamp(0, self.rows)

    def counts(self) -> Tensor:
        """How many real tokens each segment has, int64. [B]"""
        starts, ends = self.bounds()
        if self.mask is None:
            return (ends - starts).clamp(min=0)
        before = torch.nn.functional.pad((self.mask != 0).cumsum(-1), (1, 0))
        of = (torch.arange(self.batch, device=starts.device),) if self.padded else ()
        first, behind = (*of, starts), (*of, ends)
        return (before[behind] - before[first]).clamp(min=0)

    def check_bounds_and_mask(self) -> None:
        """Raises ValueError for bounds that point outside hidden or run backwards, then for an integer mask that is not
        0 and 1 alone. Synchronises."""
        self.check_bounds()
        if self.mask is not None and self.mask.dtype != torch.bool:
            check_mask_values(self.op, self.mask, *self.bounds())

    def check_bounds(self) -> None:
        """Raises ValueError for starts, ends or cu_seqlens that point outside hidden or run backwards. Synchronises."""
        cu = self.cu_seqlens
        starts, ends = (self.starts, self.ends) if cu is None else (cu[:-1], cu[1:])
        if starts is None and ends is None:
            return
        begin = torch.zeros_like(ends) if starts is None else starts  # type: ignore[arg-type]  # one of them is given
        end = torch.full_like(begin, self.rows, dtype=torch.int64) if ends is None else ends
        wrong = (begin < 0) | (begin > end) | (end > self.rows)
        if not wrong.any():
            return
        b = int(wrong.nonzero()[0])
        start, stop = int(begin[b]), int(end[b])
        first, last = self.name("starts" if cu is None else "cu_seqlens"), self.name("ends")
        if cu is not None:
            last = first
        i = b if cu is None else b + 1
        for name, at, value in ((first, b, start), (last, i, stop)):
            require(
                0 <= value <= self.rows,
                ValueError,
                f"{self.op}: {name} must lie between 0 and {self.rows}, got {name}[{at}] = {value}",
            )
        raise ValueError(
            f"{self.op}: {first} must not be greater than {last}, got {first}[{b}] = {start} and {last}[{i}] = {stop}"
            if cu is None
            else f"{self.op}: {first} must not decrease, got {first}[{b}] = {start} before {last}[{i}] = {stop}"
        )
