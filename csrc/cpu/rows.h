// Rows into states, and states into each other. Included by kernel_impl.h, into an instruction set's namespace.
#pragma once
#include "../state.h"
#include "leaves.h"
#include "softmax.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

constexpr int kBlockVecs = 8;              // vectors of columns that are added at once
constexpr int kBlockVecsOfSeveral = 2;     // for each of several modes
constexpr int kQueryRows = 8;              // rows added to them in one go, from the cache, for each query
constexpr int64_t kStripBytes = 8 << 10;   // of sums that rows are added to, one after another,
constexpr int kStripRows = 16;             // before the next columns of as many rows follow
constexpr int64_t kStripMultiple = 128;    // in columns, of whole blocks
constexpr int64_t kAheadFrom = 16 << 20;   // bytes of a thread's work from which on lines are fetched ahead,
constexpr int64_t kAheadBytes = 64 << 10;  // so far,
constexpr int64_t kShortRow = 4 << 10;     // unless rows of 32 bits and more are so short, of one mode
constexpr int64_t kHeadBytes = 4 << 10;    // where they are not, the head of the next segment is

// body(i, State) of a state, or of several of them.
template <class S, class Body>
FASTPOOL_INLINE void each_state(S state, Body body) {
  body(std::integral_constant<int, 0>{}, state);
}
template <class... S, class Body, int... i>
FASTPOOL_INLINE void each_of(Together<S...>, Body body, std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>{}, S{}), ...);
}
template <class... S, class Body>
FASTPOOL_INLINE void each_state(Together<S...> states, Body body) {
  each_of(states, body, std::make_integer_sequence<int, sizeof...(S)>{});
}

// The vector of columns that rows are added by: a wide one where they come from the cache, as for each query, and of
// several modes, whose sums outweigh rows.
template <class S, class A>
using RowVec = std::conditional_t<sizeof(A) == 4 && (S::queried || S::several), WideF, typename Vec<A>::type>;

// Rows that are added to the same sums, one after another.
template <class T, class A>
struct Rows {
  const T* const* row;
  const A *weight, *scale;  // of each
  int count;
  bool fresh;  // nothing was added before
};

// Adds rows to `Vecs` vectors V of sums at column c, or to the first `part` lanes of one. Of several states each has
// its own, `apart` from the last.
template <class S, class V, int Vecs, bool ahead, class T, class A>
FASTPOOL_INLINE void add_rows(const Rows<T, A>& rows, int64_t c, int part, A* acc, int64_t apart,
                              Queue<T, A, S>& queue) {
  constexpr int lanes = sizeof(V) / sizeof(A);
  // As many bytes as are added are fetched, where rows come one at a time.
  constexpr int piece = Vecs * lanes * static_cast<int>(sizeof(T));
  [[maybe_unused]] const char* later = nullptr;
  if constexpr (ahead) {
    if (rows.count > 0) later = queue.take(piece, rows.row[0] + c);
  }
  V sum[S::count][Vecs];
  each_state(S{}, [&](auto i, auto state) __attribute__((always_inline)) {
    using One = decltype(state);
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v)
      sum[i][v] = rows.fresh ? One::template init<V, A>(A{}) : read<V>(acc + i * apart + c + v * lanes);
  });
#pragma GCC unroll 1
  for (int r = 0; r < rows.count; ++r) {
    const T* p = rows.row[r] + c;
    if constexpr (ahead) {
#pragma GCC unroll 8
      for (int i = 0; i < piece; i += kLineBytes) __builtin_prefetch(later + i, 0, 2);
    }
    const A w = S::weighted ? rows.weight[r] : A{};
    if constexpr (S::softmax) {
      if (rows.scale[r] != 1) {
#pragma GCC unroll 8
        for (int v = 0; v < Vecs; ++v) sum[0][v] = sum[0][v] * rows.scale[r];
      }
    }
    const auto update = [&](int v, V x) __attribute__((always_inline)) {
      each_state(S{}, [&](auto i, auto state) __attribute__((always_inline)) {
        sum[i][v] = decltype(state)::template update<V, A>(sum[i][v], x, w);
      });
    };
    if constexpr (Vecs == 1) {
      update(0, load_part<V>(p, part));
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; v += 2) {
        const auto two = load_two<V>(p + v * lanes);
        update(v, two.first);
        update(v + 1, two.second);
      }
    }
  }
  each_state(S{}, [&](auto i, auto) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) std::memcpy(acc + i * apart + c + v * lanes, &sum[i][v], sizeof(V));
  });
}

// The columns [from, to) of rows into acc[from..to).
template <class S, bool ahead, class T, class A>
FASTPOOL_INLINE void add_strip(const Rows<T, A>& rows, int64_t from, int64_t to, A* acc, int64_t apart,
                               Queue<T, A, S>& queue) {
  using V = typename Vec<A>::type;
  using W = RowVec<S, A>;
  constexpr int vecs = S::several ? kBlockVecsOfSeveral : kBlockVecs;
  constexpr int lanes = Vec<A>::lanes, wide = sizeof(W) / sizeof(A);
  const auto add = [&](auto vector, auto n, int64_t c, int part) __attribute__((always_inline)) {
    add_rows<S, decltype(vector), decltype(n)::value, ahead>(rows, c, part, acc, apart, queue);
  };
  using Block = std::integral_constant<int, vecs>;
  using Pair = std::integral_constant<int, 2>;
  using One = std::integral_constant<int, 1>;
  int64_t c = from;
  for (; c + vecs * wide <= to; c += vecs * wide) add(W{}, Block{}, c, wide);
  for (; c + 2 * wide <= to; c += 2 * wide) add(W{}, Pair{}, c, wide);
  for (; c + lanes <= to; c += lanes) add(V{}, One{}, c, lanes);
  if (c < to) add(V{}, One{}, c, static_cast<int>(to - c));
}

// One leaf into acc[0..dim), a row at a time; of wide rows a strip after another, so that its sums stay in L1.
template <class S, bool ahead, class T, class A>
FASTPOOL_INLINE void add_leaf(const Leaf<T, A>& leaf, int64_t dim, A* acc, Queue<T, A, S>& queue) {
  constexpr int64_t strip =
      kStripBytes / (S::count * static_cast<int64_t>(sizeof(A))) / kStripMultiple * kStripMultiple;
  static_assert(strip > 0);
  int g = 0;
  do {
    const int end = leaf.count - g < kStripRows ? leaf.count : g + kStripRows;
    int64_t from = 0;
    do {
      const int64_t to = dim - from < strip ? dim : from + strip;
      int r = g;
      do {  // once where there are none, for sums to begin
        add_strip<S, ahead>(Rows<T, A>{leaf.row + r, leaf.weight + r, leaf.scale + r, r < end, r == 0}, from, to, acc,
                            padded_columns(dim), queue);
      } while (++r < end);
      from = to;
    } while (from < dim);
    g = end;
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
    const int k = leaf.count - g < kQueryRows ? leaf.count - g : kQueryRows;
    const T* const* const rows = leaf.row + g;
    A* state = states;
    for (int64_t q = 0; q < call.queries.count; ++q, state += query_columns(call)) {
      if constexpr (S::softmax) {
        const A* const query = queries + q * padded_columns(call.width);
        int r = 0;
        if (q > 0)
          for (; r + kRowsAtOnce <= k; r += kRowsAtOnce) dots<kRowsAtOnce>(query, rows + r, call.width, weight + r);
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
      add_strip<S, false>(Rows<T, A>{rows, weight, scale, k, g == 0}, 0, call.dim, state, columns, queue);
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
