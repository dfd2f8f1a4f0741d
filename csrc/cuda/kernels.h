// What a dtype's kernel file offers; one such table per dtype of the tokens.
#pragma once
#include <cuda_runtime.h>

#include "../quantize.h"
#include "../tokens.h"
#include "plan.h"

namespace fastpool::cuda {

// Counters of arrivals, and what a launch clears in passing for the launch after it.
struct Counters {
  int* arrived = nullptr;  // [strips, slots, queries], zero when the launch starts
  int* stale = nullptr;
  int64_t stale_count = 0;
};

// Counters that stay on each GPU, 8 MB in all: two buffers for each of so many streams. Launches that need more are so
// large that the time of clearing counters does not show beside theirs.
constexpr int kKeptStreams = 64, kKeptCounters = 1 << 14;
// Where they are on the current device.
cudaError_t kept_counters(int** memory);

// l2_normalize's call, as a kernel can have it: shape and strides of the leading dimensions by value.
struct Rows {
  static constexpr int kLeading = 64;  // dimensions that torch allows
  NormalizeCall call;
  bool aligned = false;  // rows begin where four values may be loaded at once
  int64_t sizes[kLeading], strides[kLeading], truncate_dims_strides[kLeading];
};

// What the gradient of l2_normalize has besides its Rows.
struct RowGradients {
  int64_t width = 0;               // columns of x and of its gradient
  bool aligned = false;            // four values of the result's gradient may be loaded at once
  const void* gradient = nullptr;  // [rows, dim], of the accumulator
  void* out = nullptr;             // [rows, width]
};

// quantize's call, likewise.
struct QuantizeRows {
  QuantizeCall call;
  bool aligned = false, ranges_aligned = false;  // rows of x, and of ranges, begin where four values may be loaded
  int64_t sizes[Rows::kLeading], strides[Rows::kLeading];
};

// The segments that overlap a tile, as numbers of the first and the last; those between need not. All bits set: none.
struct OverlapRange {
  unsigned first;
  int last;
};

// What the launches of a gradient leave each other.
struct Prologue {
  OverlapRange* ranges = nullptr;        // [tiles], of packed input
  unsigned long long* maxima = nullptr;  // [batch, dim], of max: the first row that holds it; all bits set: none
  void* gradient = nullptr;              // [batch, queries, dim], over the divisor, of the accumulator
  Segment* segments = nullptr;           // [batch]: from the first real token on; of cls and last, their one token
  void* products = nullptr;              // [batch, queries]: sums of gradient * result, of the accumulator
  UnitTotals* totals = nullptr;          // [batch, queries], of a softmax
  int64_t dim = 0;                       // columns of the gradient
};

// A slot per unit, and per strip where that says so; see arrival_tree.cuh.
struct Workspace {
  void* sums = nullptr;          // [slots, queries, dim], of the accumulator
  UnitTotals* totals = nullptr;  // [strips, slots, queries]
  Counters counters;
  // Of a gradient: where a softmax leaves each segment's totals, and adds up nothing else; what tokens are multiplied
  // by in the gradient of a query.
  Prologue prologue;
};

// Of token outputs, what the launches leave each other.
struct TokenRows {
  bool padded = true;
  int64_t most = INT64_MAX;        // what is behind so many tokens is cut off
  int64_t* cu_seqlens = nullptr;   // [batch + 1]: where each segment's tokens stand in the result
  int64_t* sources = nullptr;      // of each of the result's rows: its row among those of all sequences
  OverlapRange* ranges = nullptr;  // of a packed input's gradient: a tile is kRangeRows rows
};
constexpr int kRangeRows = 32;
// cu_seqlens; at its end stands how many tokens there are.
cudaError_t count_tokens(const PoolCall& call, const TokenRows& rows, cudaStream_t stream);
// sources, and ranges where there is room for them, all bits set.
cudaError_t find_tokens(const PoolCall& call, const TokenRows& rows, cudaStream_t stream);

struct DTypeKernels {
  cudaError_t (*pool)(const PoolCall& call, const PoolPlan& plan, const Workspace& workspace, cudaStream_t stream);
  cudaError_t (*normalize)(const Rows& rows, cudaStream_t stream);
  // Of the accumulator's dtype alone.
  cudaError_t (*segment_prologue)(const PoolBackwardCall& call, const BackwardPlan& plan, const Prologue& prologue,
                                  cudaStream_t stream);
  cudaError_t (*pool_backward)(const PoolBackwardCall& call, const BackwardPlan& plan, const Prologue& prologue,
                               cudaStream_t stream);
  cudaError_t (*normalize_backward)(const Rows& rows, const RowGradients& gradients, cudaStream_t stream);
  // `aligned`: four values of hidden's rows, or of the gradient's, may be loaded at once.
  cudaError_t (*pack_tokens)(const TokensCall& call, const TokenRows& rows, bool aligned, cudaStream_t stream);
  cudaError_t (*scatter_tokens)(const TokensBackwardCall& call, const TokenRows& rows, bool aligned,
                                cudaStream_t stream);
  cudaError_t (*quantize)(const QuantizeRows& rows, cudaStream_t stream);
};

extern const DTypeKernels kernels_float16, kernels_bfloat16, kernels_float32, kernels_float64;

}  // namespace fastpool::cuda
