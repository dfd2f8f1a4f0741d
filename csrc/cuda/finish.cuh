// What follows a reduction: divide, activate, normalise, cast, store. A thread has four neighbouring columns at a time,
// the same ones in every step, so that steps need not wait for each other. Its loops stay rolled: they run once per
// segment, and unrolled they would take registers and cache from the walk.
#pragma once
#include "../finish.h"
#include "sums.cuh"

namespace fastpool::cuda {

template <class A>
FASTPOOL_KERNEL_INLINE A divisor_of(const Mode& mode, const Totals& totals) {
  return fastpool::divisor_of<A>(mode.divisor, totals, [](A x) { return square_root(x); });
}
template <class A>
FASTPOOL_KERNEL_INLINE A quotient(A x, A divisor) {
  return divisor == 0 ? A{} : divisor == 1 ? x : x / divisor;
}

// Columns c to c + 3 of a row of `dim`, cast; `whole`: four at a time, since rows begin where four values may.
template <class A, class N>
FASTPOOL_KERNEL_INLINE void store_quad(N* to, int64_t c, int64_t dim, bool whole, const A (&x)[kQuad]) {
  if (whole) {
    if constexpr (sizeof(N) == 8) {
      store(to + c, {x[0], x[1]});
      store(to + c + 2, {x[2], x[3]});
    } else {
      store(to + c, x);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (c + i < dim) narrow(x[i], to[c + i]);
}
template <class A>
FASTPOOL_KERNEL_INLINE void store_quad(void* out, DType dtype, int64_t at, int64_t c, int64_t dim, bool whole,
                                       const A (&x)[kQuad]) {
  switch (dtype) {
    case DType::float16: return store_quad(static_cast<half_t*>(out) + at, c, dim, whole, x);
    case DType::bfloat16: return store_quad(static_cast<bfloat16_t*>(out) + at, c, dim, whole, x);
    case DType::float32: return store_quad(static_cast<float*>(out) + at, c, dim, whole, x);
    case DType::float64: return store_quad(static_cast<double*>(out) + at, c, dim, whole, x);
  }
}

// The epilogue of result number `result`, whose sums stand in shared.row: `columns` of them, from `column` on.
template <class A>
FASTPOOL_KERNEL_INLINE void finish(const PoolCall& call, int64_t result, int64_t column, int columns,
                                   const Totals& totals, const Shared<A>& shared) {
  const A divisor = divisor_of<A>(call.mode, totals);
  const int step = static_cast<int>(blockDim.x) * kQuad, begin = static_cast<int>(threadIdx.x) * kQuad;
#pragma unroll 1
  for (int c = begin; c < columns; c += step)
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      A& x = shared.row[c + i];
      if (call.mode.softmax()) x += A{};  // of a sum that underflows -0 may be left
      x = c + i < columns ? quotient(x, divisor) : A{};
    }
  if (call.mode.activates_result()) {  // where there are columns: the others hold 0, and stay it
#pragma unroll 1
    for (int c = begin; c < columns; c += step)
#pragma unroll 1
      for (int i = 0; i < kQuad; ++i) shared.row[c + i] = activate(shared.row[c + i], call.mode.activation);
  }
  const auto load = [&](int64_t c, A(&x)[kQuad]) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[i] = c < columns ? shared.row[c + i] : A{};
  };
  Norm<A> norm;
  if (call.normalize) norm = Norm<A>::of(load, columns, static_cast<A>(kNormEps), shared.sums);
#pragma unroll 1
  for (int c = begin; c < columns; c += step) {
    A x[kQuad];
    load(c, x);
    if (call.normalize) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) x[i] = (x[i] * norm.scale) / norm.divisor;
    }
    store_quad(call.out, call.out_dtype, result * call.dim + column, c, columns, call.dim % kQuad == 0, x);
  }
}

}  // namespace fastpool::cuda
