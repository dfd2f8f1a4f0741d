"""The arguments of quantize, and their checks."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_columns, check_float, check_tensor, name_of, require
from ..kinds import KINDS, How, Kind
from ..known import Known, known, looked_up


@dataclass
class QuantizeCall:
    """The arguments of quantize."""

    kernel: ClassVar[str] = "quantize"  # what a backend calls it
    favours_cpp: ClassVar[bool] = False  # see PoolCall
    op: ClassVar[str] = "fastpool.quantize"  # how messages begin
    op_name: ClassVar[str] = "quantize"  # of the op in torch.ops.fastpool
    x: Tensor
    kind: int  # a place in KINDS
    ranges: Tensor | None = None
    truncate_dim: int | None = None
    zero_bit: bool = False

    @looked_up
    def known(self) -> Known:
        """What is known of calls that look like this one."""
        return known((self.kernel, self.kind, self.truncate_dim, self.zero_bit), (self.x, self.ranges))

    @property
    def tensor(self) -> Tensor:
        return self.x

    @property
    def row(self) -> Kind:
        """The kind's row of the table."""
        return list(KINDS.values())[self.kind]

    def values(self) -> dict[str, Any]:
        """The op's arguments, among others."""
        return vars(self)

    @property
    def columns(self) -> int:
        """How many columns of x are used."""
        return self.x.shape[-1] if self.truncate_dim is None else self.truncate_dim

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that are given, and what messages call them."""
        return [("x", self.x), *([("ranges", self.ranges)] if self.ranges is not None else [])]

    def output(self) -> Tensor:
        """An empty result."""
        return self.x.new_empty(*self.x.shape[:-1], self.row.out_columns(self.columns), dtype=self.row.dtype)

    def check(self) -> None:
        """Raises TypeError or ValueError for anything but the values of ranges; reads no data."""
        check_tensor(self.op, "x", self.x, optional=False)
        check_tensor(self.op, "ranges", self.ranges, optional=True)
        check_float(self.op, "x", self.x.dtype)
        require(
            0 <= self.kind < len(KINDS),
            ValueError,
            f"{self.op}: kind must be a place in KINDS, from 0 to {len(KINDS) - 1}, got {self.kind}",
        )
        require(
            1 <= self.x.dim() <= 64, ValueError, f"{self.op}: x must have 1 to 64 dimensions, got {self.x.dim()}"
        )  # as l2_normalize's
        check_columns(self.op, self.x, self.truncate_dim)
        require(
            not self.zero_bit or self.row.how is How.BITS,
            ValueError,
            f"{self.op}: zero_bit goes with binary and ubinary, got kind {self.row.name}",
        )
        if self.row.how is How.BUCKETS:
            self._check_ranges()
        else:
            require(
                self.ranges is None, ValueError, f"{self.op}: ranges go with int8 and uint8, got kind {self.row.name}"
            )

    def _check_ranges(self) -> None:
        require(
            self.ranges is not None,
            ValueError,
            f"{self.op}: {self.row.name} needs ranges, the minimum and maximum of each column. Those of the batch at "
            "hand would be wrong: the same byte would stand for other numbers in queries and in documents, and in the "
            "next batch. Take them once, from a sample of your documents' embeddings "
            "(fastpool.quantization_ranges), and keep them with the index",
        )
        assert self.ranges is not None
        require(
            self.ranges.dtype == torch.float32,
            TypeError,
            f"{self.op}: ranges must be float32, got {name_of(self.ranges.dtype)}",
        )
        require(
            self.ranges.device == self.x.device,
            ValueError,
            f"{self.op}: ranges must be on x's device, {self.x.device}, got {self.ranges.device}",
        )
        widths = [self.x.shape[-1]] + ([] if self.truncate_dim is None else [self.truncate_dim])
        require(
            self.ranges.dim() == 2 and self.ranges.shape[0] == 2 and self.ranges.shape[1] in widths,
            ValueError,
            f"{self.op}: ranges must have shape {' or '.join(f'[2, {width}]' for width in widths)}, "
            f"got {list(self.ranges.shape)}",
        )

    def check_values(self) -> None:
        """Raises ValueError for ranges that are not finite, run backwards, or are wider than float32. Synchronises."""
        if self.ranges is None:
            return
        low, high = self.ranges[:, : self.columns]
        width = high - low
        for column in (~((width >= 0) & width.isfinite())).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"{self.op}: ranges must hold a finite minimum and a maximum that is not below it, and their "
                f"difference must be finite, got {low[column].item()} and {high[column].item()} in column {column}"
            )
