// The CPU kernels of token outputs: included once by each instruction set's file, into its own namespace.
#pragma once
#include "backward_impl.h"

namespace fastpool::FASTPOOL_ISA {

template <class T, class A>
static void pack_tokens_of(const PoolCall& call, int64_t b, int64_t row, int64_t n, int64_t at, A* x) {
  const T* from = static_cast<const T*>(call.hidden) + b * call.batch_stride + row * call.row_stride;
  if (!call.normalize && call.out_dtype == call.dtype) {
    T* const to = static_cast<T*>(call.out) + at * call.dim;
    if (call.row_stride == call.dim) {
      std::memcpy(static_cast<void*>(to), from, n * call.dim * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i)
        std::memcpy(static_cast<void*>(to + i * call.dim), from + i * call.row_stride, call.dim * sizeof(T));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i, from += call.row_stride) {
    load_row(from, call.dim, x);
    if (call.normalize) normalize_row(x, call.dim, padded_columns(call.dim), static_cast<A>(kNormEps));
    store_row(x, call.dim, call.out, at + i, call.out_dtype);
  }
}

static void pack_tokens(const PoolCall& call, int64_t b, int64_t row, int64_t n, int64_t at, void* x) {
  with_dtype(call.dtype,
             [&](auto t, auto a) { pack_tokens_of<decltype(t)>(call, b, row, n, at, static_cast<decltype(a)*>(x)); });
}

// A row of accumulators, by the vector, that ends where its columns do.
template <class A>
struct ExactRow {
  const A* x;
  int64_t dim;
  __attribute__((always_inline)) typename Vec<A>::type operator()(int64_t c) const {
    using V = typename Vec<A>::type;
    constexpr int lanes = Vec<A>::lanes;
    return c + lanes <= dim ? read<V>(x + c) : load_part<V>(x + c, static_cast<int>(dim - c));
  }
};

static void scatter_tokens(const TokensBackwardCall& call, const int64_t* first, const int64_t* sources, int64_t begin,
                           int64_t end) {
  const int64_t dim = call.pool.dim, width = call.pool.width;
  with_dtype(call.pool.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t* const of_row = sources + first[row];
      write_row<A>(first[row + 1] - first[row], dim, width, static_cast<T*>(call.out) + row * width,
                   [&](int64_t k) __attribute__((always_inline)) {
                     return ExactRow<A>{static_cast<const A*>(call.gradient) + of_row[k] * dim, dim};
                   });
    }
  });
}

constexpr cpu::IsaKernels kernels(const char* name) {
  return {name,
          cpu::InIeee<reduce>::call,
          cpu::InIeee<combine>::call,
          cpu::InIeee<normalize>::call,
          cpu::InIeee<segment_prologue>::call,
          cpu::InIeee<maxima>::call,
          cpu::InIeee<scatter_gradient>::call,
          cpu::InIeee<normalize_backward>::call,
          cpu::InIeee<pack_tokens>::call,
          cpu::InIeee<scatter_tokens>::call,
          cpu::InIeee<quantize>::call};
}

}  // namespace fastpool::FASTPOOL_ISA
