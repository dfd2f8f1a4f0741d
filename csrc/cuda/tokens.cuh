// Token outputs and their gradient, once it is known where tokens are: a block takes a row.
#pragma once
#include "finish.cuh"
#include "kernels.h"

namespace fastpool::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    pack_tokens_kernel(const __grid_constant__ TokensCall call, const __grid_constant__ TokenRows rows, bool aligned) {
  using A = typename AccumulatorOf<T>::type;
  const PoolCall& pool = call.pool;
  A* const sums = reinterpret_cast<A*>(shared_memory);
  const int64_t found = rows.cu_seqlens[pool.batch];
  for (int64_t row = blockIdx.x; row < call.size; row += gridDim.x) {
    const T* x = static_cast<const T*>(pool.hidden);
    if (row < found) {
      const int64_t source = rows.sources[row], b = rows.padded ? source / pool.rows : 0;
      x += b * pool.batch_stride + (source - b * pool.rows) * pool.row_stride;
    }
    const int64_t dim = row < found ? pool.dim : 0;  // behind the last token all columns are zeros
    const auto load_quad = [&](int64_t c, A(&y)[kQuad]) { read_quad(x, c, dim, aligned, y); };
    Norm<A> norm;
    if (pool.normalize && row < found) norm = Norm<A>::of(load_quad, dim, static_cast<A>(kNormEps), sums);
#pragma unroll 1
    for (int64_t c = threadIdx.x * kQuad; c < pool.dim; c += blockDim.x * kQuad) {
      A y[kQuad];
      load_quad(c, y);
      if (pool.normalize && row < found) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) y[i] = (y[i] * norm.scale) / norm.divisor;
      }
      store_quad(pool.out, pool.out_dtype, row * pool.dim, c, pool.dim, pool.dim % kQuad == 0, y);
    }
  }
}

// Where a real token, row i of its sequence and row `source` of all, stands among those of `segment`; -1 if it does
// not.
FASTPOOL_KERNEL_INLINE int64_t place_of(const PoolCall& pool, const TokenRows& rows, int64_t segment, int64_t i,
                                        int64_t source) {
  const Segment bounds = bounds_of(pool, segment);
  if (i < bounds.begin || i >= bounds.end) return -1;
  int64_t at = rows.cu_seqlens[segment];
  const int64_t stop = rows.cu_seqlens[segment + 1];
  if (pool.mask.data == nullptr) at += i - bounds.begin;
#pragma unroll 1
  for (int64_t n = pool.mask.data == nullptr ? 0 : stop - at; n > 0;) {  // the first that is not before it
    const int64_t half = n / 2;
    if (rows.sources[at + half] < source) {
      at += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return at < stop ? at : -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_tokens_kernel(const __grid_constant__ TokensBackwardCall call, const __grid_constant__ TokenRows rows,
                          bool aligned) {
  using A = typename AccumulatorOf<T>::type;
  const PoolCall& pool = call.pool;
  const int64_t out_rows = call.out_rows();
  for (int64_t row = blockIdx.x; row < out_rows; row += gridDim.x) {
    const int64_t b = call.padded ? row / pool.rows : 0, i = row - b * pool.rows;
    int64_t first = b, last = b;
    if (!call.padded) {
      const OverlapRange range = rows.ranges[i / kRangeRows];
      first = range.last < 0 ? 0 : range.first, last = range.last;
    }
    if (!is_real(pool.mask, b, i)) last = first - 1;
#pragma unroll 1
    for (int64_t c = threadIdx.x * kQuad; c < pool.width; c += blockDim.x * kQuad) {
      A total[kQuad] = {};
#pragma unroll 1
      for (int64_t segment = first; segment <= last; ++segment) {
        const int64_t at = place_of(pool, rows, segment, i, row);
        if (at < 0) continue;
        A share[kQuad];
        read_quad(static_cast<const A*>(call.gradient) + at * pool.dim, c, pool.dim, aligned, share);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) total[k] += share[k];
      }
      store_quad(static_cast<T*>(call.out) + row * pool.width, c, pool.width, pool.width % kQuad == 0, total);
    }
  }
}

}  // namespace fastpool::cuda
