"""The arguments of pooling and of its gradients, and their checks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import GRADIENTS_OF, POOL_TENSORS, codes
from ..checks import (
    check_dense,
    check_float,
    check_leading,
    check_query_values,
    check_score_values,
    check_weight_values,
    name_of,
    require,
)
from ..known import Known, known, looked_up
from ..modes import MODES
from .common import accumulator, columns_of
from .segments import OfSegments

_TENSORS = tuple(argument.name for argument in POOL_TENSORS)


@dataclass
class PoolCall(OfSegments):
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
    def queries(self) -> int:
        """How many vectors each segment gets."""
        return 1 if self.query is None or self.query.dim() == 1 else self.query.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        if self.query is None or self.query.dim() == 1:
            return self.batch, self.columns
        return self.batch, self.queries, self.columns

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        given = ((name, getattr(self, name)) for name in _TENSORS)
        return [(self.name(name), tensor) for name, tensor in given if tensor is not None]

    def output(self) -> Tensor:
        """An empty result."""
        return self.hidden.new_empty(*self.shape, dtype=self.out_dtype or self.hidden.dtype)

    def check(self) -> None:
        """Raises TypeError or ValueError for anything but the values of index tensors; reads no data."""
        self.check_states_and_mask(_TENSORS)
        op, hidden, said = self.op, self.hidden, self.name("hidden")
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
        self.check_bounds_shape()
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

    def check_values(self) -> None:
        """Raises ValueError for bounds that point outside hidden or run backwards, then for an integer mask that is not
        0 and 1 alone, then for float64 weights, scores and queries that do not fit the float32 they become.
        Synchronises."""
        self.check_bounds_and_mask()
        states = self.hidden.dtype
        for values, check in ((self.weights, check_weight_values), (self.scores, check_score_values)):
            if values is not None and values.dtype == torch.float64 != states:
                check(self.op, values, states, self.mask, *self.bounds())
        if self.query is not None and self.query.dtype == torch.float64 != states:
            check_query_values(self.op, self.query, states)


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
