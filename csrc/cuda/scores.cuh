// Scores of tokens, which are their products with a query, and the gradients of both: a warp takes a few tokens.
#pragma once
#include "kernels.h"
#include "sums.cuh"

namespace fastpool::cuda {

// What tokens are multiplied by: a query, or a result's gradient.
template <class A>
struct Factor {
  const A* row;
  int64_t columns;
};

// The sum over a factor's columns of a token's values times its own, by a warp.
template <class T, class A>
FASTPOOL_KERNEL_INLINE A product(const T* token, const Quads& quads, const Factor<A>& factor) {
  const auto products = [&](int64_t c, A(&x)[kQuad]) {
    A y[kQuad];
    read_quad(token, c, factor.columns, quads.hidden, x);
    read_quad(factor.row, c, factor.columns, false, y);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] *= y[i];
  };
  return add_columns_of_warp<A>(products, factor.columns);
}

// Those of N tokens and M factors, in every lane of a warp; those of a null pointer are not to be used. kPieces pieces
// of every token are on their way at once, a whole load for each lane.
template <int kPieces, int N, int M, class T, class A>
FASTPOOL_KERNEL_INLINE void products(const T* const (&tokens)[N], const Quads& quads, const Factor<A> (&factors)[M],
                                     A (&sums)[N][M]) {
  constexpr int V = 16 / sizeof(T), kItems = N * M * kPieces;  // sums of a piece, a token and a factor
  static_assert((kItems & (kItems - 1)) == 0 && kItems <= 32);
  bool whole = quads.whole;
  int columns = 0;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    whole = whole && factors[m].columns % V == 0 && factors[m].columns <= INT32_MAX / 2;
    const int own = static_cast<int>(factors[m].columns);
    columns = own > columns ? own : columns;
  }
  if (!whole) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < M; ++m) sums[n][m] = tokens[n] == nullptr ? A{} : product(tokens[n], quads, factors[m]);
    return;
  }
  A level[N][M]{};  // level k of a binary counter is lane k's
  int round = 0;
#pragma unroll 1
  for (int begin = lane() * V; begin - lane() * V < columns; begin += kPieces * 32 * V, ++round) {
    Word<T, V> words[N][kPieces];
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int c = begin + p * 32 * V;
        words[n][p] = Word<T, V>{};
        if (tokens[n] != nullptr && c < columns) words[n][p] = load_word<V>(tokens[n] + c);
      }
    A x[kItems];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int c = begin + p * 32 * V;
        const bool inside = c < factors[m].columns;
        A y[V] = {};
        if (inside) read<V>(factors[m].row + c, y);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const Pack<T, V> token = bit_cast<Pack<T, V>>(words[n][p]);
          A z[V];
#pragma unroll
          for (int i = 0; i < V; ++i) z[i] = widen(token.x[i]) * y[i];
#pragma unroll
          for (int step = 1; step < V; step *= 2)
#pragma unroll
            for (int i = 0; i < V; i += 2 * step) z[i] += z[i + step];
          x[(n * M + m) * kPieces + p] = inside ? z[0] : A{};
        }
      }
    // The lanes add up neighbours first. In each step half of the sums go on in one lane of two and half in the other,
    // while there are so many: bit b of a sum's number is then bit log2(kItems) - 1 - b of its lane's.
#pragma unroll
    for (int half = kItems / 2, bit = 1; half > 0; half /= 2, bit *= 2) {
      const bool upper = (lane() & bit) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const A other = __shfl_xor_sync(kAll, upper ? x[i] : x[half + i], bit);
        x[i] = (upper ? x[half + i] : x[i]) + other;
      }
    }
#pragma unroll
    for (int bit = kItems; bit < 32; bit *= 2) x[0] += __shfl_xor_sync(kAll, x[0], bit);
#pragma unroll
    for (int p = 1; p < kPieces; p *= 2) x[0] += __shfl_xor_sync(kAll, x[0], kItems / 2 / p);
    const bool last = begin - lane() * V + kPieces * 32 * V >= columns;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < M; ++m) {
        int from = 0;
#pragma unroll
        for (int b = 0; 1 << b < kItems; ++b)
          if (((n * M + m) * kPieces) >> b & 1) from |= kItems / 2 >> b;
        sums[n][m] = __shfl_sync(kAll, x[0], from);
        int k = 0;
        for (; round >> k & 1 || (last && round >> k != 0); ++k)
          if (round >> k & 1) sums[n][m] = __shfl_sync(kAll, level[n][m], k) + sums[n][m];
        if (lane() == k) level[n][m] = sums[n][m];
      }
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int m = 0; m < M; ++m) sums[n][m] += A{};
}

template <class A>
FASTPOOL_KERNEL_INLINE Factor<A> query_of(const PoolCall& call, int64_t segment, int64_t query) {
  const int64_t at = segment * call.queries.batch_stride + query * call.queries.stride;
  return {static_cast<const A*>(call.queries.data) + at, call.width};
}

// That of result number `at`.
template <class A>
FASTPOOL_KERNEL_INLINE Factor<A> gradient_of(const Prologue& prologue, int64_t at) {
  return {static_cast<const A*>(prologue.gradient) + at * prologue.dim, prologue.dim};
}

// e^score, relative to the largest exponent of the segment that shares its totals.
template <class A>
FASTPOOL_KERNEL_INLINE A softmax_weight(const Exponential<A>& of_score, const UnitTotals& totals) {
  return of_score.p * power_between(of_score.n, static_cast<A>(totals.exponent));
}

// A token's weight, and what its product with a query gets of the gradient of result number `at`, from its products
// with the query and with that gradient.
template <class A>
struct ProductShare {
  A weight, share;
};
template <class A>
FASTPOOL_KERNEL_INLINE ProductShare<A> share_of_product(const PoolCall& call, const Prologue& prologue, int64_t at,
                                                        const A (&of_token)[2]) {
  const A scale = static_cast<A>(call.queries.scale);
  const A weight = softmax_weight(exponential(scale * of_token[0]), prologue.totals[at]);
  const A of_score = (of_token[1] - static_cast<const A*>(prologue.products)[at]) * weight;
  return {weight, of_score * scale};
}

}  // namespace fastpool::cuda
