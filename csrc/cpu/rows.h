// Rows into states, and states into each other. Included by kernel_impl.h, into an instruction set's namespace.
#pragma once
#include "../state.h"
#include "leaves.h"
#include "softmax.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

constexpr int kBlockVecs = 8;  // vectors of columns whose sums stay in registers
#if defined(__AVX512VL__)
constexpr int kBlockStates = 2;  // of so many modes; of more, half as many columns
#else
constexpr int kBlockStates = 1;
#endif
constexpr int kGroupRows = 8;              // rows added to them in one go
constexpr int kGroupRowsOfSeveral = 2;     // of several modes, which compute more
constexpr int64_t kAheadBytes = 64 << 10;  // how far ahead lines are fetched
constexpr int64_t kShortRow = 4 << 10;     // up to here float32 rows go one at a time
constexpr int64_t kHeadBytes = 4 << 10;    // and only the head of the next segment is fetched ahead

// body(i, State) of a state, or of several of them.
template <class S, class Body>
FASTPOOL_INLINE void each_state(S state, Body body) {
  body(std::integral_constant<int, 0>{}, state);
}
template <class... S, class Body>
FASTPOOL_INLINE void each_state(Together<S...>, Body body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}, S{}), ...);
  }(std::make_integer_sequence<int, sizeof...(S)>{});
}

// Adds rows[0..k) to `Vecs` vectors of sums at column c, one row after another. Of several states each has its own,
// padded_columns(dim) apart.
template <class S, int Vecs, bool ahead, class T, class A>
FASTPOOL_INLINE void add_rows(const T* const* rows, const A* weight, const A* scale, int k, int64_t dim, int64_t c,
                              int part, bool fresh, A* acc, Queue<T, A, S>& queue) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  const int64_t apart = padded_columns(dim);
  // As many bytes as are added are fetched, a piece with every row.
  constexpr int piece = Vecs * lanes * static_cast<int>(sizeof(T));
  [[maybe_unused]] const char* later = nullptr;
  if constexpr (ahead) {
    if (k > 0) later = queue.take(k * piece, rows[0] + c);
  }
  V sum[S::count][Vecs];
  each_state(S{}, [&](auto i, auto state) __attribute__((always_inline)) {
    using One = decltype(state);
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v)
      sum[i][v] = fresh ? One::template init<V, A>(A{}) : read<V>(acc + i * apart + c + v * lanes);
  });
#pragma GCC unroll 1
  for (int r = 0; r < k; ++r) {
    if constexpr (ahead) {
#pragma GCC unroll 8
      for (int i = 0; i < piece; i += kLineBytes) __builtin_prefetch(later + r * piece + i, 0, 2);
    }
    const T* p = rows[r] + c;
    const A w = S::weighted ? weight[r] : A{};
    if constexpr (S::softmax) {
      if (scale[r] != 1) {
#pragma GCC unroll 8
        for (int v = 0; v < Vecs; ++v) sum[0][v] = sum[0][v] * scale[r];
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      const V x = part ? load_part<V>(p, part) : load(p + v * lanes);
      each_state(S{}, [&](auto i, auto state) __attribute__((always_inline)) {
        sum[i][v] = decltype(state)::template update<V, A>(sum[i][v], x, w);
      });
    }
  }
  each_state(S{}, [&](auto i, auto) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) std::memcpy(acc + i * apart + c + v * lanes, &sum[i][v], sizeof(V));
  });
}

// A group of k rows into acc[0..dim).
template <class S, bool ahead, class T, class A>
FASTPOOL_INLINE void add_group(const T* const* rows, const A* weight, const A* scale, int k, int64_t dim, bool fresh,
                               A* acc, Queue<T, A, S>& queue) {
  constexpr int vecs = S::count <= kBlockStates ? kBlockVecs : kBlockVecs / 2;
  constexpr int lanes = Vec<A>::lanes, block = vecs * lanes;
  const auto add = [&](auto n, int64_t c, int part) __attribute__((always_inline)) {
    add_rows<S, decltype(n)::value, ahead>(rows, weight, scale, k, dim, c, part, fresh, acc, queue);
  };
  using Block = std::integral_constant<int, vecs>;
  using One = std::integral_constant<int, 1>;
  int64_t c = 0;
  for (; c + block <= dim; c += block) add(Block{}, c, 0);
  for (; c + lanes <= dim; c += lanes) add(One{}, c, 0);
  if (c < dim) add(One{}, c, static_cast<int>(dim - c));
}

// One leaf into acc[0..dim), a group of rows at a time.
template <class S, bool ahead, class T, class A>
FASTPOOL_INLINE void add_leaf(const Leaf<T, A>& leaf, int group, int64_t dim, A* acc, Queue<T, A, S>& queue) {
  int g = 0;
  do {
    const int k = leaf.count - g < group ? leaf.count - g : group;
    add_group<S, ahead>(leaf.row + g, leaf.weight + g, leaf.scale + g, k, dim, g == 0, acc, queue);
    g += k;
  } while (g < leaf.count);
}

// One leaf into a state for each query. The rows of a group are still in the cache when they are added, and for every
// query but the first.
template <class T, class A, class S>
static void add_leaf_of_queries(const PoolCall& call, const QueryGradients& gradients, int64_t segment,
                                const Leaf<T, A>& leaf, const A* queries, A* states, Queue<T, A, S>& queue) {
  const int64_t columns = padded_columns(call.dim), row_bytes = call.width * static_cast<int64_t>(sizeof(T));
  A weight[kLeaf], scale[kLeaf];
  int g = 0;
  do {
    const int k = leaf.count - g < kGroupRows ? leaf.count - g : kGroupRows;
    const T* const* const rows = leaf.row + g;
    A* state = states;
    for (int64_t q = 0; q < call.queries.count; ++q, state += query_columns(call)) {
      if constexpr (S::softmax) {
        const A* const query = queries + q * padded_columns(call.width);
        int r = 0;
        if (q > 0)
          for (; r + kRowsAtOnce <= k; r += kRowsAtOnce) dots(query, rows + r, call.width, weight + r);
        for (; r < k; ++r)
          weight[r] =
              q == 0 ? dot(query, rows[r], call.width, queue.take_row(rows[r])) : dot(query, rows[r], call.width);
        for (r = 0; r < k; ++r) weight[r] = score_of_product(call, weight[r]);
        Softmax<A>& softmax = softmax_of(state, columns);
        if (g == 0) softmax = {};
        weigh(weight, scale, k, softmax);
      } else {
        const PoolBackwardCall& backward = *gradients.call;
        const int64_t bytes = gradient_record(backward.pool) * static_cast<int64_t>(sizeof(A));
        const SegmentGradient<A> gradient(backward, gradients.segments + segment * call.queries.count * bytes, q);
        if (q == 0) queue.fetch(k * row_bytes);
        A unused;
        for (int r = 0; r < k; ++r) weight[r] = gradient.of_product(backward.pool, rows[r], unused);
      }
      add_group<S, false>(rows, weight, scale, k, call.dim, g == 0, state, queue);
    }
    g += k;
  } while (g < leaf.count);
}

// into = merge(left, right), of a softmax.
template <class A>
FASTPOOL_INLINE void merge_softmax(const A* left, const A* right, A* into, int64_t columns) {
  using V = typename Vec<A>::type;
  A of_left, of_right;
  const Softmax<A> both = Softmax<A>::merge(softmax_of(const_cast<A*>(left), columns),
                                            softmax_of(const_cast<A*>(right), columns), of_left, of_right);
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = read<V>(left + c) * of_left + read<V>(right + c) * of_right;
    std::memcpy(into + c, &v, sizeof v);
  }
  softmax_of(into, columns) = both;
}

// into = merge(left, right); into may be one of the two.
template <class S, class A>
FASTPOOL_INLINE void merge_columns(const A* left, const A* right, A* into, int64_t columns) {
  using V = typename Vec<A>::type;
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = S::template merge<V>(read<V>(left + c), read<V>(right + c));
    std::memcpy(into + c, &v, sizeof v);
  }
}
// The same for states of every query, or of several modes.
template <class S, class A>
FASTPOOL_INLINE void merge_rows(const PoolCall& call, const A* left, const A* right, A* into) {
  const int64_t columns = state_columns(call), one = query_columns(call);
  if constexpr (S::softmax) {
    for (int64_t c = 0; c < columns; c += one) merge_softmax(left + c, right + c, into + c, padded_columns(call.dim));
  } else if constexpr (S::several) {
    each_state(S{}, [&](auto i, auto state) __attribute__((always_inline)) {
      merge_columns<decltype(state)>(left + i * one, right + i * one, into + i * one, one);
    });
  } else {
    merge_columns<S>(left, right, into, columns);
  }
}

}  // namespace fastpool::FASTPOOL_ISA
