// quantize: a block takes a row, a thread eight neighbouring columns at a time, whose bits are a byte.
#pragma once
#include "kernels.h"
#include "sums.cuh"

namespace fastpool::cuda {

constexpr int kOctet = 2 * kQuad;

// Columns c to c + 3 as whole numbers, in the accumulator's dtype.
template <How how, class A>
FASTPOOL_KERNEL_INLINE void to_whole(const QuantizeRows& rows, int64_t c, A (&x)[kQuad]) {
  const QuantizeCall& call = rows.call;
  float low[kQuad] = {}, high[kQuad] = {};
  if constexpr (how == How::buckets) {
    read_quad(call.low, c, call.dim, rows.ranges_aligned, low);
    read_quad(call.high, c, call.dim, rows.ranges_aligned, high);
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if constexpr (how == How::buckets)
      x[i] = bucket_of(x[i], static_cast<A>(low[i]), static_cast<A>(step_of(low[i], high[i])), call.kind.flip);
    else if constexpr (how == How::tanh)
      x[i] = scaled_tanh(x[i]);
    else
      x[i] = c + i < call.dim && is_one(x[i], call.zero_bit) ? 1 : 0;
  }
}

// Columns c to c + 3 of `columns`: four at a time where rows of bytes begin where four may.
FASTPOOL_KERNEL_INLINE void store_bytes(uint8_t* out, int64_t c, int64_t columns, const Pack<uint8_t, kQuad>& bytes) {
  if (columns % kQuad == 0) {
    if (c < columns) __stwb(reinterpret_cast<Word<uint8_t, kQuad>*>(out + c), bit_cast<Word<uint8_t, kQuad>>(bytes));
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (c + i < columns) out[c + i] = bytes.x[i];
}

template <class T, How how>
__global__ void __launch_bounds__(kThreads, 4) quantize_kernel(const __grid_constant__ QuantizeRows rows) {
  using A = typename AccumulatorOf<T>::type;
  const QuantizeCall& call = rows.call;
  const int64_t columns = call.out_columns();
  const uint32_t flip = call.kind.flip;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const T* const x = static_cast<const T*>(call.x) + offset_of(row, call.leading, rows.sizes, rows.strides);
    uint8_t* const out = static_cast<uint8_t*>(call.out) + row * columns;
#pragma unroll 1
    for (int64_t c = threadIdx.x * kOctet; c < call.dim; c += blockDim.x * kOctet) {
      uint32_t bits = 0;
#pragma unroll
      for (int at = 0; at < kOctet; at += kQuad) {
        A y[kQuad];
        read_quad(x, c + at, call.dim, rows.aligned, y);
        to_whole<how>(rows, c + at, y);
        Pack<uint8_t, kQuad> bytes;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const uint32_t whole = static_cast<uint32_t>(static_cast<int32_t>(y[i]));
          bits = bits << 1 | whole;
          bytes.x[i] = static_cast<uint8_t>(whole ^ flip);
        }
        if constexpr (how != How::bits) store_bytes(out, c + at, columns, bytes);
      }
      if constexpr (how == How::bits) out[c / kOctet] = static_cast<uint8_t>(bits ^ flip);
    }
  }
}

}  // namespace fastpool::cuda
