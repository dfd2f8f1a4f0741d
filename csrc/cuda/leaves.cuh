// The walk: the real tokens of one unit become one row of sums in shared memory.
//
// A thread owns `vector` columns and walks leaves. kLoads loads of 16 bytes are on their way before the first is added
// (so the machine code has it, given the 128 registers that two blocks of 256 threads leave): 64 KB per multiprocessor
// at best, where by Little's law some 25 to 32 KB hide the latency of an H200's memory (4.8 TB/s, 0.7 us, 132
// multiprocessors). Leaves meet in a binary counter: slot k holds a sum of 2^k leaves. The slots are in shared memory,
// each thread's own: one read and one write for every 32 rows, and their registers are free for loads.
#pragma once
#include "scores.cuh"

namespace fastpool::cuda {

constexpr int kLoads = 8;

// What a thread carries for its columns: their sums, and behind them, where weights are added up too, that sum,
// and of a softmax the exponent of all these. Every thread has the latter two for itself.
template <class A, class S, int V>
struct Columns {
  static constexpr int size = V + sums_weights<S> + S::softmax;
  A x[size];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < size; ++i) x[i] = S::template init<A, A>(A{});
    if constexpr (S::softmax) x[V + 1] = Softmax<A>().exponent;
  }
  // Of two states, which `left(i)` and `right(i)` give; left stands before right in the sequence.
  template <class Left, class Right>
  __device__ __forceinline__ void merge(Left left, Right right) {
    if constexpr (S::softmax) {
      A of_left, of_right;
      const Softmax<A> both = Softmax<A>::merge({left(V + 1), left(V)}, {right(V + 1), right(V)}, of_left, of_right);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = left(i) * of_left + right(i) * of_right;
      x[V] = both.weight, x[V + 1] = both.exponent;
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) x[i] = S::template merge<A>(left(i), right(i));
    }
  }
  __device__ __forceinline__ void merge_after(const A* left, int stride) {
    merge([&](int i) { return left[i * stride]; }, [&](int i) { return x[i]; });
  }
  __device__ __forceinline__ void merge_before(const A* right, int stride) {
    merge([&](int i) { return x[i]; }, [&](int i) { return right[i * stride]; });
  }
  __device__ __forceinline__ void save(A* to, int stride) const {
#pragma unroll
    for (int i = 0; i < size; ++i) to[i * stride] = x[i];
  }
};

// A unit: rows [from, to) of a segment, its leaves dealt to the groups in runs of a power of two; and a query.
struct BlockUnit {
  int segment, query, leaves, run;
  int64_t first, from, to;

  __device__ __forceinline__ BlockUnit(const PoolPlan& plan, const Program& program, int64_t first_real, int64_t end)
      : segment(program.segment),
        query(program.query),
        first(first_real),
        from(first_real + program.unit * plan.split) {
    to = end - from < plan.split ? end : from + plan.split;
    leaves = static_cast<int>((to - from + kLeaf - 1) / kLeaf);
    run = 1;
#pragma unroll 1
    while (run * plan.groups < leaves) run *= 2;
  }
};

// The scores of a leaf's tokens, one for each lane, become what tokens are multiplied by, and before each of them what
// has been added up. Tokens that are not real have -inf, which changes nothing.
template <class A>
FASTPOOL_KERNEL_INLINE void stage_softmax(A score, int entry, const Shared<A>& shared) {
  const Exponential<A> of_score = exponential(score);
  A largest = of_score.n;
#pragma unroll
  for (int step = 1; step < kLeaf; step *= 2) {
    const A other = __shfl_sync(kAll, largest, lane() < step ? lane() : lane() - step);
    largest = other > largest ? other : largest;
  }
  A before = __shfl_sync(kAll, largest, lane() == 0 ? 0 : lane() - 1);
  if (lane() == 0) before = Softmax<A>().exponent;
  shared.weights[entry * kLeaf + lane()] = of_score.p * power_between(of_score.n, largest);
  shared.scales[entry * kLeaf + lane()] = power_between(before, largest);
  if (lane() == kLeaf - 1) shared.exponents[entry] = largest;
}

// What follows from products of tokens with a query, for each real token of these leaves, whose first stands at row(e):
// a score or, for the gradient of the query, a share. Warps take a few neighbours each, whatever leaf they are of.
template <class S, int V, class T, class A, class Row>
FASTPOOL_KERNEL_INLINE void stage_products(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue,
                                           const BlockUnit& unit, int entries, Row row, const Shared<A>& shared) {
  constexpr int N = S::queried ? 1 : 4, M = S::queried ? 2 : 1;
  Quads quads = plan.quads;
  if constexpr (V == 1) quads.whole = false;  // one way to compile
  const int64_t at = unit.segment * call.queries.count + unit.query;
  Factor<A> factors[M];
  factors[0] = query_of<A>(call, unit.segment, unit.query);
  if constexpr (S::queried) factors[1] = gradient_of<A>(prologue, at);
#pragma unroll 1
  for (int t = warp() * N; t < entries * kLeaf; t += warps() * N) {
    const int e = t / kLeaf;
    const uint32_t word = shared.words[e] >> t % kLeaf & ((1u << N) - 1);
    if (word == 0) continue;
    const T* const first =
        static_cast<const T*>(call.hidden) + unit.segment * call.batch_stride + (row(e) + t % kLeaf) * call.row_stride;
    const T* tokens[N];
#pragma unroll
    for (int n = 0; n < N; ++n) tokens[n] = word >> n & 1 ? first + n * call.row_stride : nullptr;
    A sums[N][M];
    products<2>(tokens, quads, factors, sums);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      A value = static_cast<A>(call.queries.scale) * sums[n][0];
      if constexpr (S::queried) value = word >> n & 1 ? share_of_product(call, prologue, at, sums[n]).share : A{};
      if (lane() == n) shared.weights[t + n] = value;
    }
  }
}

// Which tokens of the next `per` leaves of every group's run are real, and their weights: a warp votes on each leaf.
template <class S, int V, class T, class A>
FASTPOOL_KERNEL_INLINE void stage(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue,
                                  const BlockUnit& unit, int per, int begin, bool count, const Shared<A>& shared) {
  const int entries = plan.groups * per;
  const auto row = [&](int e) {
    return unit.from + static_cast<int64_t>(e / per * unit.run + begin + e % per) * kLeaf;
  };
#pragma unroll 1
  for (int e = warp(); e < entries; e += warps()) {
    const int64_t i = row(e) + lane();
    const bool real = begin + e % per < unit.run && i < unit.to && is_real(call.mask, unit.segment, i);
    const unsigned word = __ballot_sync(kAll, real);
    if constexpr (S::softmax) {
      if (call.queries.data == nullptr) {
        A score = Softmax<A>().exponent;
        if (real) score = value_of<A>(call.scores, unit.segment, i, [](auto* p) { return widen(*p); });
        stage_softmax(score, e, shared);
      }
    } else if constexpr (S::queried) {
      shared.weights[e * kLeaf + lane()] = A{};  // of those that are not real
    } else if constexpr (S::weighted) {
      shared.weights[e * kLeaf + lane()] = real ? weight_of<A>(call, unit.segment, unit.first, i) : A{};
    }
    if (lane() == 0) {
      shared.words[e] = word;
      if (count) atomicAdd(shared.count, __popc(word));
    }
  }
  if constexpr (S::softmax || S::queried) {
    if (call.queries.data == nullptr) return;
    __syncthreads();
    stage_products<S, V, T>(call, plan, prologue, unit, entries, row, shared);
    if constexpr (S::softmax) {
      __syncthreads();
#pragma unroll 1
      for (int e = warp(); e < entries; e += warps()) {
        const bool real = shared.words[e] >> lane() & 1;
        stage_softmax(real ? shared.weights[e * kLeaf + lane()] : Softmax<A>().exponent, e, shared);
      }
    }
  }
}

// Adds a leaf's real tokens one after another, from column p on. Holes are not read; their neutral value changes no
// bit. Nor are tokens where weights alone are to be added up.
template <class S, int V, class T, class A>
FASTPOOL_KERNEL_INLINE void add_leaf(const T* p, int64_t stride, uint32_t word, bool weights_alone, int entry,
                                     const Shared<A>& shared, Columns<A, S, V>& state) {
  const A *const weights = shared.weights + entry * kLeaf, *const scales = shared.scales + entry * kLeaf;
#pragma unroll 1
  for (int j = 0; j < kLeaf && word >> j != 0; j += kLoads) {
    Word<T, V> token[kLoads];
#pragma unroll
    for (int r = 0; r < kLoads; ++r, p += stride) {
      token[r] = neutral<S, T, V>();
      if (word >> (j + r) & 1 && !(S::softmax && weights_alone)) token[r] = load_word<V>(p);
    }
#pragma unroll
    for (int r = 0; r < kLoads; ++r) {
      const Pack<T, V> x = bit_cast<Pack<T, V>>(token[r]);
      A w{};
      if constexpr (S::weighted) w = weights[j + r];
      if constexpr (S::softmax) {
        const A scale = scales[j + r];
        if (scale != 1) {  // rarely: the largest score so far
#pragma unroll
          for (int i = 0; i <= V; ++i) state.x[i] *= scale;
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) state.x[i] = S::template update<A, A>(state.x[i], widen(x.x[i]), w);
      if constexpr (sums_weights<S>) state.x[V] += w;
    }
  }
  if constexpr (S::softmax) state.x[V + 1] = shared.exponents[entry];
}

// The unit's sums into shared.row, and its totals.
template <class S, int V, class T, class A>
FASTPOOL_KERNEL_INLINE UnitTotals reduce_unit(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue,
                                              const BlockUnit& unit, const T* rows, int dim, const Shared<A>& shared) {
  using C = Columns<A, S, V>;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int group = thread / plan.columns, column = thread - group * plan.columns;
  const int begin = group * unit.run;
  const int mine = group >= plan.groups ? 0 : unit.leaves - begin < unit.run ? unit.leaves - begin : unit.run;
  // Without a mask or weights, bounds alone say which tokens are real.
  const bool staged = S::weighted || call.mask.data != nullptr;
  const int per = kStage / plan.groups;
  const int walked = unit.run < unit.leaves ? unit.run : unit.leaves;  // by the longest group
  if (staged) {
    if (thread == 0) *shared.count = 0;
    __syncthreads();
  }
  A* const slot = shared.slots + thread;  // element i of slot k stands at (k * C::size + i) * threads

  A weight{}, exponent{};
  for (int pass = 0; pass * plan.columns * V < dim; ++pass) {
    const int c = (pass * plan.columns + column) * V;
    C state;
    state.clear();
    for (int at = 0; at < walked; at += per) {
      if (staged && (pass == 0 || walked > per)) {
        if (pass + at > 0) __syncthreads();  // what was staged before has been walked
        stage<S, V, T>(call, plan, prologue, unit, per, at, pass == 0, shared);
        __syncthreads();
      }
      if (c >= dim) continue;
      for (int leaf = at; leaf < at + per && leaf < mine; ++leaf) {
        const int64_t i = unit.from + static_cast<int64_t>(begin + leaf) * kLeaf;
        const int entry = group * per + leaf - at;
        uint32_t word = unit.to - i >= kLeaf ? kAll : (1u << (unit.to - i)) - 1;
        if (staged) word = shared.words[entry];
        state.clear();
        add_leaf<S, V>(rows + i * call.row_stride + c, call.row_stride, word, prologue.totals != nullptr, entry, shared,
                       state);
        int k = 0;
#pragma unroll 1
        for (; leaf >> k & 1; ++k) state.merge_after(slot + k * C::size * threads, threads);
        if (leaf + 1 < mine) state.save(slot + k * C::size * threads, threads);
      }
    }
    // What is left of the counter, smallest sum first: missing right siblings are neutral.
    if (c < dim && mine > 0) {
      const int done = mine - 1;
      int k = 0;
      while (done >> k & 1) ++k;
#pragma unroll 1
      for (; done >> k != 0; ++k)
        if (done >> k & 1) state.merge_after(slot + k * C::size * threads, threads);
    }
    // The groups meet in the same tree.
    for (int step = 1; step < plan.groups; step *= 2) {
      __syncthreads();
      if (group % (2 * step) == step) state.save(slot, threads);
      __syncthreads();
      if (group % (2 * step) == 0 && group + step < plan.groups)
        state.merge_before(slot + step * plan.columns, threads);
    }
    if (plan.groups > 1) __syncthreads();
    if (group == 0 && c < dim) {
#pragma unroll
      for (int i = 0; i < V; ++i) shared.row[c + i] = state.x[i];
    }
    if constexpr (sums_weights<S>) weight = state.x[V];
    if constexpr (S::softmax) exponent = state.x[V + 1];
  }
  UnitTotals totals;
  // Thread 0 has the first columns; it writes what the block as a whole has to know.
  if constexpr (sums_weights<S>)
    if (thread == 0) shared.sums[0] = weight, shared.sums[1] = exponent;
  __syncthreads();
  totals.count = staged ? *shared.count : unit.to - unit.from;
  if constexpr (sums_weights<S>) totals.weight = static_cast<double>(shared.sums[0]);
  if constexpr (S::softmax) totals.exponent = static_cast<double>(shared.sums[1]);
  return totals;
}

}  // namespace fastpool::cuda
