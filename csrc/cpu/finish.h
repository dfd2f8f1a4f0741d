// What follows a reduction: divide, activate, truncate, normalise, cast, store. Included by kernel_impl.h, into an
// instruction set's namespace.
#pragma once
#include "../finish.h"
#include "kernel.h"
#include "tree.h"
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

// x / max(norm, eps) is (x * scale) / divisor.
template <class A>
struct Norm {
  A scale, divisor;
  bool below_eps;
};
template <class A>
FASTPOOL_INLINE Norm<A> norm_of(const A* x, int64_t dim, A eps) {
  using V = typename Vec<A>::type;
  A scale = 1;
  const auto square = [&](int64_t c, int) __attribute__((always_inline)) {
    const V y = read<V>(x + c) * (scale * scale);
    return y * y;
  };
  const A squares = add_columns<A>(dim, square);
  scale = norm_scale(squares, eps);
  const A norm = scale == 1 ? square_root(squares) : square_root(add_columns<A>(dim, square)) / scale;
  const A least = eps * scale;  // the norm is scaled, so its lower bound is too
  return {scale, norm > least || norm != norm ? norm : least, norm < least};
}

// x / max(norm(x), eps) in place.
template <class A>
FASTPOOL_INLINE void normalize_row(A* x, int64_t dim, int64_t columns, A eps) {
  using V = typename Vec<A>::type;
  const Norm<A> norm = norm_of(x, dim, eps);
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = (read<V>(x + c) * norm.scale) / norm.divisor;
    std::memcpy(x + c, &v, sizeof v);
  }
}

template <class T, class A>
FASTPOOL_INLINE void store_row(const A* x, int64_t dim, T* out) {
  using V = typename Vec<A>::type;
  over_columns<A>(0, dim,
                  [&](int64_t c, int n) __attribute__((always_inline)) { store_part(out + c, read<V>(x + c), n); });
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

// x over its mode's divisor; 0 where that is 0.
template <class A>
FASTPOOL_INLINE void divide(const Mode& mode, const Totals& totals, A* x, int64_t columns) {
  using V = typename Vec<A>::type;
  const A divisor =
      divisor_of<A>(mode.divisor, totals, [](A x) __attribute__((always_inline)) { return square_root(x); });
  if (divisor == 0) {
    std::memset(x, 0, columns * sizeof(A));
  } else if (divisor != 1) {
    for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
      const V v = read<V>(x + c) / divisor;
      std::memcpy(x + c, &v, sizeof v);
    }
  }
}

template <class A>
FASTPOOL_INLINE void activate(Activation activation, A* x, int64_t columns) {
  using V = typename Vec<A>::type;
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = fastpool::activate(read<V>(x + c), activation);
    std::memcpy(x + c, &v, sizeof v);
  }
}

// Of a scaled sum that underflows -0 may be left.
template <class A>
FASTPOOL_INLINE void add_zero(A* x, int64_t columns) {
  using V = typename Vec<A>::type;
  for (int64_t c = 0; c < columns; c += Vec<A>::lanes) {
    const V v = read<V>(x + c) + V{};
    std::memcpy(x + c, &v, sizeof v);
  }
}

// The epilogue: divide, activate, normalise, cast, store.
template <class A>
FASTPOOL_INLINE void finish(const PoolCall& call, int64_t row, A* x, const Totals& totals) {
  const int64_t columns = padded_columns(call.dim);
  if (call.mode.softmax()) add_zero(x, columns);
  divide(call.mode, totals, x, columns);
  if (call.mode.activates_result()) activate(call.mode.activation, x, columns);
  if (call.normalize) normalize_row(x, call.dim, columns, static_cast<A>(kNormEps));
  store_row(x, call.dim, call.out, row, call.out_dtype);
}

// A row of any dtype into accumulator lanes.
template <class T, class A>
FASTPOOL_INLINE void load_row(const T* p, int64_t dim, A* x) {
  using V = typename Vec<A>::type;
  over_columns<A>(0, dim, [&](int64_t c, int n) __attribute__((always_inline)) {
    const V v = load_part<V>(p + c, n);
    std::memcpy(x + c, &v, sizeof v);
  });
}

}  // namespace fastpool::FASTPOOL_ISA
