// What a dtype's kernel file offers; one such table per dtype of the tokens.
#pragma once
#include <cuda_runtime.h>

#include "plan.h"

namespace fastpool::cuda {

// A slot per unit, and per strip where that says so; see tree.cuh.
struct Workspace {
  void* sums = nullptr;      // [slots, dim], of the accumulator
  Totals* totals = nullptr;  // [strips, slots]
  int* arrived = nullptr;    // [strips, slots], zero before and after
};

// l2_normalize's call, as a kernel can have it: shape and strides of the leading dimensions by value.
struct Rows {
  static constexpr int kLeading = 64;  // dimensions that torch allows
  NormalizeCall call;
  bool aligned = false;  // rows begin where four values may be loaded at once
  int64_t sizes[kLeading], strides[kLeading];
};

struct Kernels {
  cudaError_t (*pool)(const PoolCall& call, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
  cudaError_t (*normalize)(const Rows& rows, cudaStream_t stream);
};

extern const Kernels kernels_float16, kernels_bfloat16, kernels_float32, kernels_float64;

}  // namespace fastpool::cuda
