// What follows a reduction: divide, truncate, normalise, cast, store. Included by kernel_impl.h, into an instruction
// set's namespace.
#pragma once
#include <utility>

#include "kernel.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

using cpu::padded_columns;

template <class A>
FASTPOOL_INLINE A square_root(A x) {
  if constexpr (sizeof(A) == 4)
    return __builtin_sqrtf(x);
  else
    return __builtin_sqrt(x);
}

// Sums of neighbours, those of `a` before those of `b`.
template <class V, int... i>
FASTPOOL_INLINE V add_pairs(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, 2 * i...) + __builtin_shufflevector(a, b, 2 * i + 1 ...);
}

// Sum of (x * scale)^2 over x[0..dim) in an aligned binary tree, neighbours first; a missing right sibling adds
// nothing.
template <class A>
FASTPOOL_INLINE A sum_of_squares(const A* x, int64_t dim, A scale) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes, vectors = 8;
  // A block of columns is a subtree; a binary counter holds the sums of 1, 2, 4, ... blocks.
  A level[64];
  int64_t blocks = 0;
  for (int64_t c = 0; c < dim; c += vectors * lanes, ++blocks) {
    V s[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = dim - c - v * lanes;
      const V y = (left >= lanes ? read<V>(x + c + v * lanes)
                   : left > 0    ? load_part<V>(x + c + v * lanes, static_cast<int>(left))
                                 : V{}) *
                  scale;
      s[v] = y * y;
    }
    for (int half = vectors / 2; half > 0; half /= 2)
      for (int v = 0; v < half; ++v) s[v] = add_pairs(s[2 * v], s[2 * v + 1], std::make_integer_sequence<int, lanes>());
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) s[0][i] = s[0][2 * i] + s[0][2 * i + 1];
    A sum = s[0][0];
    int k = 0;
    for (int64_t bits = blocks; bits & 1; bits >>= 1) sum = level[k++] + sum;
    level[k] = sum;
  }
  A total = 0;
  for (int64_t bits = blocks; bits; bits &= bits - 1) total = level[__builtin_ctzll(bits)] + total;
  return total;
}

// x / max(norm(x), eps) in place. A norm whose square overflows is taken of x scaled by a power of two.
template <class A>
FASTPOOL_INLINE void normalize_row(A* x, int64_t dim, int64_t columns, A eps) {
  using V = typename Vec<A>::type;
  constexpr A infinity = sizeof(A) == 4 ? __builtin_inff() : __builtin_inf();
  A scale = 1, squares = sum_of_squares(x, dim, scale);
  if (squares == infinity) {
    scale = sizeof(A) == 4 ? 0x1p-100f : static_cast<A>(0x1p-600);
    squares = sum_of_squares(x, dim, scale);
  }
  const A norm = square_root(squares);
  const A least = eps * scale;  // the norm is scaled, so its lower bound is too
  const A divisor = norm > least || norm != norm ? norm : least;
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = (read<V>(x + c) * scale) / divisor;
    std::memcpy(x + c, &v, sizeof v);
  }
}

template <class T, class A>
FASTPOOL_INLINE void store_row(const A* x, int64_t dim, T* out) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) store(out + c, read<V>(x + c));
  if (c < dim) store_part(out + c, read<V>(x + c), static_cast<int>(dim - c));
}
template <class A>
FASTPOOL_INLINE void store_row(const A* x, int64_t dim, void* out, int64_t row, DType dtype) {
  switch (dtype) {
    case DType::float16: return store_row(x, dim, static_cast<half_t*>(out) + row * dim);
    case DType::bfloat16: return store_row(x, dim, static_cast<bfloat16_t*>(out) + row * dim);
    case DType::float32: return store_row(x, dim, static_cast<float*>(out) + row * dim);
    case DType::float64: return store_row(x, dim, static_cast<double*>(out) + row * dim);
  }
}

// The epilogue: divide, normalise, cast, store.
template <class A>
FASTPOOL_INLINE void finish(const PoolCall& call, int64_t segment, A* x, const Totals& totals) {
  using V = typename Vec<A>::type;
  const int64_t columns = padded_columns(call.dim);
  A divisor = 1;
  if (call.mode == Mode::mean) divisor = static_cast<A>(totals.count);
  if (call.mode == Mode::mean_sqrt_len) divisor = square_root(static_cast<A>(totals.count));
  if (call.mode == Mode::weighted_mean) divisor = static_cast<A>(totals.weight);
  if (totals.count == 0 || divisor == 0) {  // no real token, or weights that add up to nothing
    std::memset(x, 0, columns * sizeof(A));
  } else if (divisor != 1) {
    for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
      const V v = read<V>(x + c) / divisor;
      std::memcpy(x + c, &v, sizeof v);
    }
  }
  if (call.normalize) normalize_row(x, call.dim, columns, static_cast<A>(kNormEps));
  store_row(x, call.dim, call.out, segment, call.out_dtype);
}

// A row of any dtype into accumulator lanes.
template <class T, class A>
FASTPOOL_INLINE void load_row(const T* p, int64_t dim, A* x) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) {
    const V v = load(p + c);
    std::memcpy(x + c, &v, sizeof v);
  }
  if (c < dim) {
    const V v = load_part<V>(p + c, static_cast<int>(dim - c));
    std::memcpy(x + c, &v, sizeof v);
  }
}

}  // namespace fastpool::FASTPOOL_ISA
