"""Where a segment's real tokens are, and which of them a mode looks at. Padded and packed input differ here, in where
bounds come from, and nowhere else."""

import triton
import triton.language as tl

from ..modes import Select

FIRST = tl.constexpr(Select.FIRST.value)
LAST = tl.constexpr(Select.LAST.value)
WAYS = tl.constexpr(512)  # segments told apart by one step of the search
SEGMENTS_AT_ONCE = tl.constexpr(128)  # looked at for overlaps


@triton.jit
def bounds(starts, ends, segment, rows, CU: tl.constexpr):
    """[begin, end) of a segment, within [0, rows] whatever the tensors hold; empty where begin > end."""
    begin = tl.zeros((), tl.int64)
    end = rows.to(tl.int64)
    if starts is not None:
        begin = tl.load(starts + segment).to(tl.int64)
    if CU:
        end = tl.load(starts + segment + 1).to(tl.int64)
    elif ends is not None:
        end = tl.load(ends + segment).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    return begin, tl.maximum(tl.minimum(end, rows), begin)


@triton.jit
def is_real(mask, row, offset, token_stride, inside):
    """Which of the tokens `offset` behind `row` are real; those not `inside` are not, and are not looked at."""
    at = mask + (row + offset) * token_stride.to(tl.int64)
    return tl.load(at, mask=inside, other=0) != 0


@triton.jit
def first_real(mask, token_stride, begin, end, SCAN: tl.constexpr):
    """The first real token of [begin, end), else `end`. SCAN elements of the mask are looked at in one go."""
    lane = tl.arange(0, SCAN)
    first = end
    at = begin
    while (first == end) & (at < end):
        left = tl.minimum(end - at, SCAN).to(tl.int32)
        real = is_real(mask, at, lane, token_stride, lane < left)
        first = at + tl.min(tl.where(real, lane, left), axis=0)
        at += SCAN
        if first < at:
            at = end
        else:
            first = end
    return first


@triton.jit
def behind_last_real(mask, token_stride, begin, end, SCAN: tl.constexpr):
    """Behind the last real token of [begin, end), else `begin`. Looked for from the end on."""
    lane = tl.arange(0, SCAN)
    last = begin
    at = end
    while (last == begin) & (at > begin):
        at = tl.maximum(at - SCAN, begin)
        left = tl.minimum(end - at, SCAN).to(tl.int32)
        real = is_real(mask, at, lane, token_stride, lane < left)
        last = at + tl.max(tl.where(real, lane + 1, 0), axis=0)
        if last == at:
            last = begin
    return last


@triton.jit
def trim(mask, token_stride, begin, end, SCAN: tl.constexpr):
    """From the first real token to behind the last one; holes stay inside. Empty: begin == end."""
    first = first_real(mask, token_stride, begin, end, SCAN)
    return first, behind_last_real(mask, token_stride, first, end, SCAN)


@triton.jit
def count_real(mask, token_stride, begin, end, SCAN: tl.constexpr):
    """How many of the tokens [begin, end) are real, and where the last of them ends (`begin` if there is none)."""
    lane = tl.arange(0, SCAN)
    count = tl.zeros((SCAN,), tl.int32)
    last = tl.zeros((SCAN,), tl.int32)  # of each lane, behind its last real token, from `begin` on
    at = begin
    while at < end:
        real = is_real(mask, at, lane, token_stride, lane < end - at)
        count += real.to(tl.int32)
        last = tl.where(real, (at - begin).to(tl.int32) + lane + 1, last)
        at += SCAN
    return tl.sum(count, axis=0).to(tl.int64), begin + tl.max(last, axis=0)


@triton.jit
def slot_of(start, segment, rows, SPLIT: tl.constexpr):
    """A number for the first unit of a packed segment that begins with row `start`. It leaves room for all of them,
    since floor(a / SPLIT) + ceil(n / SPLIT) <= floor((a + n) / SPLIT) + 1, and grows with the segment. Where nothing is
    split (SPLIT 0): the row."""
    row = tl.minimum(tl.maximum(start.to(tl.int64), 0), rows)
    if SPLIT == 0:
        return row
    else:
        return row // SPLIT + segment


@triton.jit
def first_slot(cu_seqlens, segment, rows, SPLIT: tl.constexpr):
    """The number, as `slot_of` gives it, of the first unit of a packed segment."""
    return slot_of(tl.load(cu_seqlens + segment), segment, rows, SPLIT)


@triton.jit
def find(cu_seqlens, slot, batch, rows, SPLIT: tl.constexpr):
    """The segment that `slot` belongs to: the last whose first slot is not beyond it. [0, batch) for any values."""
    low = tl.zeros((), tl.int64)
    count = batch.to(tl.int64)  # it is one of [low, low + count)
    way = tl.arange(0, WAYS)
    while count > 1:
        step = tl.cdiv(count, WAYS)
        ways = tl.cdiv(count, step).to(tl.int32)
        inside = (way < ways) & (way > 0)
        start = tl.load(cu_seqlens + low + way * step, mask=inside, other=0)
        first = slot_of(start, low + way * step, rows, SPLIT)
        skip = tl.sum((inside & (first <= slot)).to(tl.int32), axis=0) * step
        low += skip
        count = tl.minimum(step, count - skip)
    return low


@triton.jit
def decreases(cu_seqlens, segment, batch, rows):
    """Whether a packed segment ends before it begins, once both are clamped to [0, rows]; False where there is none."""
    there = (segment >= 0) & (segment < batch)
    begin = tl.load(cu_seqlens + segment, mask=there, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + segment + 1, mask=there, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(end, 0), rows) < tl.minimum(tl.maximum(begin, 0), rows)


@triton.jit
def around(cu_seqlens, segment, batch, rows):
    """[begin, end): the segments between the decrease before this one and the one behind it."""
    begin = segment
    while (begin > 0) & (decreases(cu_seqlens, begin - 1, batch, rows) == 0):
        begin -= 1
    end = segment + 1
    while (end < batch) & (decreases(cu_seqlens, end, batch, rows) == 0):
        end += 1
    return begin, end


@triton.jit
def selected(first, last, select):
    """The bounds of those of the real tokens [first, last) that a mode looks at: all, or one."""
    begin = tl.where(select == LAST, tl.maximum(last - 1, first), first)
    return begin, tl.where(select == FIRST, tl.minimum(first + 1, last), last)


# `segments`: from the first to behind the last real token of each segment, [batch, 2], in rows of the whole of hidden.


@triton.jit
def load_segment(segments, segment, there):
    """The real tokens [first, last) of a segment, as `segments` holds them; (0, 0) where it is not there."""
    first = tl.load(segments + segment * 2, mask=there, other=0)
    return first, tl.load(segments + segment * 2 + 1, mask=there, other=0)


@triton.jit
def next_overlap(segments, low, high, begin, end):
    """The first of the segments [low, high) that has tokens among the rows [begin, end), else `high`."""
    found = high
    lane = tl.arange(0, SEGMENTS_AT_ONCE)
    while (low < high) & (found == high):
        segment = low + lane
        first, last = load_segment(segments, segment, segment < high)
        overlaps = (tl.maximum(first, begin) < tl.minimum(last, end)) & (segment < high)
        found = tl.min(tl.where(overlaps, segment, high), axis=0)
        low += SEGMENTS_AT_ONCE
    return found


@triton.jit
def overlap_range(segments, starts, begin, end, batch, rows, PADDED: tl.constexpr, CU: tl.constexpr):
    """[low, high): no other segments have tokens among the rows [begin, end)."""
    if PADDED:
        low = begin // rows
        high = tl.cdiv(end, rows)
    elif CU:
        low = find(starts, begin, batch, rows, 0)
        high = find(starts, end - 1, batch, rows, 0) + 1
    else:
        low = batch.to(tl.int64)
        high = tl.zeros((), tl.int64)
        lane = tl.arange(0, SEGMENTS_AT_ONCE)
        for some in range(0, batch, SEGMENTS_AT_ONCE):
            segment = some + lane
            first, last = load_segment(segments, segment, segment < batch)
            overlaps = tl.maximum(first, begin) < tl.minimum(last, end)
            low = tl.minimum(low, tl.min(tl.where(overlaps, segment, batch), axis=0))
            high = tl.maximum(high, tl.max(tl.where(overlaps, segment + 1, 0), axis=0))
    return low, high
