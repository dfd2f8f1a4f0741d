"""quantize: a program a row, walked tile by tile."""

import triton
import triton.language as tl

from ..kinds import How
from .elementary import divide, mantissa_of, tanh
from .state import accumulator_of, widen

BUCKETS = tl.constexpr(How.BUCKETS.value)
TANH = tl.constexpr(How.TANH.value)
BITS = tl.constexpr(How.BITS.value)


@triton.jit
def step_of(low, high):
    """The width of a bucket: 1 where all values are the same."""
    step = divide(high - low, 255.0)
    return tl.where(step == 0, 1.0, step)


@triton.jit
def bucket_of(x, low, step, flip):
    """A number from 0 to 255 whose whole part is the bucket. NaN gets the one whose byte is 0."""
    bucket = divide(x - low, step)
    bucket = tl.where(bucket < 0, 0.0, bucket)
    bucket = tl.where(bucket > 255, 255.0, bucket)
    return tl.where(bucket == bucket, bucket, flip)


@triton.jit
def scaled_tanh(x):
    """127 tanh(x) to the nearest whole number, in ties to the even one; 0 of NaN."""
    magic: tl.constexpr = 1.5 * 2.0 ** mantissa_of(x.dtype)  # whose neighbours are whole
    scaled = tanh(x) * 127
    return tl.where(scaled == scaled, (scaled + magic) - magic, 0.0)


@triton.jit(do_not_specialize=["zero_bit", "flip", "dim", "inner", "outer_stride", "inner_stride", "ranges_stride"])
def quantize_kernel(
    x, out, ranges, zero_bit, flip, dim, inner, outer_stride, inner_stride, ranges_stride,
    HOW: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [outer * inner, dim] bytes, or bits of them. `dim` and strides of x count VECTOR elements."""
    ACC: tl.constexpr = accumulator_of(x.dtype.element_ty)
    program = tl.program_id(0).to(tl.int64)
    x += (program // inner * outer_stride + program % inner * inner_stride) * VECTOR
    width = dim.to(tl.int64) * VECTOR
    columns = tl.arange(0, COLUMNS)
    for tile in range(tl.cdiv(width, COLUMNS)):
        at = tile * COLUMNS + columns
        inside = at < width
        values = widen(tl.load(x + at, mask=inside, other=0.0), ACC)
        if HOW == BITS:
            ones = ((values > 0) | ((values == 0) & (zero_bit != 0))) & inside
            each = tl.reshape(ones.to(tl.int32) << (7 - columns % 8), (COLUMNS // 8, 8))
            used = tl.cdiv(width, 8)
            at = tile * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            bytes = tl.sum(each, axis=1) ^ flip
            tl.store(out + program * used + at, bytes.to(tl.uint8), mask=at < used)
        elif HOW == TANH:
            bytes = scaled_tanh(values).to(tl.int32)
            tl.store(out + program * width + at, bytes.to(tl.uint8), mask=inside)
        else:
            low = tl.load(ranges + at, mask=inside, other=0.0)
            high = tl.load(ranges + ranges_stride + at, mask=inside, other=0.0)
            bytes = bucket_of(values, low.to(ACC), step_of(low, high).to(ACC), flip).to(tl.int32) ^ flip
            tl.store(out + program * width + at, bytes.to(tl.uint8), mask=inside)
