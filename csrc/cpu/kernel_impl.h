// The CPU kernel: included once by each instruction set's file, into its own namespace.
//
// Speed comes from address order (measured; see docs/design.md, "How the CPU kernel reads"): rows go one at a time, and
// the CPU's own prefetcher follows them to the end of a segment and has to be helped into the next one. Of work that
// comes from memory, lines of later leaves are fetched into the L2 cache strictly in address order.
#pragma once
#include "../state.h"
#include "finish.h"
#include "kernel.h"
#include "leaves.h"
#include "quantize.h"
#include "rows.h"
#include "tree.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

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
  for (int64_t c = 0; c < call.queries.count; ++c)  // of several modes there are as many states
    put_in_order<RowVec<S, A>, T>(states + c * query_columns(call), call.dim);
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
  int64_t bytes = 0;
  for (int64_t u = 0; u < n; ++u) bytes += (units[u].end - units[u].begin) * row_bytes;
  const bool ahead = bytes >= kAheadFrom && (S::several || sizeof(T) < 4 || row_bytes > kShortRow);
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
  with_any_state(call.mode, body);
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

static void quantize(const QuantizeCall& call, int64_t begin, int64_t end, void* scratch) {
  with_dtype(call.dtype, [&](auto t, auto a) { quantize_rows<decltype(t), decltype(a)>(call, begin, end, scratch); });
}

}  // namespace fastpool::FASTPOOL_ISA
