// What follows a reduction: divide, normalise, cast, store. A thread does so for four neighbouring columns at a time,
// the same ones in every step, so that steps need not wait for each other. Its loops stay rolled: they run once per
// segment, and unrolled they would take registers and cache from the walk.
#pragma once
#include "block.cuh"

namespace fastpool::cuda {

constexpr int kQuad = 4;
constexpr int kWarpColumns = 32 * kQuad;
constexpr int64_t kPiece = kBlockSums * kWarpColumns;  // columns whose squares meet before the binary counter

// Sum of (x * scale)^2 over dim columns in an aligned binary tree, neighbours first; a missing right sibling adds
// nothing. load(c, x) gives columns c to c + 3, zeros behind the last. `sums`: kBlockSums, and behind them a binary
// counter.
template <class A, class Load>
FASTPOOL_KERNEL_INLINE A sum_of_squares(Load load, int64_t dim, A scale, A* sums) {
  A* const level = sums + kBlockSums;
  A total{};
  int64_t piece = 0;
#pragma unroll 1
  for (int64_t begin = 0; begin < dim; begin += kPiece, ++piece) {
    __syncthreads();  // the sums before have been read
#pragma unroll 1
    for (int i = warp(); i < kBlockSums; i += warps()) {
      A sum{};
      if (begin + i * kWarpColumns < dim) {
        A x[kQuad];
        load(begin + i * kWarpColumns + lane() * kQuad, x);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) x[k] = (x[k] * scale) * (x[k] * scale);
        sum = (x[0] + x[1]) + (x[2] + x[3]);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kAll, sum, step);
      }
      if (lane() == 0) sums[i] = sum;
    }
    __syncthreads();
    total = sums[2 * lane()] + sums[2 * lane() + 1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(kAll, total, step);
    int k = 0;
    for (; piece >> k & 1; ++k) total = level[k] + total;
    if (begin + kPiece < dim) {
      __syncthreads();  // all have added what the counter held
      if (threadIdx.x == 0) level[k] = total;
    } else {
      for (const int64_t rest = piece; rest >> k != 0; ++k)
        if (rest >> k & 1) total = level[k] + total;
    }
  }
  return total;
}

// x / max(norm(x), eps) is (x * scale) / divisor. A norm whose square overflows is taken of x scaled by a power of two.
template <class A>
struct Norm {
  A scale = 1, divisor = 1;

  template <class Load>
  __device__ __forceinline__ static Norm of(Load load, int64_t dim, A eps, A* sums) {
    const A infinity = static_cast<A>(__builtin_inff());
    Norm norm;
    A squares;
#pragma unroll 1
    for (;;) {
      squares = sum_of_squares(load, dim, norm.scale, sums);
      if (squares != infinity || norm.scale != 1) break;
      norm.scale = sizeof(A) == 4 ? static_cast<A>(0x1p-100f) : static_cast<A>(0x1p-600);
    }
    const A length = square_root(squares), least = eps * norm.scale;  // the norm is scaled, so its lower bound is too
    norm.divisor = length > least || length != length ? length : least;
    return norm;
  }
};

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

// The epilogue of a segment whose sums stand in shared.row: `columns` of them, from `column` on.
template <class A>
FASTPOOL_KERNEL_INLINE void finish(const PoolCall& call, int64_t segment, int64_t column, int columns,
                                   const Totals& totals, const Shared<A>& shared) {
  A divisor = 1;
  if (call.mode == Mode::mean) divisor = static_cast<A>(totals.count);
  if (call.mode == Mode::mean_sqrt_len) divisor = square_root(static_cast<A>(totals.count));
  if (call.mode == Mode::weighted_mean) divisor = static_cast<A>(totals.weight);
  const bool zero = totals.count == 0 || divisor == 0;  // no real token, or weights that add up to nothing
  const int step = static_cast<int>(blockDim.x) * kQuad, begin = static_cast<int>(threadIdx.x) * kQuad;
#pragma unroll 1
  for (int c = begin; c < columns; c += step)
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      shared.row[c + i] = zero || c + i >= columns ? A{}
                          : divisor == 1           ? shared.row[c + i]
                                                   : shared.row[c + i] / divisor;
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
    store_quad(call.out, call.out_dtype, segment * call.dim + column, c, columns, call.dim % kQuad == 0, x);
  }
}

}  // namespace fastpool::cuda
