// What the tokens of a segment have in common, before any of them gets its share of a gradient: a block takes a
// segment's result.
#pragma once
#include "finish.cuh"
#include "kernels.h"
#include "segment.cuh"

namespace fastpool::cuda {

// Shared memory: where real tokens were found, sums of weights, columns or counts, and a warp's leaves behind them.
constexpr int kFoundBytes = kPrologueThreads / 32 * 8, kSumsBytes = (kBlockSums + kCounterLevels) * 8;
template <class A>
int prologue_bytes(const BackwardPlan& plan) {
  return kFoundBytes + kSumsBytes + plan.prologue_threads / 32 * kWarpLeaves * kLeafPitch * static_cast<int>(sizeof(A));
}

template <class A>
__global__ void __launch_bounds__(kPrologueThreads)
    segment_prologue_kernel(const __grid_constant__ PoolBackwardCall call, const __grid_constant__ BackwardPlan plan,
                            const __grid_constant__ Prologue prologue) {
  const PoolCall& pool = call.pool;
  char* const memory = reinterpret_cast<char*>(shared_memory);
  A* const sums = reinterpret_cast<A*>(memory + kFoundBytes);
  const int64_t at = blockIdx.x, b = at / pool.queries.count;
  const bool first = at == b * pool.queries.count;  // of the segment
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  const Segment segment = selected(pool, b, reinterpret_cast<int64_t*>(memory));
  if (first && thread == 0) prologue.segments[b] = segment;
  if (segment.begin == segment.end) return;
  if (first && !call.padded)
    for (int64_t tile = segment.begin / plan.tile + thread; tile <= (segment.end - 1) / plan.tile; tile += threads) {
      atomicMin(&prologue.ranges[tile].first, static_cast<unsigned>(b));
      atomicMax(&prologue.ranges[tile].last, static_cast<int>(b));
    }

  Totals totals;
  totals.count = 1;
  if (counts_tokens(pool.mode.divisor)) totals.count = total_count(pool, b, segment, reinterpret_cast<int64_t*>(sums));
  if (pool.mode.softmax())
    totals = prologue.totals[at];
  else if (adds_up_weights(pool.mode.divisor))
    totals.weight = static_cast<double>(
        total_weight(pool, b, segment, reinterpret_cast<A*>(memory + kFoundBytes + kSumsBytes), sums));
  const A divisor = divisor_of<A>(pool.mode, totals);
  const A* const gradient = static_cast<const A*>(call.gradient) + at * pool.dim;
  A* const divided = static_cast<A*>(prologue.gradient) + at * pool.dim;
#pragma unroll 1
  for (int64_t c = thread; c < pool.dim; c += threads) divided[c] = quotient(gradient[c], divisor);
  if (!call.needs_result() || call.finds_maximum()) return;

  const A* const result = static_cast<const A*>(call.result) + at * pool.dim;
  const auto product = [&](int64_t c, A(&x)[kQuad]) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] = c + i < pool.dim ? quotient(gradient[c + i], divisor) * result[c + i] : A{};
  };
  const A along = add_columns<A>(product, pool.dim, sums);
  if (thread == 0) static_cast<A*>(prologue.products)[at] = along;
}

}  // namespace fastpool::cuda
