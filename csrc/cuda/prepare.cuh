// What the tokens of a segment have in common, before any of them gets its share of a gradient: a block takes a
// segment.
#pragma once
#include "epilogue.cuh"
#include "kernels.h"

namespace fastpool::cuda {

// Shared memory: where real tokens were found, sums of weights, columns or counts, and a warp's leaves behind them.
constexpr int kFoundBytes = kPreparingThreads / 32 * 8, kSumsBytes = (kBlockSums + kCounterLevels) * 8;
template <class A>
int preparing_bytes(const BackwardPlan& plan) {
  return kFoundBytes + kSumsBytes + plan.preparing / 32 * kWarpLeaves * kLeafPitch * static_cast<int>(sizeof(A));
}

// From the first real token on; of cls and last, their one token.
FASTPOOL_KERNEL_INLINE Segment trimmed(const PoolCall& call, int64_t b, int64_t* found) {
  const Segment bounds = bounds_of(call, b);
  const int64_t n = bounds.end - bounds.begin;
  const bool last = call.mode == Mode::last;
  const int64_t row = last ? bounds.end - 1 : bounds.begin;
  const int64_t distance = nearest_real(call, b, row, n, last ? -1 : 1, found);
  if (distance >= n) return {0, 0};
  if (last) return {row - distance, row - distance + 1};
  return {row + distance, call.mode == Mode::cls ? row + distance + 1 : bounds.end};
}

template <class A>
__global__ void __launch_bounds__(kPreparingThreads)
    prepare_kernel(const __grid_constant__ PoolBackwardCall call, const __grid_constant__ BackwardPlan plan,
                   const __grid_constant__ Prepared prepared) {
  const PoolCall& pool = call.pool;
  char* const memory = reinterpret_cast<char*>(shared_memory);
  A* const sums = reinterpret_cast<A*>(memory + kFoundBytes);
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  const Segment segment = trimmed(pool, b, reinterpret_cast<int64_t*>(memory));
  if (thread == 0) prepared.segments[b] = segment;
  if (segment.begin == segment.end) return;
  if (!call.padded)
    for (int64_t tile = segment.begin / plan.tile + thread; tile <= (segment.end - 1) / plan.tile; tile += threads) {
      atomicMin(&prepared.ranges[tile].first, static_cast<unsigned>(b));
      atomicMax(&prepared.ranges[tile].last, static_cast<int>(b));
    }

  Totals totals;
  totals.count = 1;
  if (pool.mode == Mode::mean || pool.mode == Mode::mean_sqrt_len)
    totals.count = total_count(pool, b, segment, reinterpret_cast<int64_t*>(sums));
  if (pool.mode == Mode::weighted_mean)
    totals.weight = static_cast<double>(
        total_weight(pool, b, segment, reinterpret_cast<A*>(memory + kFoundBytes + kSumsBytes), sums));
  const A divisor = divisor_of<A>(pool.mode, totals);
  const A* const gradient = static_cast<const A*>(call.gradient) + b * pool.dim;
  A* const divided = static_cast<A*>(prepared.gradient) + b * pool.dim;
#pragma unroll 1
  for (int64_t c = thread; c < pool.dim; c += threads) divided[c] = quotient(gradient[c], divisor);
  if (!call.of_weights) return;

  const A* const result = static_cast<const A*>(call.result) + b * pool.dim;
  const auto product = [&](int64_t c, A(&x)[kQuad]) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] = c + i < pool.dim ? quotient(gradient[c + i], divisor) * result[c + i] : A{};
  };
  const A along = add_columns<A>(product, pool.dim, sums);
  if (thread == 0) static_cast<A*>(prepared.products)[b] = along;
}

}  // namespace fastpool::cuda
