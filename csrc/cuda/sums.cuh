// Sums in the canonical tree that are not of token states: of a row's columns, of a segment's weights. A thread takes
// four neighbouring columns at a time.
#pragma once
#include "../finish.h"
#include "block.cuh"

namespace fastpool::cuda {

constexpr int kWarpColumns = 32 * kQuad, kWarpTokens = kWarpLeaves * kLeaf;
constexpr int kLeafPitch = kLeaf + 1;  // in shared memory, where neighbouring leaves must not share a bank

// The sum of x over a warp's lanes, neighbours first, in every lane; of n neighbouring lanes where the others repeat
// them.
template <class V>
FASTPOOL_KERNEL_INLINE V add_lanes(V x, int n = 32) {
#pragma unroll
  for (int step = 1; step < n; step *= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Sum of n values in an aligned binary tree, neighbours first; a missing right sibling adds nothing. value(i) is made
// by a warp, and the same in all its lanes. `sums`: kBlockSums, and behind them a binary counter.
template <class V, class Value>
FASTPOOL_KERNEL_INLINE V add_up(int64_t n, Value value, V* sums) {
  V* const level = sums + kBlockSums;
  V total{};
  int64_t piece = 0;
#pragma unroll 1
  for (int64_t begin = 0; begin < n; begin += kBlockSums, ++piece) {
    __syncthreads();  // the sums before have been read
#pragma unroll 1
    for (int i = warp(); i < kBlockSums; i += warps()) {
      const V sum = begin + i < n ? value(begin + i) : V{};
      if (lane() == 0) sums[i] = sum;
    }
    __syncthreads();
    total = add_lanes(sums[2 * lane()] + sums[2 * lane() + 1]);
    int k = 0;
    for (; piece >> k & 1; ++k) total = level[k] + total;
    if (begin + kBlockSums < n) {
      __syncthreads();  // all have added what the counter held
      if (threadIdx.x == 0) level[k] = total;
    } else {
      for (const int64_t rest = piece; rest >> k != 0; ++k)
        if (rest >> k & 1) total = level[k] + total;
    }
  }
  return total;
}

// Columns c to c + 3 of a row of `dim`, zeros behind the last; `aligned`: rows begin where four values may be loaded.
template <class T, class A>
FASTPOOL_KERNEL_INLINE void read_quad(const T* row, int64_t c, int64_t dim, bool aligned, A (&x)[kQuad]) {
  if (aligned && c + kQuad <= dim) return read<kQuad>(row + c, x);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) x[i] = c + i < dim ? widen(load<1>(row + c + i).x[0]) : A{};
}

// ---- columns, whose sum is never -0: load(c, x) gives c to c + 3; what it gives behind the last is not used
template <class A>
FASTPOOL_KERNEL_INLINE A add_quad(A (&x)[kQuad], int64_t c, int64_t dim) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (c + i >= dim) x[i] = A{};
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// The sum of `dim` columns by a block, in every thread.
template <class A, class Load>
FASTPOOL_KERNEL_INLINE A add_columns(Load load, int64_t dim, A* sums) {
  const auto of_warp = [&](int64_t i) {
    const int64_t c = i * kWarpColumns + lane() * kQuad;
    A x[kQuad];
    load(c, x);
    return add_lanes(add_quad(x, c, dim));
  };
  return add_up<A>((dim + kWarpColumns - 1) / kWarpColumns, of_warp, sums) + A{};
}

// The sums of M rows of `dim` columns by a warp, in every lane: load(c, x) gives columns c to c + 3 of each. Level k of
// a binary counter is lane k's.
template <class A, int M, class Load>
FASTPOOL_KERNEL_INLINE void add_columns_of_warp(Load load, int64_t dim, A (&totals)[M]) {
  constexpr int kAtOnce = M < 4 ? 4 / M : 1;
  A levels[M]{};
#pragma unroll
  for (A& total : totals) total = A{};
  int64_t piece = 0;
#pragma unroll 1
  for (int64_t begin = 0; begin < dim; begin += kAtOnce * kWarpColumns, ++piece) {
    A sums[kAtOnce][M];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t c = begin + j * kWarpColumns + lane() * kQuad;
      A x[M][kQuad];
      load(c, x);
#pragma unroll
      for (int m = 0; m < M; ++m) sums[j][m] = add_lanes(add_quad(x[m], c, dim));
    }
#pragma unroll
    for (int step = 1; step < kAtOnce; step *= 2)
#pragma unroll
      for (int j = 0; j < kAtOnce; j += 2 * step)
#pragma unroll
        for (int m = 0; m < M; ++m) sums[j][m] += sums[j + step][m];
    const bool last = begin + kAtOnce * kWarpColumns >= dim;
    int k = 0;
#pragma unroll 1
    for (; piece >> k & 1 || (last && piece >> k != 0); ++k)
      if (piece >> k & 1) {
#pragma unroll
        for (int m = 0; m < M; ++m) sums[0][m] = __shfl_sync(kAll, levels[m], k) + sums[0][m];
      }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (lane() == k) levels[m] = sums[0][m];
      totals[m] = sums[0][m];
    }
  }
#pragma unroll
  for (A& total : totals) total += A{};
}

// ---- tokens: of the real ones among the rows [begin, end) of sequence b, by a block
FASTPOOL_KERNEL_INLINE int64_t total_count(const PoolCall& call, int64_t b, const Segment& segment, int64_t* sums) {
  const int64_t n = segment.end - segment.begin;
  if (call.mask.data == nullptr) return n;
  const auto of_warp = [&](int64_t i) {
    int64_t count = 0;
#pragma unroll
    for (int j = 0; j < kWarpLeaves; ++j) {
      const int64_t at = (i * kWarpLeaves + j) * kLeaf + lane();
      count += __popc(__ballot_sync(kAll, at < n && is_real(call.mask, b, segment.begin + at)));
    }
    return count;
  };
  return add_up<int64_t>((n + kWarpTokens - 1) / kWarpTokens, of_warp, sums);
}

// In the canonical order, whose leaves start at segment.begin. A warp reads leaves along their tokens and adds them up
// across: `leaves`, kWarpLeaves * kLeafPitch for each warp, is where they turn.
template <class A>
FASTPOOL_KERNEL_INLINE A total_weight(const PoolCall& call, int64_t b, const Segment& segment, A* leaves, A* sums) {
  const int64_t n = segment.end - segment.begin;
  A* const mine = leaves + warp() * kWarpLeaves * kLeafPitch;
  const auto of_warp = [&](int64_t i) {
#pragma unroll
    for (int j = 0; j < kWarpLeaves; ++j) {
      const int64_t row = segment.begin + (i * kWarpLeaves + j) * kLeaf + lane();
      A weight{};
      if (row < segment.end) {
        weight = weight_of<A>(call, b, segment.begin, row);
        if (!is_real(call.mask, b, row)) weight = A{};
      }
      mine[j * kLeafPitch + lane()] = weight;
    }
    __syncwarp();
    A sum{};
#pragma unroll 8
    for (int t = 0; t < kLeaf; ++t) sum += mine[lane() % kWarpLeaves * kLeafPitch + t];
    __syncwarp();
    return add_lanes(sum, kWarpLeaves);
  };
  return add_up<A>((n + kWarpTokens - 1) / kWarpTokens, of_warp, sums);
}

// ---- x / max(norm(x), eps) is (x * scale) / divisor
template <class A>
struct Norm {
  A scale = 1, divisor = 1;
  bool below_eps = false;

  template <class Load>
  __device__ __forceinline__ static Norm of(Load load, int64_t dim, A eps, A* sums) {
    Norm norm;
    A squares;
#pragma unroll 1
    for (;;) {
      const A scale = norm.scale * norm.scale;
      const auto square = [&](int64_t c, A(&x)[kQuad]) {
        load(c, x);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) x[i] = (x[i] * scale) * (x[i] * scale);
      };
      squares = add_columns<A>(square, dim, sums);
      if (norm.scale != 1) break;
      norm.scale = norm_scale(squares, eps);
      if (norm.scale == 1) break;
    }
    A length = square_root(squares);
    if (norm.scale != 1) length /= norm.scale;
    const A least = eps * norm.scale;  // the norm is scaled, so its lower bound is too
    norm.divisor = length > least || length != length ? length : least;
    norm.below_eps = length < least;
    return norm;
  }
};

}  // namespace fastpool::cuda
