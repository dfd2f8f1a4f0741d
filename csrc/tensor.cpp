// Dtypes of torch's, and new tensors.
#include "argument_checks.h"

namespace fastpool {

std::optional<DType> float_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return DType::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::float16;
  if (dtype == aoti_torch_dtype_float64()) return DType::float64;
  return std::nullopt;
}

int32_t torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::float16: return aoti_torch_dtype_float16();
    case DType::bfloat16: return aoti_torch_dtype_bfloat16();
    case DType::float32: return aoti_torch_dtype_float32();
    default: return aoti_torch_dtype_float64();
  }
}

Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype, Device device) {
  int64_t strides[64];
  const auto floating = float_dtype(dtype);
  int64_t stride = 1, bytes = floating ? size_of(*floating) : integer_bytes(dtype);
  bool countable = true;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    const int64_t size = sizes[d] > 1 ? sizes[d] : 1;
    countable &= !__builtin_mul_overflow(bytes, size, &bytes);
    if (countable) stride *= size;
  }
  AtenTensorHandle handle = nullptr;
  if (!countable || aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle) != 0)
    throw NoMemory{countable ? bytes : INT64_MAX, countable};
  return Tensor(handle);
}

}  // namespace fastpool
