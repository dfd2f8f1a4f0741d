// Scores of tokens, which are their products with a query, and the gradients of both: a warp takes a token.
#pragma once
#include "kernels.h"
#include "sums.cuh"

namespace fastpool::cuda {

// The sum over `columns` of a token's values times others; `quads`: of the token, and of the others.
template <class T, class A>
FASTPOOL_KERNEL_INLINE A product(const T* token, bool quads, const A* others, bool other_quads, int64_t columns) {
  const auto products = [&](int64_t c, A(&x)[kQuad]) {
    A y[kQuad];
    read_quad(token, c, columns, quads, x);
    read_quad(others, c, columns, other_quads, y);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] *= y[i];
  };
  return add_columns_of_warp<A>(products, columns);
}

template <class A>
FASTPOOL_KERNEL_INLINE const A* query_of(const PoolCall& call, int64_t segment, int64_t query) {
  return static_cast<const A*>(call.queries.data) + segment * call.queries.batch_stride + query * call.queries.stride;
}

template <class A, class T>
FASTPOOL_KERNEL_INLINE A score_of(const PoolCall& call, const Quads& quads, int64_t segment, int64_t query,
                                  const T* token) {
  return static_cast<A>(call.queries.scale) *
         product(token, quads.hidden, query_of<A>(call, segment, query), quads.query, call.width);
}

// e^score, relative to the largest exponent of the segment that shares its totals.
template <class A>
FASTPOOL_KERNEL_INLINE A softmax_weight(const Exponential<A>& of_score, const UnitTotals& totals) {
  return of_score.p * power_between(of_score.n, static_cast<A>(totals.exponent));
}

// What the weight of a token gets of the gradient of result number `at`.
template <class A, class T>
FASTPOOL_KERNEL_INLINE A share_of_weight(const Prologue& prologue, int64_t at, const T* token, bool quads) {
  const A* const gradient = static_cast<const A*>(prologue.gradient) + at * prologue.dim;
  return product(token, quads, gradient, prologue.dim % kQuad == 0, prologue.dim) -
         static_cast<const A*>(prologue.products)[at];
}

// A token's weight, and what its product with a query of its segment gets.
template <class A>
struct ProductShare {
  A weight, share;
};
template <class A, class T>
FASTPOOL_KERNEL_INLINE ProductShare<A> share_of_product(const PoolCall& call, const Quads& quads,
                                                        const Prologue& prologue, int64_t segment, int64_t query,
                                                        const T* token) {
  const int64_t at = segment * call.queries.count + query;
  const A weight = softmax_weight(exponential(score_of<A>(call, quads, segment, query, token)), prologue.totals[at]);
  const A of_score = share_of_weight<A>(prologue, at, token, quads.hidden) * weight;
  return {weight, of_score * static_cast<A>(call.queries.scale)};
}

// value(j) for every token j of `word`, made by the whole warp: lane j has its own.
template <class A, class Value>
FASTPOOL_KERNEL_INLINE A of_each_token(unsigned word, Value value) {
  A mine{};
#pragma unroll 1
  for (; word != 0; word &= word - 1) {
    const int j = __ffs(static_cast<int>(word)) - 1;
    const A of_token = value(j);
    if (lane() == j) mine = of_token;
  }
  return mine;
}

}  // namespace fastpool::cuda
