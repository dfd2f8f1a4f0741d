// The CPU kernels of gradients: included once by each instruction set's file, into its own namespace.
//
// The floor is one write of the gradient. Rows of one run have the same segments, so where tokens get equal shares, a
// run's row is made once and copied.
#pragma once
#include "ieee.h"
#include "kernel_impl.h"

namespace fastpool::FASTPOOL_ISA {

using cpu::Overlap;

template <class A>
static A total_weight(const PoolCall& call, int64_t b, const Segment& tokens) {
  LeafTree<A> leaves;
  for (int64_t at = tokens.begin; at < tokens.end; at += kLeaf) {
    A leaf = 0;
    for (int64_t i = at; i < at + kLeaf && i < tokens.end; ++i)
      if (is_real(call.mask, b, i)) leaf += weight_of<A>(call, b, tokens.begin, i);
    leaves.add(leaf);
  }
  return leaves.root();
}

// The exponent and the sum of weights of a segment's softmax.
template <class T, class A>
static Softmax<A> total_softmax(const PoolCall& call, int64_t b, const Segment& tokens, const A* query) {
  Tree<Softmax<A>, MergeSoftmax> leaves;
  const T* const rows = static_cast<const T*>(call.hidden) + b * call.batch_stride;
  for (int64_t at = tokens.begin; at < tokens.end; at += kLeaf) {
    A scores[kLeaf], scale[kLeaf];
    int n = 0;
    for (int64_t i = at; i < at + kLeaf && i < tokens.end; ++i) {
      if (!is_real(call.mask, b, i)) continue;
      scores[n++] = query == nullptr ? score_of<A>(call, b, i)
                                     : score_of_product(call, dot(query, rows + i * call.row_stride, call.width));
    }
    Softmax<A> leaf;
    weigh(scores, scale, n, leaf);
    leaves.add(leaf);
  }
  return leaves.root();
}

template <class T, class A>
static void prologue_of(const PoolBackwardCall& call, Overlap& overlap) {
  const PoolCall& pool = call.pool;
  const Mode& mode = pool.mode;
  const int64_t b = overlap.segment, dim = pool.dim;
  Totals totals;
  totals.count = count_real(pool.mask, b, overlap.tokens.begin, overlap.tokens.end - overlap.tokens.begin);
  for (int64_t k = 0; k < pool.queries.count; ++k) {
    const SegmentGradient<A> segment(call, overlap.gradient, k);
    const int64_t row = (b * pool.queries.count + k) * dim, columns = gradient_columns(pool);
    std::memset(segment.gradient, 0, columns * sizeof(A));
    load_row(static_cast<const A*>(call.gradient) + row, dim, segment.gradient);
    if (mode.takes_query()) {
      std::memset(segment.query, 0, columns * sizeof(A));
      load_query(pool, b, k, segment.query);
    }
    if (mode.takes_weights()) totals.weight = total_weight<A>(pool, b, overlap.tokens);
    if (mode.softmax()) {
      const A* const query = mode.takes_query() ? segment.query : nullptr;
      const Softmax<A> softmax = total_softmax<T, A>(pool, b, overlap.tokens, query);
      totals.weight = softmax.weight;
      segment.exponent() = softmax.exponent;
    }
    divide(mode, totals, segment.gradient, padded_columns(dim));
    if (call.per_token() || mode.takes_query())
      segment.of_result() = dot(segment.gradient, static_cast<const A*>(call.result) + row, dim);
  }
}

// A row of accumulators, by the vector.
template <class A>
struct Row {
  const A* x;
  __attribute__((always_inline)) typename Vec<A>::type operator()(int64_t c) const {
    return read<typename Vec<A>::type>(x + c);
  }
};
template <class A>
FASTPOOL_INLINE Row<A> gradient_of(const Overlap& overlap) {
  return {static_cast<const A*>(overlap.gradient)};
}
// The same, times the weight of a token.
template <class A>
struct Weighted {
  const A* x;
  A weight;
  __attribute__((always_inline)) typename Vec<A>::type operator()(int64_t c) const {
    return read<typename Vec<A>::type>(x + c) * weight;
  }
};

// One row of a gradient: +0 and the shares of n segments, in their order, rounded once; zeros in columns that are not
// used. `share(k)` is a function from a column to a vector of the k-th share.
template <class A, class T, class Share>
FASTPOOL_INLINE void write_row(int64_t n, int64_t dim, int64_t width, T* out, Share share) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes, block = 4;  // vectors whose sums stay in registers
  const auto write = [&](int64_t c, int vectors, int last) __attribute__((always_inline)) {
    V total[block];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) total[v] = V{};
    for (int64_t k = 0; k < n; ++k) {
      const auto at = share(k);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[v] = total[v] + at(c + v * lanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store_part(out + c + v * lanes, total[v], v + 1 < vectors ? lanes : last);
  };
  int64_t c = 0;
  for (; c + block * lanes <= dim; c += block * lanes) write(c, block, lanes);
  over_columns<A>(c, dim, [&](int64_t at, int left) __attribute__((always_inline)) { write(at, 1, left); });
  std::memset(static_cast<void*>(out + dim), 0, (width - dim) * sizeof(T));
}

// The same row again and again: stores that straddle two lines cost more than loads that do.
FASTPOOL_INLINE void copy_row(const char* row, int64_t bytes, char* out) {
  typedef char Bytes __attribute__((vector_size(kBytes)));
  const auto copy = [&](int64_t at) __attribute__((always_inline)) {
    const Bytes v = read<Bytes>(row + at);
    std::memcpy(out + at, &v, sizeof v);
  };
  if (bytes < kBytes) {
    std::memcpy(out, row, bytes);
    return;
  }
  copy(0);
  for (int64_t at = kBytes - (reinterpret_cast<uintptr_t>(out) % kBytes); at + kBytes <= bytes; at += kBytes) copy(at);
  copy(bytes - kBytes);
}

// What the token at row `i` of a segment is multiplied by, where that does not depend on its state.
template <class S, class A>
FASTPOOL_INLINE A token_weight(const PoolCall& call, const Overlap& overlap, const SegmentGradient<A>& segment,
                               int64_t i) {
  if constexpr (S::softmax)
    return softmax_weight(score_of<A>(call, overlap.segment, i), segment.exponent());
  else
    return weight_of<A>(call, overlap.segment, overlap.tokens.begin, i);
}

// A row of the gradient of hidden, x, where a token's share depends on its weight.
template <class S, class T, class A>
FASTPOOL_INLINE void write_weighted_row(const PoolBackwardCall& call, Overlap* overlaps, int64_t n, int64_t i,
                                        const T* x, T* out) {
  const PoolCall& pool = call.pool;
  const int64_t queries = pool.queries.count;
  for (int64_t k = 0; k < n * queries; ++k) {
    const Overlap& overlap = overlaps[k / queries];
    const SegmentGradient<A> segment(call, overlap.gradient, k % queries);
    if constexpr (S::queried)
      segment.product() = segment.of_product(pool, x, segment.weight());
    else
      segment.weight() = token_weight<S>(pool, overlap, segment, i);
  }
  constexpr int parts = S::queried ? 2 : 1;
  write_row<A>(parts * n * queries, S::queried ? pool.width : pool.dim, pool.width, out,
               [&](int64_t share) __attribute__((always_inline)) {
                 const int64_t k = share / parts;
                 const SegmentGradient<A> segment(call, overlaps[k / queries].gradient, k % queries);
                 return share % parts == 0 ? Weighted<A>{segment.gradient, segment.weight()}
                                           : Weighted<A>{segment.query, segment.product()};
               });
}

// Rows [begin, end) of the gradient of hidden, all of them in the same n segments, of a sum.
template <class S, class T, class A>
static void write_rows(const PoolBackwardCall& call, Overlap* overlaps, int64_t n, int64_t begin, int64_t end, T* row) {
  const PoolCall& pool = call.pool;
  const int64_t row_bytes = pool.width * sizeof(T), b = overlaps[0].segment;
  if constexpr (!S::weighted)
    write_row<A>(n, pool.dim, pool.width, row,
                 [&](int64_t k) __attribute__((always_inline)) { return gradient_of<A>(overlaps[k]); });
  T* out = static_cast<T*>(call.out) + begin * pool.width;
  for (int64_t i = begin - overlaps[0].origin; i < end - overlaps[0].origin; ++i, out += pool.width) {
    if (!is_real(pool.mask, b, i))
      std::memset(static_cast<void*>(out), 0, row_bytes);
    else if constexpr (!S::weighted)
      copy_row(reinterpret_cast<const char*>(row), row_bytes, reinterpret_cast<char*>(out));
    else
      write_weighted_row<S, T, A>(
          call, overlaps, n, i, static_cast<const T*>(pool.hidden) + b * pool.batch_stride + i * pool.row_stride, out);
  }
}

// Rows [begin, end) of the gradient of hidden, of a maximum: zeros, but a column of a segment's gradient goes to one of
// its rows.
template <class T, class A>
static void scatter_columns(const PoolBackwardCall& call, const Overlap* overlaps, int64_t n, int64_t begin,
                            int64_t end, T* row) {
  using V = typename Vec<A>::type;
  const int64_t dim = call.pool.dim, width = call.pool.width;
  T* const out = static_cast<T*>(call.out);
  std::memset(static_cast<void*>(out + begin * width), 0, (end - begin) * width * sizeof(T));
  const auto first_row = [&](int64_t k) { return overlaps[k].origin + overlaps[k].tokens.begin; };
  const auto maxima_of = [&](int64_t k) { return static_cast<const typename Vec<A>::word*>(overlaps[k].maxima); };
  for (int64_t k = 0; k < n; ++k) {
    write_row<A>(1, dim, dim, row, [&](int64_t) __attribute__((always_inline)) { return gradient_of<A>(overlaps[k]); });
    const int64_t first = first_row(k);
    const auto* const maxima = maxima_of(k);
    for (int64_t c = 0; c < dim; ++c) {
      const int64_t at = first + static_cast<int64_t>(maxima[c]);
      if (at < begin || at >= end) continue;
      if (n > 1) {
        A total = 0;
        for (int64_t other = 0; other < n; ++other)
          if (first_row(other) + static_cast<int64_t>(maxima_of(other)[c]) == at)
            total += gradient_of<A>(overlaps[other]).x[c];
        store_part(row + c, V{} + total, 1);
      }
      out[at * width + c] = row[c];
    }
  }
}

// Rows [begin, end) of the gradient of weights or scores, all of them in the same n segments, stored as W.
template <class S, class T, class A, class W>
static void write_token_values(const PoolBackwardCall& call, const Overlap* overlaps, int64_t n, int64_t begin,
                               int64_t end) {
  using V = typename Vec<A>::type;
  const PoolCall& pool = call.pool;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = at - overlaps[0].origin, b = overlaps[0].segment;
    A total = 0;
    if (is_real(pool.mask, b, i)) {
      const T* x = static_cast<const T*>(pool.hidden) + b * pool.batch_stride + i * pool.row_stride;
      for (int64_t k = 0; k < n; ++k) {
        const SegmentGradient<A> segment(call, overlaps[k].gradient, 0);
        const A of_weight = segment.of_weight(x, pool.dim);
        total += S::softmax ? of_weight * token_weight<S>(pool, overlaps[k], segment, i) : of_weight;
      }
    }
    store_part(static_cast<W*>(call.out) + at, V{} + total, 1);
  }
}

// Puts down for each of the columns [from, to) of segment b which token is the first to equal its maximum, counted from
// the first real one, if it comes before what stands there.
template <class T, class A, bool nan>
static void find_maxima(const PoolBackwardCall& call, int64_t b, const Segment& tokens, int64_t from, int64_t to,
                        typename Vec<A>::word* first) {
  using V = typename Vec<A>::type;
  using U = typename Vec<A>::bits;
  const PoolCall& pool = call.pool;
  const T* const hidden = static_cast<const T*>(pool.hidden) + b * pool.batch_stride;
  const A* const result = static_cast<const A*>(call.result) + b * pool.dim;
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    if (!is_real(pool.mask, b, i)) continue;
    const T* const x = hidden + i * pool.row_stride;
    const U token = U{} + static_cast<typename Vec<A>::word>(i - tokens.begin);
    over_columns<A>(from, to, [&](int64_t c, int n) __attribute__((always_inline)) {
      const V y = load_part<V>(x + c, n), max = load_part<V>(result + c, n);
      const auto equal = nan ? (y == max) | ((y != y) & (max != max)) : y == max;
      const U u = read<U>(first + c), here = equal ? token : ~U{}, least = here < u ? here : u;
      std::memcpy(first + c, &least, sizeof least);
    });
  }
}

template <class T, class A>
static void find_maxima(const PoolBackwardCall& call, int64_t b, const Segment& tokens, int64_t from, int64_t to,
                        void* maxima) {
  auto* const first = static_cast<typename Vec<A>::word*>(maxima);
  std::memset(first + from, 0xff, (to - from) * sizeof(A));
  to = to < call.pool.dim ? to : call.pool.dim;
  bool nan = false;
  for (int64_t c = from; c < to; ++c) {
    const A max = static_cast<const A*>(call.result)[b * call.pool.dim + c];
    nan |= max != max;
  }
  if (nan)
    find_maxima<T, A, true>(call, b, tokens, from, to, first);
  else
    find_maxima<T, A, false>(call, b, tokens, from, to, first);
  // A result that no token equals counts as the first one's.
  for (int64_t c = from; c < to; ++c) first[c] = first[c] + 1 == 0 ? 0 : first[c];
}

// (g - z sum(z g)) / norm, z = x / norm; g / norm where that is eps. `x` becomes the gradient.
template <class A>
FASTPOOL_INLINE void normalize_row_backward(A* x, A* z, const A* gradient, int64_t dim, A eps) {
  using V = typename Vec<A>::type;
  const Norm<A> norm = norm_of(x, dim, eps);
  for (int64_t c = 0; c < dim; c += Vec<A>::lanes) {
    const V v = (read<V>(x + c) * norm.scale) / norm.divisor;
    std::memcpy(z + c, &v, sizeof v);
  }
  const A across = dot(z, gradient, dim);
  over_columns<A>(0, dim, [&](int64_t c, int n) __attribute__((always_inline)) {
    const V g = load_part<V>(gradient + c, n);
    const V v = ((norm.below_eps ? g : g - read<V>(z + c) * across) * norm.scale) / norm.divisor;
    std::memcpy(x + c, &v, sizeof v);
  });
}

template <class T, class A>
static void normalize_rows_backward(const NormalizeBackwardCall& call, int64_t begin, int64_t end, A* x, A* z) {
  const NormalizeCall& forward = call.normalize;
  for (int64_t row = begin; row < end; ++row) {
    T* const out = static_cast<T*>(call.out) + row * call.width;
    const int64_t dim = load_used<T>(forward, row, x);
    const A* const gradient = static_cast<const A*>(call.gradient) + row * forward.dim;
    normalize_row_backward(x, z, gradient, dim, static_cast<A>(forward.eps));
    store_row(x, dim, out);
    std::memset(static_cast<void*>(out + dim), 0, (call.width - dim) * sizeof(T));
  }
}

static void segment_prologue(const PoolBackwardCall& call, Overlap& overlap) {
  with_dtype(call.pool.dtype, [&](auto t, auto a) { prologue_of<decltype(t), decltype(a)>(call, overlap); });
}

static void maxima(const PoolBackwardCall& call, int64_t b, const Segment& tokens, int64_t from, int64_t to,
                   void* first) {
  with_dtype(call.pool.dtype,
             [&](auto t, auto a) { find_maxima<decltype(t), decltype(a)>(call, b, tokens, from, to, first); });
}

static void scatter_gradient(const PoolBackwardCall& call, Overlap* overlaps, int64_t n, int64_t begin, int64_t end,
                             void* row) {
  with_dtype(call.pool.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    T* const r = static_cast<T*>(row);
    if (call.finds_maximum()) return scatter_columns<T, A>(call, overlaps, n, begin, end, r);
    if (call.pool.mode.one_token()) return write_rows<SumState, T, A>(call, overlaps, n, begin, end, r);
    with_state(call.pool.mode, [&](auto state) {
      using S = decltype(state);
      if constexpr (S::weighted && !S::queried) {
        if (call.per_token())
          return with_dtype(call.token_values().dtype, [&](auto w, auto) {
            write_token_values<S, T, A, decltype(w)>(call, overlaps, n, begin, end);
          });
      }
      if constexpr (S::starts_from_zero) write_rows<S, T, A>(call, overlaps, n, begin, end, r);
    });
  });
}

static void normalize_backward(const NormalizeBackwardCall& call, int64_t begin, int64_t end, void* x, void* z) {
  with_dtype(call.normalize.dtype, [&](auto t, auto a) {
    using A = decltype(a);
    normalize_rows_backward<decltype(t)>(call, begin, end, static_cast<A*>(x), static_cast<A*>(z));
  });
}

}  // namespace fastpool::FASTPOOL_ISA
