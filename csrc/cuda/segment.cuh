// Where a segment's real tokens are, looked for by all threads of a block together.
#pragma once
#include "block.cuh"

namespace fastpool::cuda {

// The distance from `row` to the nearest real token among n rows, forwards (step 1) or backwards (-1); n if there is
// none. Most segments begin (end) with a real token, or have no mask; padding is passed a block at a time. `found`: one
// for each warp.
FASTPOOL_KERNEL_INLINE int64_t nearest_real(const PoolCall& call, int64_t b, int64_t row, int64_t n, int step,
                                            int64_t* found) {
  if (n <= 0 || is_real(call.mask, b, row)) return 0;
  constexpr int kProbes = 4;  // loads in flight
  const int64_t threads = blockDim.x;
#pragma unroll 1
  for (int64_t base = 0; base < n; base += kProbes * threads) {
    bool real[kProbes];
#pragma unroll
    for (int k = 0; k < kProbes; ++k) {
      const int64_t at = base + k * threads + threadIdx.x;
      real[k] = at < n && is_real(call.mask, b, row + step * at);
    }
    int64_t nearest = n;
#pragma unroll
    for (int k = kProbes - 1; k >= 0; --k) {
      const unsigned ballot = __ballot_sync(kAll, real[k]);
      if (ballot != 0) nearest = base + k * threads + warp() * 32 + __ffs(static_cast<int>(ballot)) - 1;
    }
    __syncthreads();  // the words of the round before have been read
    if (lane() == 0) found[warp()] = nearest;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < warps(); ++w) nearest = found[w] < nearest ? found[w] : nearest;
    if (nearest < n) return nearest;
  }
  return n;
}

// The real tokens of segment b that a mode looks at: from the first one on, padding behind the last still inside, or
// its one token. Empty: begin == end.
FASTPOOL_KERNEL_INLINE Segment selected(const PoolCall& call, int64_t b, int64_t* found) {
  const Segment bounds = bounds_of(call, b);
  const int64_t n = bounds.end - bounds.begin;
  const bool last = call.mode.select == Select::last;
  const int64_t row = last ? bounds.end - 1 : bounds.begin;
  const int64_t distance = nearest_real(call, b, row, n, last ? -1 : 1, found);
  if (distance >= n) return {0, 0};
  if (last) return {row - distance, row - distance + 1};
  return select(call.mode.select, {row + distance, bounds.end});
}

}  // namespace fastpool::cuda
