"""Which tokens: where each segment's are, in both layouts, and which of them are real and a mode looks at."""

from ..modes import Select
from .graph import BOOL, INT32, INT64, Value, counted, integer, joined, op, size

_EVERYTHING = 2**63 - 1  # a Slice's end


class TokenIndex:
    """Row numbers [B, L] and which of them are `real`, [B, L]; L is S of padded input, the longest segment of packed, 1
    where a mode looks at one token."""

    def __init__(
        self,
        select: Select,
        hidden: Value,
        mask: Value | None,
        cu_seqlens: Value | None,
        starts: Value | None,
        ends: Value | None,
    ) -> None:
        self._select, self._padded = select, len(hidden.shape) == 3
        if cu_seqlens is not None:
            starts, ends = op.Slice(cu_seqlens, [0], [-1], [0]), op.Slice(cu_seqlens, [1], [_EVERYTHING], [0])
        starts, ends = _column(starts), _column(ends)
        mask = None if mask is None else op.Cast(mask, to=BOOL)
        if self._padded:
            self._index, self.real = _padded(hidden, mask, starts, ends)
        else:
            self._index, self.real = _packed(hidden, mask, starts, ends)
        if select is not Select.ALL:
            self._narrow()

    def _narrow(self) -> None:
        """To the one token that the mode looks at; any one where none is real."""
        at = op.ArgMax(
            op.Cast(self.real, to=INT32), axis=1, keepdims=1, select_last_index=int(self._select is Select.LAST)
        )
        self.real = op.GatherElements(self.real, at, axis=1)
        self._index = at if self._padded else op.GatherElements(self._index, at, axis=1)

    def at(self, per_token: Value) -> Value:
        """per_token[b, index[b]] of padded input, per_token[index[b]] of packed: [B, L, ...]."""
        if not self._padded:
            return op.Gather(per_token, self._index)
        if self._select is Select.ALL:
            return per_token
        return op.GatherND(per_token, op.Unsqueeze(self._index, [-1]), batch_dims=1)

    def count(self) -> Value:
        """Real tokens, [B, 1], int64."""
        return op.ReduceSum(op.Cast(self.real, to=INT64), [1], keepdims=1)


def _column(bounds: Value | None) -> Value | None:
    """[B, 1], int64."""
    return None if bounds is None else op.Unsqueeze(op.Cast(bounds, to=INT64), [1])


def _padded(hidden: Value, mask: Value | None, starts: Value | None, ends: Value | None) -> tuple[Value, Value]:
    index = op.Unsqueeze(counted(size(hidden, 1)), [0])
    real = op.Expand(op.Cast(1, to=BOOL), op.Shape(hidden, start=0, end=2)) if mask is None else mask
    if starts is not None:
        real = op.And(real, op.GreaterOrEqual(index, starts))
    if ends is not None:
        real = op.And(real, op.Less(index, ends))
    return index, real


def _packed(hidden: Value, mask: Value | None, starts: Value, ends: Value) -> tuple[Value, Value]:
    rows = size(hidden, 0)
    starts, ends = op.Max(starts, integer(0)), op.Min(ends, rows)
    # At least one, so that there is a longest of no segments, and a token to look at; but none where there are no rows.
    longest = op.ReduceMax(joined(op.Reshape(op.Sub(ends, starts), [-1]), 1), [0], keepdims=1)
    longest = op.Min(longest, rows)
    index = op.Add(starts, op.Unsqueeze(counted(longest), [0]))
    real = op.Less(index, ends)
    index = op.Min(index, op.Sub(rows, integer(1)))
    return index, real if mask is None else op.And(real, op.Gather(mask, index))
