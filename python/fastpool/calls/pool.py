"""One description of every input layout, and the checks that every backend relies on.

A segment is the rows [start, end) of one sequence in a view [rows, H]. Padded [B, S, H] and packed [T, H] input differ
only in where start and end come from. csrc/arguments.cpp checks the same things without words: where it refuses an
argument, it turns to the op's Python kernel, what is wrong is said here, and errors.py brings it out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import GRADIENTS_OF, POOL_TENSORS, codes
from ..checks import (
    MASK_DTYPES,
    check_columns,
    check_dense,
    check_float,
    check_index_dtype,
    check_leading,
    check_mask_values,
    check_query_values,
    check_score_values,
    check_tensor,
    check_weight_values,
    name_of,
    require,
)
from ..known import Known, known, looked_up
from ..modes import MODES
from .common import accumulator, columns_of

_TENSORS = tuple(argument.name for argument in POOL_TENSORS)


@dataclass
class PoolCall:
    """The arguments of one pooling op (see fastpool.functional for what they mean)."""

    kernel: ClassVar[str] = "pool"  # what a backend calls it
    mode: str
    hidden: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    query: Tensor | None = None
    starts: Tensor | None = None
    ends: Tensor | None = None
    scale: float = 1.0
    truncate_dim: int | None = None
    normalize: bool = False
    out_dtype: torch.dtype | None = None
    names: Mapping[str, str] = field(default_factory=dict)  # what messages call an argument that the caller wrote so

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        values = (self.kernel, self.mode, self.truncate_dim, self.normalize, self.out_dtype)
        return known(values, tuple(getattr(self, name) for name in _TENSORS))

    @property
    def op_name(self) -> str:
        """The name of the op in torch.ops.fastpool."""
        return self.mode

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        return vars(self)

    @property
    def op(self) -> str:
        """How messages begin."""
        return f"fastpool.{self.mode}"

    def name(self, argument: str) -> str:
        """What messages call it."""
        return self.names.get(argument, argument)

    @property
    def tensor(self) -> Tensor:
        return self.hidden

    @property
    def favours_cpp(self) -> bool:
        """Whether CUDA C++ is the faster backend on GPUs at any size: where powers are computed between loads, which
        Triton's programs have few of in flight (on an H200, 50 to 270 MB: softmax_mean in 0.3 to 0.6 of the time,
        attention in 0.2 to 0.6)."""
        return MODES[self.mode].softmax

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
    def queries(self) -> int:
        """How many vectors each segment gets."""
        return 1 if self.query is None or self.query.dim() == 1 else self.query.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        columns = self.hidden.shape[-1] if self.truncate_dim is None else self.truncate_dim
        if self.query is None or self.query.dim() == 1:
            return self.batch, columns
        return self.batch, self.queries, columns

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        given = ((name, getattr(self, name)) for name in _TENSORS)
        return [(self.name(name), tensor) for name, tensor in given if tensor is not None]

    def output(self) -> Tensor:
        """An empty result."""
        return self.hidden.new_empty(*self.shape, dtype=self.out_dtype or self.hidden.dtype)

    def check(self) -> None:
        """Raises TypeError or ValueError for anything but the values of index tensors; reads no data."""
        op, hidden = self.op, self.hidden
        said = self.name("hidden")
        check_tensor(op, said, hidden, optional=False)
        for name in _TENSORS[1:]:
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
        for name in _TENSORS[1:]:
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
        mode = MODES[self.mode]
        for name in ("weights", "scores", "query"):
            require(
                getattr(self, name) is None or mode.takes(name),
                ValueError,
                f"{op}: {name} must not be given: it has none",
            )
        for name in ("scores", "query"):
            require(
                getattr(self, name) is not None or not mode.takes(name),
                ValueError,
                f"{op}: {name} must be given, got none",
            )
        for name, values in (("weights", self.weights), ("scores", self.scores)):
            if values is not None:
                check_leading(op, name, values, said, hidden)
                check_float(op, name, values.dtype)
        self._check_bounds_shape()
        if self.query is not None:
            self._check_query(self.query)

    def _check_query(self, query: Tensor) -> None:
        op, width = self.op, self.hidden.shape[-1]
        check_float(op, "query", query.dtype)
        require(
            query.dim() in (1, 2, 3) and query.shape[-1] == width,
            ValueError,
            f"{op}: query must have shape [{width}], [K, {width}] or [{self.batch}, K, {width}], as wide as "
            f"{self.name('hidden')}, got {list(query.shape)}",
        )
        require(
            query.dim() < 3 or query.shape[0] == self.batch,
            ValueError,
            f"{op}: query [B, K, {width}] must have one row of queries for each of the {self.batch} segments, "
            f"got {list(query.shape)}",
        )
        sums = accumulator(self.hidden.dtype)
        largest = torch.finfo(sums).max
        require(
            not largest < abs(self.scale) < math.inf,
            ValueError,
            f"{op}: scale beside {name_of(self.hidden.dtype)} states is {name_of(sums)}, so it must not be greater "
            f"than {largest:g} in size, got {self.scale:g}; scale the query, or give float64 states",
        )

    def _check_bounds_shape(self) -> None:
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

    def check_values(self) -> None:
        """Raises ValueError for bounds that point outside hidden or run backwards, then for an integer mask that is not
        0 and 1 alone, then for float64 weights, scores and queries that do not fit the float32 they become.
        Synchronises."""
        self.check_bounds()
        if self.mask is not None and self.mask.dtype != torch.bool:
            check_mask_values(self.op, self.mask, *self.bounds())
        states = self.hidden.dtype
        for values, check in ((self.weights, check_weight_values), (self.scores, check_score_values)):
            if values is not None and values.dtype == torch.float64 != states:
                check(self.op, values, states, self.mask, *self.bounds())
        if self.query is not None and self.query.dtype == torch.float64 != states:
            check_query_values(self.op, self.query, states)

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


@dataclass
class PoolBackwardCall:
    """The gradient of an argument of the pooling op `pool`: `of` is "hidden", "weights", "scores" or "query". That of a
    query is of each segment's, [B, K, H] whatever the query's shape, and of the accumulator's dtype.

    gradient, of the result's shape, is that of the result before its rounding, so in the accumulator's dtype; so is
    `result`, the result itself, where Mode.gradient_reads_hidden. Hidden's values are looked at there alone: elsewhere
    an expanded scalar of its shape and dtype will do."""

    kernel: ClassVar[str] = "pool_backward"  # what a backend calls it
    pool: PoolCall
    gradient: Tensor
    result: Tensor | None = None
    of: str = "hidden"

    @classmethod
    def of_op(cls, mode: int, of: int, gradient: Tensor, result: Tensor | None, **tensors: Any) -> "PoolBackwardCall":
        """From the arguments of _pool_backward."""
        name = "fastpool._pool_backward"
        modes = list(MODES)
        require(0 <= mode < len(modes), ValueError, f"{name}: mode must lie between 0 and {len(modes) - 1}, got {mode}")
        why = "what is activated has no gradient of its own: it goes through"
        plain = MODES[modes[mode]].without_activation
        require(not MODES[modes[mode]].of_logits, ValueError, f"{name}: mode must not be {modes[mode]}: {why} {plain}")
        taken = {"hidden", *(argument.name for argument in MODES[modes[mode]].arguments)}
        can_be = [code for code, argument in enumerate(GRADIENTS_OF) if argument in taken]
        require(of in can_be, ValueError, f"{name}: of must be one of {can_be} for {modes[mode]}, got {of}")
        pool = PoolCall(modes[mode], **tensors, truncate_dim=columns_of(gradient))
        return cls(pool, gradient, result, GRADIENTS_OF[of])

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        pool = self.pool
        tensors = tuple(getattr(pool, name) for name in _TENSORS)
        values = (self.kernel, self.of, pool.mode, pool.truncate_dim, pool.normalize, pool.out_dtype)
        return known(values, (*tensors, self.gradient, self.result))

    @property
    def op_name(self) -> str:
        """The name of the op in torch.ops.fastpool."""
        return "_pool_backward"

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        mode, of = codes(self.pool.mode, self.of)
        return {**self.pool.values(), **vars(self), "mode": mode, "of": of}

    @property
    def op(self) -> str:
        """How messages begin."""
        return self.pool.op

    @property
    def tensor(self) -> Tensor:
        return self.pool.hidden

    @property
    def favours_cpp(self) -> bool:
        """As of a PoolCall; given scores do not wait for token states, and there Triton is as fast."""
        return MODES[self.pool.mode].takes_query

    @property
    def needs_result(self) -> bool:
        return MODES[self.pool.mode].gradient_reads_hidden(self.of)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        result = [] if self.result is None else [("result", self.result)]
        return [("gradient", self.gradient), *self.pool.tensors(), *result]

    def output(self) -> Tensor:
        """An empty gradient, contiguous."""
        pool = self.pool
        if self.of == "query":
            return self.gradient.new_empty(pool.batch, pool.queries, pool.hidden.shape[-1])
        like: Tensor = getattr(pool, self.of)
        return like.new_empty(*like.shape)

    def check(self) -> None:
        """Raises TypeError or ValueError; reads no data."""
        op, hidden = self.op, self.pool.hidden
        self.pool.check()
        require(getattr(self.pool, self.of) is not None, ValueError, f"{op}: {self.of} must be given")
        shape, dtype = list(self.pool.shape), accumulator(hidden.dtype)
        check_dense(op, "gradient", self.gradient, shape, dtype, "hidden", hidden)
        if self.needs_result or self.result is not None:
            check_dense(op, "result", self.result, shape, dtype, "hidden", hidden)

    def check_values(self) -> None:
        """Raises ValueError for wrong values of bounds, as the pooling did; it has checked the mask. Synchronises."""
        self.pool.check_bounds()
