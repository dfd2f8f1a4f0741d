// What a pooling call is, for host and device code alike. No torch header is allowed here: the kernels below this line
// are built and tested without torch.
#pragma once
#include "modes.h"

namespace fastpool {

// The canonical order of additions, shared with Triton and the reference (see python/fastpool/reference/__init__.py): a
// leaf is this many consecutive tokens, added one after another; leaves meet in an aligned binary tree. The squares of
// a norm meet in such a tree too, neighbouring columns first.
constexpr int kLeaf = 32;
// F.normalize's default: a vector shorter than this is divided by it instead.
constexpr double kNormEps = 1e-12;
// x / norm is (x * scale) / (norm * scale), and norm * scale is the norm of x * scale^2, over the scale. The scale is
// this power of two where a squared norm overflows, its inverse where the norm is less than it, else 1.
constexpr float kNormScale32 = 0x1p-50f;
constexpr double kNormScale64 = 0x1p-300;

enum class DType : int { float16 = 0, bfloat16, float32, float64 };
FASTPOOL_HOST_DEVICE constexpr int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}
constexpr int64_t accumulator_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// int32 or int64 values, [n] of any stride; absent when data is null.
struct Indices {
  const void* data = nullptr;
  int64_t stride = 1;
  bool wide = true;
  FASTPOOL_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

// One value per token, [B, S] or [T] (batch stride 0); absent when data is null.
struct PerToken {
  const void* data = nullptr;
  int bytes = 1;                 // of a mask's element; a token is real where it is not zero
  bool boolean = true;           // of a mask: whether all that is not zero is one
  DType dtype = DType::float32;  // of a weight or a score
  int64_t batch_stride = 0, stride = 1;
};

// Vectors that tokens are multiplied by, `count` of them for each segment, all columns of hidden wide; absent when data
// is null. Where all segments have the same, the batch stride is 0.
struct Queries {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t count = 1;
  int64_t batch_stride = 0, stride = 0, column_stride = 1;
  double scale = 1;  // of the products
};

// Several modes of one read, whose vectors stand side by side in the result: `dim` columns of them are used.
struct Several {
  static constexpr int kMost = 15;
  int count = 0;
  Mode modes[kMost];
  int64_t dim = 0;
};

// A segment is the rows [begin, end) of one sequence. Padded and packed input differ in the batch stride alone: packed
// segments all start from the same row 0, so theirs is 0.
struct PoolCall {
  Mode mode;
  DType dtype = DType::float32, out_dtype = DType::float32;
  bool normalize = false;
  int64_t batch = 0, rows = 0, dim = 0;  // segments; S or T; columns used
  int64_t width = 0;                     // columns there are, all of which a query is multiplied by
  const void* hidden = nullptr;
  int64_t batch_stride = 0, row_stride = 0;  // elements
  Indices starts, ends;                      // absent: 0 and rows
  PerToken mask, weights, scores;
  Queries queries;
  const Several* several = nullptr;  // instead of `mode`
  void* out = nullptr;               // [batch, queries.count, dim], contiguous; of several: [batch, several->dim]
};

// l2_normalize: rows of x, any leading shape.
struct NormalizeCall {
  DType dtype = DType::float32, out_dtype = DType::float32;
  double eps = kNormEps;
  int64_t rows = 0, dim = 0;
  const void* x = nullptr;
  int leading = 0;  // leading dimensions
  const int64_t *sizes = nullptr, *strides = nullptr;
  Indices truncate_dims;  // columns of each row that are used, the others 0; absent: dim
  const int64_t* truncate_dims_strides = nullptr;
  void* out = nullptr;  // [rows, dim], contiguous
};

// Where row `row` has its own in a tensor of this leading shape.
FASTPOOL_INLINE int64_t offset_of(int64_t row, int leading, const int64_t* sizes, const int64_t* strides) {
  int64_t offset = 0;
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (int d = leading - 1; d >= 0; --d) {
    offset += row % sizes[d] * strides[d];
    row /= sizes[d];
  }
  return offset;
}

// truncate_dims' value at this offset. A CPU has checked it, a GPU cannot without waiting: it is clamped, so that
// nothing is read out of bounds.
FASTPOOL_INLINE int64_t dim_at(const NormalizeCall& call, int64_t offset) {
  const int64_t dim = call.truncate_dims[offset];
  return dim < 0 ? 0 : dim > call.dim ? call.dim : dim;
}

// Of which argument a gradient is, in the order of GRADIENTS_OF (python/fastpool/arguments.py).
enum class Of : uint8_t { hidden, query, weights, scores };

// The gradient of a pooling call's argument. `pool.hidden` is read where needs_result() alone, and pool.out never. A
// token of several segments adds up their shares in the order of segments, and of each one's queries.
struct PoolBackwardCall {
  PoolCall pool;
  bool padded = true;
  Of of = Of::hidden;
  const void* gradient = nullptr;  // like the result, contiguous, of the accumulator: the divisor still to come
  const void* result = nullptr;    // likewise, unrounded; where needs_result()
  // Like hidden, whose columns from pool.dim on get nothing of `gradient`; like weights or scores; or [batch,
  // queries.count, width] of the accumulator. Contiguous.
  void* out = nullptr;
  FASTPOOL_HOST_DEVICE bool per_token() const { return of == Of::weights || of == Of::scores; }
  FASTPOOL_HOST_DEVICE const PerToken& token_values() const { return of == Of::weights ? pool.weights : pool.scores; }
  // Which of the segment's tokens get a share is looked for in hidden, by the result.
  FASTPOOL_HOST_DEVICE bool finds_maximum() const { return of == Of::hidden && pool.mode.gradient_finds_maximum(); }
  FASTPOOL_HOST_DEVICE bool needs_result() const {
    return of != Of::hidden || pool.mode.gradient_finds_maximum() || pool.mode.takes_query();
  }
  int64_t out_rows() const { return padded ? pool.batch * pool.rows : pool.rows; }
};

// The gradient of l2_normalize's x.
struct NormalizeBackwardCall {
  NormalizeCall normalize;         // its out is not used
  int64_t width = 0;               // columns of x; those from dim on get zeros
  const void* gradient = nullptr;  // [rows, dim], contiguous, of the accumulator
  void* out = nullptr;             // [rows, width], contiguous
};

}  // namespace fastpool
