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

// Adds rows[0..k) to `Vecs` vectors of sums at column c, one row after another.
template <class S, int Vecs, bool ahead, class T, class A>
FASTPOOL_INLINE void add_rows(const Leaf<T, A>& leaf, int g, int k, int64_t c, int part, bool fresh, A* acc,
                              Queue<T, A, S>& queue) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  // As many bytes as are added are fetched, a piece with every row.
  constexpr int piece = Vecs * lanes * static_cast<int>(sizeof(T));
  [[maybe_unused]] const char* later = nullptr;
  if constexpr (ahead) {
    if (k > 0) later = queue.take(k * piece, leaf.row[g] + c);
  }
  V sum[Vecs];
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) sum[v] = fresh ? S::template init<V, A>(A{}) : read<V>(acc + c + v * lanes);
#pragma GCC unroll 1
  for (int r = 0; r < k; ++r) {
    if constexpr (ahead) {
#pragma GCC unroll 8
      for (int i = 0; i < piece; i += kLineBytes) __builtin_prefetch(later + r * piece + i, 0, 2);
    }
    const T* p = leaf.row[g + r] + c;
    const A w = S::weighted ? leaf.weight[g + r] : A{};
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v)
      sum[v] = S::template update<V, A>(sum[v], part ? load_part<V>(p, part) : load(p + v * lanes), w);
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) std::memcpy(acc + c + v * lanes, &sum[v], sizeof(V));
}

// One leaf into acc[0..dim), a group of rows at a time.
template <class S, bool ahead, class T, class A>
FASTPOOL_INLINE void add_leaf(const Leaf<T, A>& leaf, int64_t dim, A* acc, Queue<T, A, S>& queue) {
  constexpr int lanes = Vec<A>::lanes, block = kBlockVecs * lanes, group = ahead ? kGroupRows : 1;
  int g = 0;
  do {
    const int k = leaf.count - g < group ? leaf.count - g : group;
    const bool fresh = g == 0;
    int64_t c = 0;
    for (; c + block <= dim; c += block) add_rows<S, kBlockVecs, ahead>(leaf, g, k, c, 0, fresh, acc, queue);
    for (; c + lanes <= dim; c += lanes) add_rows<S, 1, ahead>(leaf, g, k, c, 0, fresh, acc, queue);
    if (c < dim) add_rows<S, 1, ahead>(leaf, g, k, c, static_cast<int>(dim - c), fresh, acc, queue);
    g += k;
  } while (g < leaf.count);
}

// into = merge(left, right); into may be one of the two.
template <class S, class A>
FASTPOOL_INLINE void merge_rows(const A* left, const A* right, A* into, int64_t columns) {
  using V = typename Vec<A>::type;
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = S::template merge<V>(read<V>(left + c), read<V>(right + c));
    std::memcpy(into + c, &v, sizeof v);
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

template <class T, class A, class S>
static uint64_t reduce_units(const PoolCall& call, const Unit* units, int64_t n, A* scratch, A* partials,
                             Totals* totals) {
  const int64_t columns = padded_columns(call.dim);
  const int64_t row_bytes = call.dim * static_cast<int64_t>(sizeof(T));
  const bool ahead = sizeof(T) < 4 || row_bytes > kShortRow;
  Queue<T, A, S> queue(call, units, n, row_bytes, ahead ? kAheadBytes : 1);

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
    if (ahead) {
      add_leaf<S, true>(leaf, call.dim, level[0], queue);
    } else {
      if (leaf.last) queue.fetch(kHeadBytes);
      add_leaf<S, false>(leaf, call.dim, level[0], queue);
    }
    if constexpr (S::weighted) {
      A weight = 0;
      for (int r = 0; r < leaf.count; ++r) weight += leaf.weight[r];
      weights.add(weight);
    }
    unit_totals.count += leaf.count;

    int k = 1;
    for (int64_t bits = leaves; bits & 1; bits >>= 1, ++k) merge_rows<S>(level[k], level[0], level[0], columns);
    ++leaves;
    if (!leaf.last) {
      take(k);
      A* const free = level[k];
      level[k] = level[0];
      level[0] = free;
    } else {
      // What is left of the counter, smallest subtree first: missing right siblings are neutral.
      for (int64_t bits = leaves >> k << k; bits; bits &= bits - 1)
        merge_rows<S>(level[__builtin_ctzll(bits) + 1], level[0], level[0], columns);
      unit_totals.weight = weights.root();
      if (unit.partial < 0) {
        finish(call, unit.segment, level[0], unit_totals);
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
static void combine_partials(const PoolCall& call, int64_t segment, int64_t n, A* partials, Totals* totals) {
  const int64_t columns = padded_columns(call.dim);
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = 0; i + step < n; i += 2 * step) {
      merge_rows<S>(partials + i * columns, partials + (i + step) * columns, partials + i * columns, columns);
      totals[i].count += totals[i + step].count;
      totals[i].weight = static_cast<A>(totals[i].weight) + static_cast<A>(totals[i + step].weight);
    }
  finish(call, segment, partials, totals[0]);
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

static uint64_t reduce(const PoolCall& call, const Unit* units, int64_t n, void* scratch, void* partials,
                       Totals* totals) {
  uint64_t seen = 0;
  with_dtype(call.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    A *s = static_cast<A*>(scratch), *p = static_cast<A*>(partials);
    if (call.mode.one_token()) return copy_tokens<T, A>(call, units, n, s);
    with_state(call.mode,
               [&](auto state) { seen = reduce_units<T, A, decltype(state)>(call, units, n, s, p, totals); });
  });
  return seen;
}

static void combine(const PoolCall& call, int64_t segment, int64_t n, void* partials, Totals* totals) {
  with_dtype(call.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    A* p = static_cast<A*>(partials);
    with_state(call.mode, [&](auto state) { combine_partials<T, A, decltype(state)>(call, segment, n, p, totals); });
  });
}

static void normalize(const NormalizeCall& call, int64_t begin, int64_t end, void* scratch) {
  with_dtype(call.dtype, [&](auto t, auto a) {
    normalize_rows<decltype(t), decltype(a)>(call, begin, end, static_cast<decltype(a)*>(scratch));
  });
}

}  // namespace fastpool::FASTPOOL_ISA
