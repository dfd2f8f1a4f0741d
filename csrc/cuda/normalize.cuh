// l2_normalize and its gradient: a block takes a row.
#pragma once
#include "finish.cuh"
#include "kernels.h"

namespace fastpool::cuda {

// Where a row of x begins, and how many of its columns are used.
template <class T>
FASTPOOL_KERNEL_INLINE const T* row_of(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.call.x) + offset_of(row, rows.call.leading, rows.sizes, rows.strides);
}
FASTPOOL_KERNEL_INLINE int64_t dim_of(const Rows& rows, int64_t row) {
  if (rows.call.truncate_dims.data == nullptr) return rows.call.dim;
  return dim_at(rows.call, offset_of(row, rows.call.leading, rows.sizes, rows.truncate_dims_strides));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) normalize_kernel(const __grid_constant__ Rows rows) {
  using A = typename AccumulatorOf<T>::type;
  const NormalizeCall& call = rows.call;
  A* const sums = reinterpret_cast<A*>(shared_memory);
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const T* const x = row_of<T>(rows, row);
    const int64_t dim = dim_of(rows, row);
    const auto load_quad = [&](int64_t c, A(&y)[kQuad]) { read_quad(x, c, dim, rows.aligned, y); };
    const Norm<A> norm = Norm<A>::of(load_quad, dim, static_cast<A>(call.eps), sums);
#pragma unroll 1
    for (int64_t c = threadIdx.x * kQuad; c < call.dim; c += blockDim.x * kQuad) {
      A y[kQuad];
      load_quad(c, y);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) y[i] = c + i < dim ? (y[i] * norm.scale) / norm.divisor : A{};
      store_quad(call.out, call.out_dtype, row * call.dim, c, call.dim, call.dim % kQuad == 0, y);
    }
  }
}

// (g - z sum(z g)) / norm, z = x / norm; g / eps where the norm is below eps. Columns that are not used get zeros.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 3 : 4)
    normalize_backward_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowGradients gradients) {
  using A = typename AccumulatorOf<T>::type;
  const NormalizeCall& call = rows.call;
  A* const sums = reinterpret_cast<A*>(shared_memory);
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const T* const x = row_of<T>(rows, row);
    const int64_t dim = dim_of(rows, row);
    const A* const gradient = static_cast<const A*>(gradients.gradient) + row * call.dim;
    const auto load_quad = [&](int64_t c, A(&y)[kQuad]) { read_quad(x, c, dim, rows.aligned, y); };
    const Norm<A> norm = Norm<A>::of(load_quad, dim, static_cast<A>(call.eps), sums);
    const auto load_both = [&](int64_t c, A(&z)[kQuad], A(&g)[kQuad]) {
      load_quad(c, z);
      read_quad(gradient, c, dim, gradients.aligned, g);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) z[i] = (z[i] * norm.scale) / norm.divisor;
    };
    const auto product = [&](int64_t c, A(&z)[kQuad]) {
      A g[kQuad];
      load_both(c, z, g);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) z[i] *= g[i];
    };
    const A along = add_columns<A>(product, dim, sums);
#pragma unroll 1
    for (int64_t c = threadIdx.x * kQuad; c < gradients.width; c += blockDim.x * kQuad) {
      A z[kQuad], g[kQuad];
      load_both(c, z, g);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const A across = norm.below_eps ? g[i] : g[i] - z[i] * along;
        g[i] = c + i < dim ? (across * norm.scale) / norm.divisor : A{};
      }
      store_quad(static_cast<T*>(gradients.out) + row * gradients.width, c, gradients.width,
                 gradients.width % kQuad == 0, g);
    }
  }
}

}  // namespace fastpool::cuda
