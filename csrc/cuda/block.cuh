// What a block has: its shared memory, its segment and unit, and the weights of tokens.
#pragma once
#include "../weight.h"
#include "numbers.cuh"
#include "plan.h"

namespace fastpool::cuda {

// Whether weights are added up too; those of a query's gradient are not. (Kernels have SoftmaxState for scores of
// either kind, so that its weights alone depend on states.)
template <class S>
constexpr bool sums_weights = S::weighted && !S::queried;

// Which unit of which segment a block reduces, of how many; the first of the segment's queries it does that for; and
// the slot of that segment's first unit. segment -1: none.
struct Program {
  int segment, query, unit, slot, units = 1;  // a grid, and so all of them, stays below 2^31
};

// All of a block's shared memory; PoolPlan::shared says what stands where.
extern __shared__ uint4 shared_memory[];

template <class A>
struct Shared {
  A *row, *slots, *weights, *scales, *exponents, *sums;
  int pitch;           // from a query's row to the next
  UnitTotals* totals;  // of each query
  Program* program;    // waits here while tokens are added, which takes all registers
  int64_t* found;      // by each warp
  uint32_t* words;     // a bit for each token of a leaf: whether it is real
  uint32_t* grows;     // likewise, of each query: whether what has been added up is scaled before it
  int *count, *last;

  __device__ __forceinline__ explicit Shared(const SharedLayout& at) {
    char* const base = reinterpret_cast<char*>(shared_memory);
    row = reinterpret_cast<A*>(base);
    slots = reinterpret_cast<A*>(base + at.slots);
    weights = reinterpret_cast<A*>(base + at.weights);
    scales = weights + kStage * kLeaf;
    exponents = scales + kStage * kLeaf;
    sums = reinterpret_cast<A*>(base + at.sums);
    pitch = at.row / static_cast<int>(sizeof(A));
    totals = reinterpret_cast<UnitTotals*>(base + at.totals);
    found = reinterpret_cast<int64_t*>(base + at.found);
    words = reinterpret_cast<uint32_t*>(base + at.words);
    count = reinterpret_cast<int*>(words + kStage);
    last = count + 1;
    program = reinterpret_cast<Program*>(last + 1);
    grows = reinterpret_cast<uint32_t*>(program + 1);
  }
  // With the row and the totals of the block's query number k.
  __device__ __forceinline__ Shared of_query(int k) const {
    Shared own = *this;
    own.row += k * pitch, own.totals += k;
    return own;
  }
};

FASTPOOL_KERNEL_INLINE int lane() { return static_cast<int>(threadIdx.x) % 32; }
FASTPOOL_KERNEL_INLINE int warp() { return static_cast<int>(threadIdx.x) / 32; }
FASTPOOL_KERNEL_INLINE int warps() { return static_cast<int>(blockDim.x) / 32; }

constexpr unsigned kAll = 0xffffffffu;

// How many queries a block takes from `query` on, where K are the most.
template <int K>
FASTPOOL_KERNEL_INLINE int queries_from(const PoolCall& call, int query) {
  const int left = static_cast<int>(call.queries.count) - query;
  return K == 1 ? 1 : left < K ? left : K;
}

// Blocks that share a unit, where each takes K of its queries.
template <int K>
FASTPOOL_KERNEL_INLINE int blocks_of_unit(const PoolCall& call) {
  return (static_cast<int>(call.queries.count) + K - 1) / K;
}

FASTPOOL_KERNEL_INLINE int64_t clamped(int64_t row, const PoolCall& call) {
  return row < 0 ? 0 : row > call.rows ? call.rows : row;
}

// Packed segments share the slots: that of segment b's first unit is v(b) = cu[b] / split + b, which leaves room for
// its units and at least one. The last b with v(b) <= p is looked for by a warp, 32 ways at a time. Values out of range
// are clamped, so slots stay in range whatever cu_seqlens hold; where they decrease, a segment may be found by no
// block, and others be added up wrongly.
template <int K>
FASTPOOL_KERNEL_INLINE Program find_program(const PoolCall& call, const PoolPlan& plan) {
  const int blocks = blocks_of_unit<K>(call), block = static_cast<int>(blockIdx.x);
  const int p = block / blocks, query = (block - p * blocks) * K;
  if (!plan.search) {
    const int units = static_cast<int>(plan.units), b = p / units;
    return {b, query, p - b * units, b * units};
  }
  const auto slot = [&](int b) { return static_cast<int>(clamped(call.starts[b], call) >> plan.split_shift) + b; };
  int b = 0;
#pragma unroll 1
  for (int n = static_cast<int>(call.batch), step; n > 1; n = step < n ? step : n) {
    step = (n + 31) / 32;
    const int at = lane() * step;
    const int before = __popc(__ballot_sync(kAll, at < n && slot(b + at) <= p));
    if (before == 0) break;
    b += (before - 1) * step;
    n -= (before - 1) * step;
  }
  const int first = slot(b);
  return {first <= p ? b : -1, query, p - first, first};
}

// Whether cu_seqlens decrease, which is the caller's error, at segment b.
FASTPOOL_KERNEL_INLINE bool decreases(const PoolCall& call, int64_t b) {
  return clamped(call.starts[b], call) > clamped(call.ends[b], call);
}

template <class A>
FASTPOOL_KERNEL_INLINE A weight_of(const PoolCall& call, int64_t b, int64_t first, int64_t i) {
  return fastpool::weight_of<A>(call, b, first, i, [](auto* p) { return widen(*p); });
}

}  // namespace fastpool::cuda
