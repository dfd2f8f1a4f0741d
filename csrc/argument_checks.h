// What the arguments of several ops have in common: their way between a stack and their places, and their checks.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "arguments.h"

namespace fastpool {

class Take {
 public:
  explicit Take(StableIValue* stack) : at_(stack) {}
  void tensor(Tensor& tensor) { tensor = Tensor(value<AtenTensorHandle>()); }
  void optional(Tensor& tensor) {
    const auto handle = value<std::optional<AtenTensorHandle>>();
    tensor = handle ? Tensor(*handle) : Tensor();
  }
  template <class T>
  void plain(T& to) {
    to = value<T>();
  }

 private:
  template <class T>
  T value() {
    return torch::stable::detail::to<T>(*at_++);
  }
  StableIValue* at_;
};

class PutBack {
 public:
  explicit PutBack(StableIValue* stack) : at_(stack) {}
  void tensor(Tensor& tensor) { plain(tensor.release()); }
  void optional(Tensor& tensor) {
    plain(tensor ? std::optional<AtenTensorHandle>(tensor.release()) : std::optional<AtenTensorHandle>());
  }
  template <class T>
  void plain(const T& value) {
    *at_++ = torch::stable::detail::from(value);
  }

 private:
  StableIValue* at_;
};

inline DType required_dtype(int32_t torch_dtype, const char* argument) {
  const auto dtype = float_dtype(torch_dtype);
  require(dtype.has_value(), argument);
  return *dtype;
}

// Of bool and the integer types; 0 for any other.
inline int integer_bytes(int32_t dtype) {
  if (dtype == aoti_torch_dtype_int64() || dtype == aoti_torch_dtype_uint64()) return 8;
  if (dtype == aoti_torch_dtype_int32() || dtype == aoti_torch_dtype_uint32()) return 4;
  if (dtype == aoti_torch_dtype_int16() || dtype == aoti_torch_dtype_uint16()) return 2;
  if (dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_int8())
    return 1;
  return 0;
}

// The columns that are used: `truncate_dim`, or all.
inline int64_t columns(const std::optional<int64_t>& truncate_dim, int64_t width) {
  require(!truncate_dim || (*truncate_dim >= 1 && *truncate_dim <= width), "truncate_dim");
  return truncate_dim.value_or(width);
}
// The columns that a gradient [..., dim] says were used.
inline std::optional<int64_t> columns_of(const Tensor& gradient) {
  if (gradient.dim() == 0 || gradient.size(gradient.dim() - 1) == 0) return std::nullopt;
  return gradient.size(gradient.dim() - 1);
}

// Columns that do not stand side by side, as kernels read them, are copied so that they do.
inline void make_columns_contiguous(Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) <= 1 || x.stride(last) == 1) return;
  Tensor copy = empty(x.dim(), x.sizes(), x.dtype(), x.device());
  copy.copy_from(x);
  x = std::move(copy);
}

inline void require_leading(const Tensor& t, const Tensor& like, const char* argument) {
  bool same = t.dim() == like.dim() - 1;
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  require(same, argument);
}

// A gradient or a result, as autograd hands it to a backward op: of the accumulator, and contiguous.
inline const void* dense(const Tensor& t, const std::vector<int64_t>& shape, DType dtype, Device device,
                         const char* argument) {
  require(static_cast<bool>(t), argument);
  require(t.dtype() == torch_dtype(dtype == DType::float64 ? DType::float64 : DType::float32), argument);
  require(t.device() == device, argument);
  const auto rank = static_cast<int64_t>(shape.size());
  bool same = t.dim() == rank, contiguous = true, empty = false;
  for (int64_t d = 0; same && d < rank; ++d) same = t.size(d) == shape[d], empty |= shape[d] == 0;
  require(same, argument);
  int64_t stride = 1;
  for (int64_t d = rank - 1; d >= 0 && !empty; stride *= shape[d--])
    contiguous &= t.size(d) == 1 || t.stride(d) == stride;
  require(contiguous, argument);
  require(t.in_memory(accumulator_size(dtype)), argument);
  return t.data();
}

// [B, S] or [T], like hidden without its columns; each value has so many bytes.
inline PerToken per_token(const Tensor& t, const Tensor& hidden, int64_t bytes, const char* argument) {
  require_leading(t, hidden, argument);
  require(t.in_memory(bytes), argument);
  PerToken tokens;
  tokens.data = t.data();
  // An empty tensor may have no memory; it is present all the same.
  static const uint64_t none = 0;
  if (tokens.data == nullptr) tokens.data = &none;
  tokens.batch_stride = t.dim() == 2 ? t.stride(0) : 0;
  tokens.stride = t.stride(t.dim() - 1);
  return tokens;
}

// Of any shape; `stride` stays 1.
inline Indices index_values(const Tensor& t, const char* argument) {
  require(t.dtype() == aoti_torch_dtype_int32() || t.dtype() == aoti_torch_dtype_int64(), argument);
  require(t.in_memory(integer_bytes(t.dtype())), argument);
  Indices indices;
  indices.data = t.data();
  static const int64_t none = 0;
  if (indices.data == nullptr) indices.data = &none;
  indices.wide = integer_bytes(t.dtype()) == 8;
  return indices;
}
inline Indices indices(const Tensor& t, const char* argument) {
  Indices indices = index_values(t, argument);
  require(t.dim() == 1, argument);
  indices.stride = t.stride(0);
  return indices;
}

// [H] or [K, H] for every segment, or [B, K, H].
inline Queries queries(const Tensor& t, const PoolCall& call, double scale) {
  const int64_t rank = t.dim();
  require(rank >= 1 && rank <= 3 && t.size(rank - 1) == call.width, "query");
  require(rank < 3 || t.size(0) == call.batch, "query");
  Queries queries;
  queries.dtype = required_dtype(t.dtype(), "query");
  require(t.in_memory(size_of(queries.dtype)), "query");
  static const uint64_t none = 0;
  queries.data = t.data() == nullptr ? &none : t.data();
  queries.count = rank == 1 ? 1 : t.size(rank - 2);
  queries.batch_stride = rank == 3 ? t.stride(0) : 0;
  queries.stride = rank == 1 ? 0 : t.stride(rank - 2);
  queries.column_stride = t.stride(rank - 1);
  // In the accumulator's precision it would be infinite, which a number that is so from the start may be.
  const double largest =
      call.dtype == DType::float64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  require(std::abs(scale) <= largest || !std::isfinite(scale), "scale");
  queries.scale = scale;
  return queries;
}

}  // namespace fastpool
