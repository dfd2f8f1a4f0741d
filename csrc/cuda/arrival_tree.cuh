// The arrival tree: partial states of a segment's units meet in the launch that made them. No block waits: one that
// has finished a node leaves its state, counts itself in at the parent and goes, unless it is the last of the children
// to arrive; then it merges all their states, in the order of the units and not of arrival, and goes on upwards.
#pragma once
#include "block.cuh"
#include "kernels.h"

namespace fastpool::cuda {

// Counters of the launch before, for the launch after this one (../counters.h): a share for each block.
FASTPOOL_KERNEL_INLINE void clear_stale(const Counters& counters) {
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x, blocks = int64_t{gridDim.x} * gridDim.y;
#pragma unroll 1
  for (int64_t i = block * blockDim.x + threadIdx.x; i < counters.stale_count; i += blocks * blockDim.x)
    counters.stale[i] = 0;
}

// The state of a node stands at the slot of the first unit it covers; its counter, at depth d >= 1, d slots further: a
// node of several children covers more than 8^(d-1) >= d units, and up to depth 8 no two counters meet.
template <class S, class A>
struct Children {
  A of[kFanInShift][kFanIn];  // of a softmax: what each side of a step is multiplied by

  // Totals of children become those of their node.
  __device__ __forceinline__ Softmax<A> merge(Softmax<A> (&child)[kFanIn]) {
#pragma unroll
    for (int step = 0; step < kFanInShift; ++step)
#pragma unroll
      for (int k = 0; k < kFanIn; k += 2 << step) {
        const int right = k + (1 << step);
        if constexpr (S::softmax)
          child[k] = Softmax<A>::merge(child[k], child[right], of[step][k], of[step][right]);
        else
          child[k].weight = S::template merge<A>(child[k].weight, child[right].weight);
      }
    return child[0];
  }
  // And columns.
  __device__ __forceinline__ A merge(A (&x)[kFanIn]) const {
#pragma unroll
    for (int step = 0; step < kFanInShift; ++step)
#pragma unroll
      for (int k = 0; k < kFanIn; k += 2 << step) {
        const int right = k + (1 << step);
        if constexpr (S::softmax)
          x[k] = x[k] * of[step][k] + x[right] * of[step][right];
        else
          x[k] = S::template merge<A>(x[k], x[right]);
      }
    return x[0];
  }
};

// True for the block that arrives last at the root: rows and totals in shared memory are then the whole segment's.
template <class S, int K, class A>
FASTPOOL_KERNEL_INLINE bool merge_last_block(const PoolCall& call, const Workspace& workspace, int columns,
                                             int64_t column, const Program& program, const Shared<A>& shared) {
  const int64_t dim = call.queries.count * call.dim, blocks = blocks_of_unit<K>(call);  // of a slot
  const int64_t first_slot = static_cast<int64_t>(blockIdx.y) * gridDim.x + program.query / K;
  A* const sums = static_cast<A*>(workspace.sums) + program.query * call.dim + column;
  UnitTotals* const all_totals = workspace.totals + first_slot * K;
  int* const arrived = workspace.counters.arrived + first_slot;
  const int slot = program.slot, unit = program.unit, units = program.units;
  const int queries = queries_from<K>(call, program.query);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  int64_t node = slot + unit;
  int depth = 1;
#pragma unroll 1
  for (int shift = 0; (units - 1) >> shift > 0; shift += kFanInShift, ++depth) {  // a child covers 2^shift units
    const int parent = shift + kFanInShift, first = unit >> parent << parent;
    const int left = ((units - 1 - first) >> shift) + 1;
    if (left == 1) continue;  // an only child passes for its parent
    const int children = left < kFanIn ? left : kFanIn;
    const int64_t width = int64_t{1} << shift;
    // A part without real tokens leaves no sums; they are never read.
    if (shared.totals->count > 0)
#pragma unroll 1
      for (int k = 0; k < queries; ++k)
#pragma unroll 1
        for (int c = thread; c < columns; c += threads) sums[node * dim + k * call.dim + c] = shared.of_query(k).row[c];
    if (thread < queries) all_totals[node * blocks * K + thread] = shared.totals[thread];
    __syncthreads();
    if (thread == 0) {
      // Release: what this block has written comes before its arrival. Acquire: the arrivals of the others come before
      // what is read of theirs.
      *shared.last = add_acq_rel(arrived + (int64_t{slot} + first + depth) * blocks, 1) == children - 1;
    }
    __syncthreads();
    if (*shared.last == 0) return false;

    // What other blocks wrote is read past the first-level cache, which does not see it. A missing child is neutral.
    node = slot + first;
#pragma unroll 1
    for (int query = 0; query < queries; ++query) {
      const Shared<A> own = shared.of_query(query);
      UnitTotals totals;
      unsigned there = 0;
      Softmax<A> of_child[kFanIn];
#pragma unroll
      for (int k = 0; k < kFanIn; ++k) {
        const UnitTotals* const child = all_totals + (node + k * width) * blocks * K + query;
        const int64_t count = k < children ? __ldcg(reinterpret_cast<const long long*>(&child->count)) : 0;
        totals.count += count;
        there |= static_cast<unsigned>(count > 0) << k;
        if constexpr (sums_weights<S>)
          if (k < children) of_child[k].weight = static_cast<A>(__ldcg(&child->weight));
        if constexpr (S::softmax)
          if (k < children) of_child[k].exponent = static_cast<A>(__ldcg(&child->exponent));
      }
      Children<S, A> merging;
      if constexpr (sums_weights<S>) {
        const Softmax<A> all = merging.merge(of_child);
        totals.weight = static_cast<double>(all.weight), totals.exponent = static_cast<double>(all.exponent);
      }
      if (thread == 0) *own.totals = totals;
#pragma unroll 1
      for (int c = thread; c < columns; c += threads) {
        A x[kFanIn];
        const A* child = sums + node * dim + query * call.dim + c;
#pragma unroll
        for (int k = 0; k < kFanIn; ++k, child += width * dim)
          x[k] = there >> k & 1 ? __ldcg(child) : S::template init<A, A>(A{});
        own.row[c] = merging.merge(x);
      }
    }
    __syncthreads();
  }
  return true;
}

}  // namespace fastpool::cuda
