// The walk: the real tokens of one unit become one row of sums in shared memory, for each of the block's K queries.
//
// A thread owns `vector` columns and walks leaves. kLoads loads of 16 bytes are on their way before the first is added
// (so the machine code has it, given the 128 registers that two blocks of 256 threads leave): 64 KB per multiprocessor
// at best, where by Little's law some 25 to 32 KB hide the latency of an H200's memory (4.8 TB/s, 0.7 us, 132
// multiprocessors). The sums of several queries leave registers for half of them; their tokens have been read for
// products just before. Leaves meet in a binary counter: slot k holds a sum of 2^k leaves. The slots are in shared
// memory, each thread's own: one read and one write for every 32 rows, and their registers are free for loads.
#pragma once
#include "scores.cuh"

namespace fastpool::cuda {

template <int K>
constexpr int kLoads = K == 1 ? 8 : 4;

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
  __device__ __forceinline__ void load(const A* from, int stride) {
#pragma unroll
    for (int i = 0; i < size; ++i) x[i] = from[i * stride];
  }
};

// A unit: `tokens` rows of a segment from row `from` on, its leaves dealt to the groups in runs of a power of two.
struct BlockUnit {
  int tokens, leaves, run;
  int64_t first, from;

  __device__ __forceinline__ BlockUnit(const PoolPlan& plan, const Program& program, int64_t first_real, int64_t end)
      : first(first_real), from(first_real + program.unit * plan.split) {
    tokens = static_cast<int>(end - from < plan.split ? end - from : plan.split);
    leaves = (tokens + kLeaf - 1) / kLeaf;
    run = 1;
#pragma unroll 1
    while (run * plan.groups < leaves) run *= 2;
    if (run > leaves) run = leaves;  // of one group
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
  const A scale = power_between(before, largest);
  shared.scales[entry * kLeaf + lane()] = scale;
  const unsigned grows = __ballot_sync(kAll, scale != 1);
  if (lane() == kLeaf - 1) shared.exponents[entry] = largest, shared.grows[entry] = grows;
}

// What follows from products of tokens with a query, for each real token of these leaves, whose first is the unit's
// token number first(e): a score for each query or, for the gradient of the query, a share. Warps take a few neighbours
// each, whatever leaf they are of.
template <class S, int V, int K, class T, class A, class First>
FASTPOOL_KERNEL_INLINE void stage_products(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue,
                                           const BlockUnit& unit, First first, const Shared<A>& shared) {
  constexpr int N = S::queried ? 1 : K > 1 && sizeof(T) == 2 ? 2 : 4, M = S::queried ? 2 : K, kPieces = K > 1 ? 1 : 2;
  const int segment = shared.program->segment, query = shared.program->query, last = queries_from<K>(call, query) - 1;
  const int64_t at = segment * call.queries.count + query;
  Factor<A> factors[M];
#pragma unroll
  for (int k = 0; k < K; ++k)  // the last query stands for those that are missing
    factors[k] = query_of<A>(call, segment, query + (k < last ? k : last));
  if constexpr (S::queried) factors[1] = gradient_of<A>(prologue, at);
  // One way to compile, if possible: the plan sees to it where there are several queries.
  const bool whole = V > 1 && (K > 1 || are_whole<T>(plan.quads, factors));
#pragma unroll 1
  for (int t = warp() * N; t < kStage / K * kLeaf; t += warps() * N) {
    const int e = t / kLeaf;
    const uint32_t word = shared.words[e] >> t % kLeaf & ((1u << N) - 1);
    if (word == 0) continue;
    const T* const tokens = static_cast<const T*>(call.hidden) + segment * call.batch_stride +
                            (unit.from + first(e) + t % kLeaf) * call.row_stride;
    A sums[N][M];
    products<kPieces>(tokens, call.row_stride, word, whole, plan.quads.hidden, factors, sums);
    A* const scores = shared.weights + e * K * kLeaf + t % kLeaf;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        A value = static_cast<A>(call.queries.scale) * sums[n][k];
        if constexpr (S::queried) value = word >> n & 1 ? share_of_product(call, prologue, at, sums[n]).share : A{};
        if (lane() == n) scores[k * kLeaf + n] = value;
      }
  }
}

// Which tokens of the next leaves of every group's run, as many as are staged at once, are real, and their weights: a
// warp votes on each leaf. Those of leaf e for query k are entry e * K + k.
template <class S, int V, int K, class T, class A>
FASTPOOL_KERNEL_INLINE void stage(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue,
                                  const BlockUnit& unit, int begin, bool count, const Shared<A>& shared) {
  constexpr int entries = kStage / K;
  const int segment = shared.program->segment;
  const auto first = [&](int e) {
    return ((e >> plan.staged_shift) * unit.run + begin + (e & (plan.staged - 1))) * kLeaf;
  };
#pragma unroll 1
  for (int e = warp(); e < entries; e += warps()) {
    const int token = first(e) + lane();
    const int64_t i = unit.from + token;
    const bool real =
        begin + (e & (plan.staged - 1)) < unit.run && token < unit.tokens && is_real(call.mask, segment, i);
    const unsigned word = __ballot_sync(kAll, real);
    if constexpr (S::softmax) {
      if (K == 1 && call.queries.data == nullptr) {
        A score = Softmax<A>().exponent;
        if (real) score = value_of<A>(call.scores, segment, i, [](auto* p) { return widen(*p); });
        stage_softmax(score, e, shared);
      }
    } else if constexpr (S::queried) {
      shared.weights[e * kLeaf + lane()] = A{};  // of those that are not real
    } else if constexpr (S::weighted) {
      shared.weights[e * kLeaf + lane()] = real ? weight_of<A>(call, segment, unit.first, i) : A{};
    }
    if (lane() == 0) {
      shared.words[e] = word;
      if (count) atomicAdd(shared.count, __popc(word));
    }
  }
  if constexpr (S::softmax || S::queried) {
    if (K == 1 && call.queries.data == nullptr) return;
    __syncthreads();
    stage_products<S, V, K, T>(call, plan, prologue, unit, first, shared);
    if constexpr (S::softmax) {
      __syncthreads();
#pragma unroll 1
      for (int e = warp(); e < entries * K; e += warps()) {
        const bool real = shared.words[e / K] >> lane() & 1;
        stage_softmax(real ? shared.weights[e * kLeaf + lane()] : Softmax<A>().exponent, e, shared);
      }
    }
  }
}

// Adds a leaf's real tokens one after another, from column p on, to the state of each query. Holes are not read; their
// neutral value changes no bit. Nor are tokens where weights alone are to be added up.
template <class S, int V, class T, class A, int K>
FASTPOOL_KERNEL_INLINE void add_leaf(const T* p, int64_t stride, uint32_t word, bool weights_alone, int entry,
                                     const Shared<A>& shared, Columns<A, S, V> (&states)[K]) {
  const A *const weights = shared.weights + entry * kLeaf, *const scales = shared.scales + entry * kLeaf;
  uint32_t grows = 0;
  if constexpr (S::softmax) {
#pragma unroll
    for (int k = 0; k < K; ++k) grows |= shared.grows[entry + k];
  }
#pragma unroll 1
  for (int j = 0; j < kLeaf && word >> j != 0; j += kLoads<K>) {
    Word<T, V> token[kLoads<K>];
#pragma unroll
    for (int r = 0; r < kLoads<K>; ++r, p += stride) {
      token[r] = neutral<S, T, V>();
      if (word >> (j + r) & 1 && !(S::softmax && weights_alone)) token[r] = load_word<V>(p);
    }
#pragma unroll
    for (int r = 0; r < kLoads<K>; ++r) {
      if constexpr (S::softmax) {
        if (grows >> (j + r) & 1) {  // rarely: the largest score so far, for one of the queries
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const A scale = scales[k * kLeaf + j + r];
#pragma unroll
            for (int i = 0; i <= V; ++i) states[k].x[i] *= scale;
          }
        }
      }
      const Pack<T, V> x = bit_cast<Pack<T, V>>(token[r]);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        Columns<A, S, V>& state = states[k];
        A w{};
        if constexpr (S::weighted) w = weights[k * kLeaf + j + r];
#pragma unroll
        for (int i = 0; i < V; ++i) state.x[i] = S::template update<A, A>(state.x[i], widen(x.x[i]), w);
        if constexpr (sums_weights<S>) state.x[V] += w;
      }
    }
  }
  if constexpr (S::softmax) {
#pragma unroll
    for (int k = 0; k < K; ++k) states[k].x[V + 1] = shared.exponents[entry + k];
  }
}

// The unit's sums, each query's into a row of its own from shared.row on, and its totals.
template <class S, int V, int K, class T, class A>
FASTPOOL_KERNEL_INLINE void reduce_unit(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue,
                                        const BlockUnit& unit, const T* rows, int dim, const Shared<A>& shared) {
  using C = Columns<A, S, V>;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int group = thread / plan.columns, column = thread - group * plan.columns;
  const int begin = group * unit.run;
  const int mine = group >= plan.groups ? 0 : unit.leaves - begin < unit.run ? unit.leaves - begin : unit.run;
  // Without a mask or weights, bounds alone say which tokens are real.
  const bool staged = S::weighted || call.mask.data != nullptr;
  const int per = plan.staged;
  if (staged) {
    if (thread == 0) *shared.count = 0;
    __syncthreads();
  }
  // Of a query's state; its element i stands i * threads further.
  const auto slot = [&](int level, int k) { return shared.slots + thread + (level * K + k) * C::size * threads; };

  // Several states are too many to be alive while more leaves are staged: the last ones wait too, in slots that are
  // free whatever the number of leaves.
  constexpr bool kWaits = K > 1;

  for (int pass = 0; pass * plan.columns * V < dim; ++pass) {
    const int c = (pass * plan.columns + column) * V;
    C states[K];
#pragma unroll
    for (C& state : states) state.clear();
    for (int at = 0; at < unit.run; at += per) {
      if (staged && (pass == 0 || unit.run > per)) {
        if (pass + at > 0) __syncthreads();  // what was staged before has been walked
        stage<S, V, K, T>(call, plan, prologue, unit, at, pass == 0, shared);
        __syncthreads();
      }
      if (c >= dim) continue;
      for (int leaf = at; leaf < at + per && leaf < mine; ++leaf) {
        const int token = (begin + leaf) * kLeaf, left = unit.tokens - token;
        const int entry = group * per + leaf - at;
        uint32_t word = left >= kLeaf ? kAll : (1u << left) - 1;
        if (staged) word = shared.words[entry];
#pragma unroll
        for (C& state : states) state.clear();
        add_leaf<S, V>(rows + (unit.from + token) * call.row_stride + c, call.row_stride, word,
                       prologue.totals != nullptr, entry * K, shared, states);
        int level = 0;
#pragma unroll 1
        for (; leaf >> level & 1; ++level)
#pragma unroll
          for (int k = 0; k < K; ++k) states[k].merge_after(slot(level, k), threads);
        const bool last = leaf + 1 == mine;
        if (kWaits || !last) {
#pragma unroll
          for (int k = 0; k < K; ++k) states[k].save(slot(last ? 0 : level, k), threads);
        }
      }
    }
    if (kWaits) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        states[k].clear();
        if (c < dim && mine > 0) states[k].load(slot(0, k), threads);
      }
    }
    // What is left of the counter, smallest sum first: missing right siblings are neutral.
    if (c < dim && mine > 0) {
      const int done = mine - 1;
      int level = 0;
      while (done >> level & 1) ++level;
#pragma unroll 1
      for (; done >> level != 0; ++level)
        if (done >> level & 1) {
#pragma unroll
          for (int k = 0; k < K; ++k) states[k].merge_after(slot(level, k), threads);
        }
    }
    // The groups meet in the same tree.
    for (int step = 1; step < plan.groups; step *= 2) {
      __syncthreads();
      if (group % (2 * step) == step) {
#pragma unroll
        for (int k = 0; k < K; ++k) states[k].save(slot(0, k), threads);
      }
      __syncthreads();
      if (group % (2 * step) == 0 && group + step < plan.groups) {
#pragma unroll
        for (int k = 0; k < K; ++k) states[k].merge_before(slot(0, k) + step * plan.columns, threads);
      }
    }
    if (plan.groups > 1) __syncthreads();
    if (group == 0 && c < dim) {
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < V; ++i) shared.of_query(k).row[c + i] = states[k].x[i];
    }
    // Thread 0 has the first columns; it writes what the block as a whole has to know.
    if (thread == 0) {
      UnitTotals totals;
      totals.count = staged ? *shared.count : unit.tokens;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if constexpr (sums_weights<S>) totals.weight = static_cast<double>(states[k].x[V]);
        if constexpr (S::softmax) totals.exponent = static_cast<double>(states[k].x[V + 1]);
        shared.totals[k] = totals;
      }
    }
  }
  __syncthreads();
}

}  // namespace fastpool::cuda
