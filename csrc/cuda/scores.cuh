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

// The sums over a factor's columns of a token's values times its own; `aligned`: four of the token's may be loaded.
template <int M, class T, class A>
FASTPOOL_KERNEL_INLINE void products_of(const T* token, bool aligned, const Factor<A> (&factors)[M], int64_t columns,
                                        A (&sums)[M]) {
  const auto load = [&](int64_t c, A(&x)[M][kQuad]) {
    A of_token[kQuad];
    read_quad(token, c, columns, aligned, of_token);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      read_quad(factors[m].row, c, factors[m].columns, false, x[m]);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) x[m][i] = c + i < factors[m].columns ? of_token[i] * x[m][i] : A{};
    }
  };
  add_columns_of_warp<A>(load, columns, sums);
}

// Each of x's sums over a warp's lanes, neighbours first. In each step half of them go on in one lane of two and half
// in the other, while there are so many: bit b of a sum's number is then bit log2(n) - 1 - b of its lane's.
template <int bit = 1, class A, int n>
FASTPOOL_KERNEL_INLINE A add_items(const A (&x)[n]) {
  if constexpr (n > 1) {
    const bool upper = (lane() & bit) != 0;
    A half[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const A other = __shfl_xor_sync(kAll, upper ? x[i] : x[n / 2 + i], bit);
      half[i] = (upper ? x[n / 2 + i] : x[i]) + other;
    }
    return add_items<2 * bit>(half);
  } else {
    A sum = x[0];
#pragma unroll
    for (int further = bit; further < 32; further *= 2) sum += __shfl_xor_sync(kAll, sum, further);
    return sum;
  }
}

// Whether tokens and factors can be read 16 bytes at a time.
template <class T, int M, class A>
FASTPOOL_KERNEL_INLINE bool are_whole(const Quads& quads, const Factor<A> (&factors)[M]) {
  bool whole = quads.whole;
#pragma unroll
  for (const Factor<A>& factor : factors)
    whole = whole && factor.columns % (16 / sizeof(T)) == 0 && factor.columns <= kWholeColumns;
  return whole;
}

// The sums over a factor's columns of a token's values times its own, of N tokens and M factors, in every lane of a
// warp. Tokens are `stride` apart; those whose bit of `word` is not set are not read, and their sums not to be used.
// Where they are whole, kPieces pieces of every token are on their way at once, 16 bytes for each lane.
template <int kPieces, int N, int M, class T, class A>
FASTPOOL_KERNEL_INLINE void products(const T* first, int64_t stride, uint32_t word, bool whole, bool aligned,
                                     const Factor<A> (&factors)[M], A (&sums)[N][M]) {
  constexpr int V = 16 / sizeof(T), Q = V < kQuad ? V : kQuad;
  constexpr int kItems = N * M * kPieces;  // sums of a piece, a token and a factor
  static_assert((kItems & (kItems - 1)) == 0 && kItems <= 32 && V <= 2 * Q);
  int64_t most = 0;
#pragma unroll
  for (const Factor<A>& factor : factors) most = factor.columns > most ? factor.columns : most;
  if (!whole) {
    A own[M]{};  // of token number lane()
#pragma unroll 1
    for (int n = 0; n < N; ++n) {
      if ((word >> n & 1) == 0) continue;
      A of_token[M];
      products_of(first + n * stride, aligned, factors, most, of_token);
#pragma unroll
      for (int m = 0; m < M; ++m) own[m] = N == 1 || lane() == n ? of_token[m] : own[m];
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < M; ++m) sums[n][m] = N == 1 ? own[m] : __shfl_sync(kAll, own[m], n);
    return;
  }
  const int columns = static_cast<int>(most);
  A sum{}, levels[kWholeLevels]{};  // of each lane's token and factor
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
        if (word >> n & 1 && c < columns) words[n][p] = load_word<V>(first + (n * static_cast<int>(stride) + c));
      }
    A x[kItems];
#pragma unroll
    for (int q = 0; q < V; q += Q)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          const int c = begin + p * 32 * V;
          const bool inside = c < factors[m].columns;
          A y[Q] = {};
          if (inside) read<Q>(factors[m].row + c + q, y);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const Pack<T, V> token = bit_cast<Pack<T, V>>(words[n][p]);
            A z[Q];
#pragma unroll
            for (int i = 0; i < Q; ++i) z[i] = widen(token.x[q + i]) * y[i];
#pragma unroll
            for (int step = 1; step < Q; step *= 2)
#pragma unroll
              for (int i = 0; i < Q; i += 2 * step) z[i] += z[i + step];
            A& item = x[(n * M + m) * kPieces + p];
            const A four = inside ? z[0] : A{};
            item = q == 0 ? four : item + four;
          }
        }
    sum = add_items(x);
#pragma unroll
    for (int p = 1; p < kPieces; p *= 2) sum += __shfl_xor_sync(kAll, sum, kItems / 2 / p);
    const bool last = begin - lane() * V + kPieces * 32 * V >= columns;
    bool carries = true;
#pragma unroll
    for (int k = 0; k < kWholeLevels; ++k) {
      if (round >> k & 1) {
        if (carries || last) sum = levels[k] + sum;
      } else {
        if (carries) levels[k] = sum;
        carries = false;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int m = 0; m < M; ++m) {
      int from = 0;
#pragma unroll
      for (int b = 0; 1 << b < kItems; ++b)
        if ((n * M + m) * kPieces >> b & 1) from |= kItems / 2 >> b;
      sums[n][m] = __shfl_sync(kAll, sum, from) + A{};
    }
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
