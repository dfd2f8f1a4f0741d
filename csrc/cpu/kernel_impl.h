// The CPU kernel: included once by each instruction set's file, into its own namespace.
//
// Speed comes from address order (measured; see docs/design.md, "How the CPU kernel reads"): rows are walked eight at a
// time with their sums in registers, while lines of later leaves are fetched into the L2 cache strictly in address
// order. Short float32 rows go one at a time, in address order by themselves; the CPU's own prefetcher follows them to
// the end of a segment and has to be helped into the next one.
#pragma once
#include "../state.h"
#include "finish.h"
#include "kernel.h"
#include "leaves.h"
#include "tree.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

constexpr int kBlockVecs = 8;              // vectors of columns whose sums stay in registers
constexpr int kGroupRows = 8;              // rows added to them in one go
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
  constexpr int vecs = S::count == 1 ? kBlockVecs : kBlockVecs / 2;
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
FASTPOOL_INLINE void add_leaf(const Leaf<T, A>& leaf, int64_t dim, A* acc, Queue<T, A, S>& queue) {
  constexpr int group = ahead ? kGroupRows : 1;
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
        for (int r = 0; r < k; ++r) {
          const A product =
              q == 0 ? dot(query, rows[r], call.width, queue.take_row(rows[r])) : dot(query, rows[r], call.width);
          weight[r] = static_cast<A>(call.queries.scale) * product;
        }
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

// Of a mode that looks at one token of a segment, whose units are that token: a copy of it, which takes three quarters
// of the time of its maximum.
template <class T, class A>
static void copy_tokens(const PoolCall& call, const Unit* units, int64_t n, A* x) {
  for (int64_t u = 0; u < n; ++u) {
    const Unit& unit = units[u];
    Totals totals;
    totals.count = unit.end - unit.begin;
    const T* const rows = static_cast<const T*>(call.hidden) + unit.segment * call.batch_stride;
    if (totals.count > 0) load_row(rows + unit.begin * call.row_stride, call.dim, x);
    finish(call, unit.segment, x, totals);
  }
}

// The epilogue of several modes: their vectors side by side in `row`, then what follows of all of them together.
template <class T, class A>
static void finish_several(const PoolCall& call, int64_t segment, const Segment& tokens, const A* states,
                           const Totals& totals, A* row) {
  const Several& several = *call.several;
  const StatesOfSeveral of(several);
  const T* const rows = static_cast<const T*>(call.hidden) + segment * call.batch_stride;
  const int64_t columns = padded_columns(call.dim);
  for (int i = 0; i < several.count; ++i) {
    const Mode& mode = several.modes[i];
    A* const vector = row + i * call.dim;  // what its last lanes write beyond is the next one's
    if (!mode.one_token()) {
      std::memcpy(vector, states + of.place_of(mode) * columns, columns * sizeof(A));
      divide(mode, totals, vector, columns);
    } else if (tokens.begin < tokens.end) {
      load_row(rows + select(mode.select, tokens).begin * call.row_stride, call.dim, vector);
    } else {
      std::memset(vector, 0, columns * sizeof(A));
    }
  }
  if (call.normalize) normalize_row(row, several.dim, padded_columns(several.dim), static_cast<A>(kNormEps));
  store_row(row, several.dim, call.out, segment, call.out_dtype);
}

// The epilogue for each of a segment's queries.
template <class S, class T, class A>
FASTPOOL_INLINE void finish_queries(const PoolCall& call, int64_t segment, [[maybe_unused]] const Segment& tokens,
                                    A* states, Totals totals, [[maybe_unused]] A* row) {
  if constexpr (S::several) return finish_several<T>(call, segment, tokens, states, totals, row);
  for (int64_t k = 0; k < call.queries.count; ++k, states += query_columns(call)) {
    if constexpr (S::softmax) totals.weight = softmax_of(states, padded_columns(call.dim)).weight;
    finish(call, segment * call.queries.count + k, states, totals);
  }
}

template <class T, class A, class S>
static uint64_t reduce_units(const PoolCall& call, const QueryGradients& gradients, const Unit* units, int64_t n,
                             A* scratch, A* partials, Totals* totals) {
  const int64_t columns = state_columns(call);
  const int64_t row_bytes = (S::queried ? call.width : call.dim) * static_cast<int64_t>(sizeof(T));
  const bool ahead = S::queried || sizeof(T) < 4 || row_bytes > kShortRow;
  Queue<T, A, S> queue(call, units, n, row_bytes, ahead ? kAheadBytes : 1);
  A* const queries = scratch;
  int64_t queries_of = -1;  // a segment
  if (call.mode.takes_query()) scratch += call.queries.count * padded_columns(call.width);
  A* const several_row = scratch;
  if constexpr (S::several) scratch += several_columns(call);

  // A binary counter of subtrees: level[0] takes the leaf, level[k] holds a sum of 2^(k-1) leaves.
  A* level[64];
  for (int k = 0; k < 64; ++k) level[k] = nullptr;
  int levels = 0;
  int64_t leaves = 0;
  LeafTree<A> weights;
  Totals unit_totals;
  A* next_row = scratch;
  const auto take = [&](int k) __attribute__((always_inline)) {
    while (levels <= k) {
      level[levels++] = next_row;
      next_row += columns;
    }
  };
  take(0);

  for (;;) {
    const Leaf<T, A>& leaf = queue.front();
    if (leaf.unit < 0) break;
    const Unit& unit = units[leaf.unit];
    if constexpr (S::queried) {
      if (S::softmax && (queries_of < 0 || (call.queries.batch_stride != 0 && queries_of != unit.segment))) {
        queries_of = unit.segment;
        for (int64_t k = 0; k < call.queries.count; ++k)
          load_query(call, unit.segment, k, queries + k * padded_columns(call.width));
      }
      add_leaf_of_queries(call, gradients, unit.segment, leaf, queries, level[0], queue);
    } else if (ahead) {
      add_leaf<S, true>(leaf, call.dim, level[0], queue);
    } else {
      if (leaf.last) queue.fetch(kHeadBytes);
      add_leaf<S, false>(leaf, call.dim, level[0], queue);
    }
    if constexpr (S::softmax && !S::queried) {
      softmax_of(level[0], padded_columns(call.dim)) = leaf.softmax;
    } else if constexpr (S::weighted && !S::queried) {
      A weight = 0;
      for (int r = 0; r < leaf.count; ++r) weight += leaf.weight[r];
      weights.add(weight);
    }
    unit_totals.count += leaf.count;

    int k = 1;
    for (int64_t bits = leaves; bits & 1; bits >>= 1, ++k) merge_rows<S>(call, level[k], level[0], level[0]);
    ++leaves;
    if (!leaf.last) {
      take(k);
      A* const free = level[k];
      level[k] = level[0];
      level[0] = free;
    } else {
      // What is left of the counter, smallest subtree first: missing right siblings are neutral.
      for (int64_t bits = leaves >> k << k; bits; bits &= bits - 1)
        merge_rows<S>(call, level[__builtin_ctzll(bits) + 1], level[0], level[0]);
      unit_totals.weight = weights.root();
      if (unit.partial < 0) {
        finish_queries<S, T>(call, unit.segment, {unit.begin, unit.end}, level[0], unit_totals, several_row);
      } else {
        std::memcpy(partials + unit.partial * columns, level[0], columns * sizeof(A));
        totals[unit.partial] = unit_totals;
      }
      leaves = weights.count = 0;
      unit_totals = {};
    }
    queue.pop();
  }
  return queue.walker.seen;
}

template <class T, class A, class S>
static void combine_partials(const PoolCall& call, int64_t segment, const Segment& tokens, int64_t n, A* scratch,
                             A* partials, Totals* totals) {
  const int64_t columns = state_columns(call);
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = 0; i + step < n; i += 2 * step) {
      merge_rows<S>(call, partials + i * columns, partials + (i + step) * columns, partials + i * columns);
      totals[i].count += totals[i + step].count;
      totals[i].weight = static_cast<A>(totals[i].weight) + static_cast<A>(totals[i + step].weight);
    }
  finish_queries<S, T>(call, segment, tokens, partials, totals[0], scratch);
}

// A row of x into accumulator lanes; how many of its columns are used.
template <class T, class A>
FASTPOOL_INLINE int64_t load_used(const NormalizeCall& call, int64_t row, A* x) {
  const int64_t dim = call.truncate_dims.data == nullptr
                          ? call.dim
                          : dim_at(call, offset_of(row, call.leading, call.sizes, call.truncate_dims_strides));
  load_row(static_cast<const T*>(call.x) + offset_of(row, call.leading, call.sizes, call.strides), dim, x);
  return dim;
}

template <class T, class A>
static void normalize_rows(const NormalizeCall& call, int64_t begin, int64_t end, A* x) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t dim = load_used<T>(call, row, x);
    normalize_row(x, dim, padded_columns(dim), static_cast<A>(call.eps));
    std::memset(x + dim, 0, (call.dim - dim) * sizeof(A));
    store_row(x, call.dim, call.out, row, call.out_dtype);
  }
}

// ---- from run-time codes to template arguments
template <class Body>
FASTPOOL_INLINE void with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::float16: return body(half_t{}, float{});
    case DType::bfloat16: return body(bfloat16_t{}, float{});
    case DType::float32: return body(float{}, float{});
    case DType::float64: return body(double{}, double{});
  }
}

// body(State) of a call.
template <class Body>
FASTPOOL_INLINE void with_state_of(const PoolCall& call, const QueryGradients& gradients, Body body) {
  if (gradients.call != nullptr) return body(QueryGradientState{});
  if (call.several != nullptr) return StatesOfSeveral(*call.several).with(body);
  with_state(call.mode, body);
}

static uint64_t reduce(const PoolCall& call, const QueryGradients& gradients, const Unit* units, int64_t n,
                       void* scratch, void* partials, Totals* totals) {
  uint64_t seen = 0;
  with_dtype(call.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    A *s = static_cast<A*>(scratch), *p = static_cast<A*>(partials);
    if (call.mode.one_token()) return copy_tokens<T, A>(call, units, n, s);
    with_state_of(call, gradients, [&](auto state) {
      seen = reduce_units<T, A, decltype(state)>(call, gradients, units, n, s, p, totals);
    });
  });
  return seen;
}

static void combine(const PoolCall& call, const QueryGradients& gradients, int64_t segment, const Segment& tokens,
                    int64_t n, void* scratch, void* partials, Totals* totals) {
  with_dtype(call.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    A *s = static_cast<A*>(scratch), *p = static_cast<A*>(partials);
    with_state_of(call, gradients,
                  [&](auto state) { combine_partials<T, A, decltype(state)>(call, segment, tokens, n, s, p, totals); });
  });
}

static void normalize(const NormalizeCall& call, int64_t begin, int64_t end, void* scratch) {
  with_dtype(call.dtype, [&](auto t, auto a) {
    normalize_rows<decltype(t), decltype(a)>(call, begin, end, static_cast<decltype(a)*>(scratch));
  });
}

}  // namespace fastpool::FASTPOOL_ISA
