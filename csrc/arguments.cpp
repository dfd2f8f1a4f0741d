#include "arguments.h"

#include <cstdio>
#include <vector>

namespace fastpool {
namespace {

template <class T>
T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}
Tensor take_tensor(StableIValue value) { return Tensor(take<AtenTensorHandle>(value)); }
Tensor take_optional_tensor(StableIValue value) {
  const auto handle = take<std::optional<AtenTensorHandle>>(value);
  return handle ? Tensor(*handle) : Tensor();
}

// How messages start.
std::string prefix(const char* op) { return std::string("fastpool.") + op; }

std::string list(const int64_t* values, int64_t n) {
  std::string text = "[";
  for (int64_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// As torch prints it.
std::string device_name(Device device) {
  const std::pair<int32_t, const char*> names[] = {{aoti_torch_device_type_cpu(), "cpu"},
                                                   {aoti_torch_device_type_cuda(), "cuda"},
                                                   {aoti_torch_device_type_meta(), "meta"},
                                                   {aoti_torch_device_type_xpu(), "xpu"},
                                                   {aoti_torch_device_type_mps(), "mps"}};
  for (const auto& [type, name] : names)
    if (type == device.type) return name + (device.index < 0 ? "" : ":" + std::to_string(device.index));
  return "device type " + std::to_string(device.type);
}

// The columns that are used: `truncate_dim`, or all.
int64_t columns(const std::optional<int64_t>& truncate_dim, int64_t width, const char* op) {
  check(!truncate_dim || (*truncate_dim >= 1 && *truncate_dim <= width), [&] {
    return prefix(op) + ": truncate_dim must lie between 1 and the last dimension, " + std::to_string(width) +
           ", got " + std::to_string(truncate_dim.value_or(0));
  });
  return truncate_dim.value_or(width);
}

DType required_dtype(int32_t torch_dtype, const char* name, const char* op) {
  const auto dtype = float_dtype(torch_dtype);
  check(dtype.has_value(), [&] {
    return prefix(op) + ": " + name + " must be float16, bfloat16, float32 or float64, got " + dtype_name(torch_dtype);
  });
  return *dtype;
}

void check_contiguous_columns(const Tensor& x, const char* name, const char* op) {
  const int64_t last = x.dim() - 1;
  check(x.size(last) <= 1 || x.stride(last) == 1, [&] {
    return prefix(op) + ": " + name + " must be contiguous in its last dimension, got strides " +
           list(x.strides(), x.dim());
  });
}

void check_device(const Tensor& t, const char* name, const Tensor& like, const char* input, const char* op) {
  check(t.device() == like.device(), [&] {
    return prefix(op) + ": " + name + " must be on " + input + "'s device, " + device_name(like.device()) + ", got " +
           device_name(t.device());
  });
}

// A gradient or a result, as autograd hands it to a backward op: of the accumulator, and contiguous.
const void* dense(const Tensor& t, const char* name, const std::vector<int64_t>& shape, DType dtype, const Tensor& like,
                  const char* input, const char* op) {
  check(static_cast<bool>(t), [&] { return prefix(op) + ": " + name + " must be a torch.Tensor, got NoneType"; });
  const int32_t expected = torch_dtype(dtype == DType::float64 ? DType::float64 : DType::float32);
  check(t.dtype() == expected, [&] {
    return prefix(op) + ": " + name + " must be " + dtype_name(expected) + ", got " + dtype_name(t.dtype());
  });
  check_device(t, name, like, input, op);
  const auto rank = static_cast<int64_t>(shape.size());
  bool same = t.dim() == rank, contiguous = true, empty = false;
  for (int64_t d = 0; same && d < rank; ++d) same = t.size(d) == shape[d], empty |= shape[d] == 0;
  check(same, [&] {
    return prefix(op) + ": " + name + " must have shape " + list(shape.data(), rank) + ", got " + t.shape();
  });
  int64_t stride = 1;
  for (int64_t d = rank - 1; d >= 0 && !empty; stride *= shape[d--])
    contiguous &= t.size(d) == 1 || t.stride(d) == stride;
  check(contiguous,
        [&] { return prefix(op) + ": " + name + " must be contiguous, got strides " + list(t.strides(), rank); });
  return t.data();
}
// The columns that a gradient [..., dim] says were used.
std::optional<int64_t> columns_of(const Tensor& gradient) {
  if (gradient.dim() == 0 || gradient.size(gradient.dim() - 1) == 0) return std::nullopt;
  return gradient.size(gradient.dim() - 1);
}

void check_leading(const Tensor& t, const char* name, const Tensor& like, const char* input, const char* op) {
  bool same = t.dim() == like.dim() - 1;
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  check(same, [&] {
    return prefix(op) + ": " + name + " must have " + input + "'s shape without its last dimension, " +
           list(like.sizes(), like.dim() - 1) + ", got " + t.shape();
  });
}

// [B, S] or [T], like hidden without its columns.
PerToken per_token(const Tensor& t, const Tensor& hidden, const char* name, const char* op) {
  check_leading(t, name, hidden, "hidden", op);
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
Indices index_values(const Tensor& t, const char* name, const char* op) {
  check(t.dtype() == aoti_torch_dtype_int32() || t.dtype() == aoti_torch_dtype_int64(),
        [&] { return prefix(op) + ": " + name + " must be int32 or int64, got " + dtype_name(t.dtype()); });
  Indices indices;
  indices.data = t.data();
  static const int64_t none = 0;
  if (indices.data == nullptr) indices.data = &none;
  indices.wide = integer_bytes(t.dtype()) == 8;
  return indices;
}
Indices indices(const Tensor& t, const char* name, const char* op) {
  Indices indices = index_values(t, name, op);
  check(t.dim() == 1, [&] { return prefix(op) + ": " + name + " must have one dimension, got shape " + t.shape(); });
  indices.stride = t.stride(0);
  return indices;
}

}  // namespace

std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {{aoti_torch_dtype_bool(), "bool"},
                                                   {aoti_torch_dtype_uint8(), "uint8"},
                                                   {aoti_torch_dtype_int8(), "int8"},
                                                   {aoti_torch_dtype_uint16(), "uint16"},
                                                   {aoti_torch_dtype_int16(), "int16"},
                                                   {aoti_torch_dtype_uint32(), "uint32"},
                                                   {aoti_torch_dtype_int32(), "int32"},
                                                   {aoti_torch_dtype_uint64(), "uint64"},
                                                   {aoti_torch_dtype_int64(), "int64"},
                                                   {aoti_torch_dtype_float16(), "float16"},
                                                   {aoti_torch_dtype_bfloat16(), "bfloat16"},
                                                   {aoti_torch_dtype_float32(), "float32"},
                                                   {aoti_torch_dtype_float64(), "float64"},
                                                   {aoti_torch_dtype_complex32(), "complex32"},
                                                   {aoti_torch_dtype_complex64(), "complex64"},
                                                   {aoti_torch_dtype_complex128(), "complex128"},
                                                   {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
                                                   {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
                                                   {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
                                                   {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"}};
  for (const auto& [code, name] : names)
    if (code == dtype) return name;
  return "dtype " + std::to_string(dtype);
}

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

int integer_bytes(int32_t dtype) {
  if (dtype == aoti_torch_dtype_int64() || dtype == aoti_torch_dtype_uint64()) return 8;
  if (dtype == aoti_torch_dtype_int32() || dtype == aoti_torch_dtype_uint32()) return 4;
  if (dtype == aoti_torch_dtype_int16() || dtype == aoti_torch_dtype_uint16()) return 2;
  if (dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_int8())
    return 1;
  return 0;
}

std::string Tensor::shape() const { return list(sizes_, dim_); }

PoolArguments::PoolArguments(StableIValue* stack, bool takes_weights) {
  // Everything on the stack is owned here, so nothing may throw before all of it has been taken.
  int i = 0;
  hidden = take_tensor(stack[i++]);
  mask = take_optional_tensor(stack[i++]);
  cu_seqlens = take_optional_tensor(stack[i++]);
  if (takes_weights) weights = take_optional_tensor(stack[i++]);
  starts = take_optional_tensor(stack[i++]);
  ends = take_optional_tensor(stack[i++]);
  truncate_dim = take<std::optional<int64_t>>(stack[i++]);
  normalize = take<bool>(stack[i++]);
  out_dtype = take<std::optional<int32_t>>(stack[i++]);
}

PoolCall PoolArguments::call(Mode mode, const char* op) const {
  PoolCall call;
  call.mode = mode;
  call.normalize = normalize;
  call.dtype = required_dtype(hidden.dtype(), "hidden", op);
  check(hidden.dim() == 2 || hidden.dim() == 3,
        [&] { return prefix(op) + ": hidden must be padded [B, S, H] or packed [T, H], got shape " + hidden.shape(); });
  check_contiguous_columns(hidden, "hidden", op);
  call.dim = columns(truncate_dim, hidden.size(hidden.dim() - 1), op);
  call.out_dtype = out_dtype ? required_dtype(*out_dtype, "out_dtype", op) : call.dtype;

  const Device device = hidden.device();
  const auto same_device = [&](const Tensor& t, const char* name) {
    check(!t || t.device() == device, [&] {
      return prefix(op) + ": " + name + " must be on hidden's device, " + device_name(device) + ", got " +
             device_name(t.device());
    });
  };
  same_device(mask, "mask");
  same_device(cu_seqlens, "cu_seqlens");
  same_device(weights, "weights");
  same_device(starts, "starts");
  same_device(ends, "ends");

  const bool padded = hidden.dim() == 3;
  call.rows = hidden.size(hidden.dim() - 2);
  call.row_stride = hidden.stride(hidden.dim() - 2);
  call.batch_stride = padded ? hidden.stride(0) : 0;
  call.hidden = hidden.data();
  if (mask) {
    call.mask = per_token(mask, hidden, "mask", op);
    call.mask.bytes = integer_bytes(mask.dtype());
    check(call.mask.bytes != 0, [&] {
      return prefix(op) + ": mask must be bool or an integer type whose non-zero values are real tokens, got " +
             dtype_name(mask.dtype()) + "; an additive mask (0 / -inf) read that way would pick the padding";
    });
  }
  if (weights) {
    call.weights = per_token(weights, hidden, "weights", op);
    call.weights.dtype = required_dtype(weights.dtype(), "weights", op);
  }

  check(!(padded && cu_seqlens),
        [&] { return prefix(op) + ": cu_seqlens goes with packed [T, H] hidden, got shape " + hidden.shape(); });
  check(padded || cu_seqlens || (starts && ends), [&] {
    return prefix(op) + ": packed [T, H] hidden needs cu_seqlens, or starts and ends, got " +
           (starts ? "starts alone"
            : ends ? "ends alone"
                   : "none of them");
  });
  check(!(cu_seqlens && (starts || ends)), [&] {
    return prefix(op) + ": cu_seqlens already says where segments start and end, got " +
           (starts && ends ? "starts and ends"
            : starts       ? "starts"
                           : "ends") +
           " too";
  });
  if (cu_seqlens) {
    call.starts = indices(cu_seqlens, "cu_seqlens", op);
    check(cu_seqlens.size(0) >= 1, [&] { return prefix(op) + ": cu_seqlens must have B + 1 values, got none"; });
    call.batch = cu_seqlens.size(0) - 1;
    call.ends = call.starts;
    call.ends.data = static_cast<const char*>(call.starts.data) + call.starts.stride * (call.starts.wide ? 8 : 4);
  } else {
    if (starts) call.starts = indices(starts, "starts", op);
    if (ends) call.ends = indices(ends, "ends", op);
    call.batch = padded ? hidden.size(0) : starts.size(0);
    const auto length = [&](const Tensor& t, const char* name) {
      check(!t || t.size(0) == call.batch, [&] {
        return prefix(op) + ": " + name + " must have " + std::to_string(call.batch) +
               (padded ? " values, one for each row of hidden, got " : " values, as starts has, got ") +
               std::to_string(t ? t.size(0) : 0);
      });
    };
    length(starts, "starts");
    length(ends, "ends");
  }
  return call;
}

Tensor PoolArguments::output(const PoolCall& call) const {
  const int64_t sizes[] = {call.batch, call.dim};
  return empty(2, sizes, torch_dtype(call.out_dtype), hidden.device());
}

NormalizeArguments::NormalizeArguments(StableIValue* stack) {
  x = take_tensor(stack[0]);
  truncate_dim = take<std::optional<int64_t>>(stack[1]);
  truncate_dims = take_optional_tensor(stack[2]);
  eps = take<double>(stack[3]);
  out_dtype = take<std::optional<int32_t>>(stack[4]);
}

NormalizeCall NormalizeArguments::call(const char* op) const {
  NormalizeCall call;
  call.dtype = required_dtype(x.dtype(), "x", op);
  check(x.dim() >= 1, [&] { return prefix(op) + ": x must have at least one dimension, got shape []"; });
  // As most of torch's own ops; a view may have more, and kernels have room for as many.
  check(x.dim() <= 64,
        [&] { return prefix(op) + ": x must have at most 64 dimensions, got " + std::to_string(x.dim()); });
  check_contiguous_columns(x, "x", op);
  call.dim = columns(truncate_dim, x.size(x.dim() - 1), op);
  call.out_dtype = out_dtype ? required_dtype(*out_dtype, "out_dtype", op) : call.dtype;
  check(eps >= 0, [&] {
    char text[32];
    std::snprintf(text, sizeof text, "%g", eps);
    return prefix(op) + ": eps must be at least 0, got " + text;
  });
  call.eps = eps;
  call.x = x.data();
  call.leading = static_cast<int>(x.dim() - 1);
  call.sizes = x.sizes();
  call.strides = x.strides();
  call.rows = 1;
  for (int d = 0; d < call.leading; ++d) call.rows *= x.size(d);
  if (truncate_dims) {
    check_device(truncate_dims, "truncate_dims", x, "x", op);
    call.truncate_dims = index_values(truncate_dims, "truncate_dims", op);
    check_leading(truncate_dims, "truncate_dims", x, "x", op);
    call.truncate_dims_strides = truncate_dims.strides();
  }
  return call;
}

Tensor NormalizeArguments::output(const NormalizeCall& call) const {
  std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  sizes.back() = call.dim;
  return empty(x.dim(), sizes.data(), torch_dtype(call.out_dtype), x.device());
}

PoolBackwardArguments::PoolBackwardArguments(StableIValue* stack) {
  gradient = take_tensor(stack[0]);
  pool.hidden = take_tensor(stack[1]);
  pool.mask = take_optional_tensor(stack[2]);
  pool.cu_seqlens = take_optional_tensor(stack[3]);
  pool.weights = take_optional_tensor(stack[4]);
  pool.starts = take_optional_tensor(stack[5]);
  pool.ends = take_optional_tensor(stack[6]);
  result = take_optional_tensor(stack[7]);
  pool.truncate_dim = columns_of(gradient);
}

PoolBackwardCall PoolBackwardArguments::call(Mode mode, bool of_weights, const char* op) const {
  PoolBackwardCall call;
  call.pool = pool.call(mode, op);
  call.padded = pool.hidden.dim() == 3;
  call.of_weights = of_weights;
  call.width = pool.hidden.size(pool.hidden.dim() - 1);
  check(!of_weights || pool.weights, [&] { return prefix(op) + ": weights must be given"; });
  const std::vector<int64_t> shape = {call.pool.batch, call.pool.dim};
  call.gradient = dense(gradient, "gradient", shape, call.pool.dtype, pool.hidden, "hidden", op);
  if (of_weights || mode == Mode::max)
    call.result = dense(result, "result", shape, call.pool.dtype, pool.hidden, "hidden", op);
  return call;
}

Tensor PoolBackwardArguments::output(bool of_weights) const {
  const Tensor& of = of_weights ? pool.weights : pool.hidden;
  return empty(of.dim(), of.sizes(), of.dtype(), of.device());
}

NormalizeBackwardArguments::NormalizeBackwardArguments(StableIValue* stack) {
  gradient = take_tensor(stack[0]);
  normalize.x = take_tensor(stack[1]);
  normalize.eps = take<double>(stack[2]);
  normalize.truncate_dims = take_optional_tensor(stack[3]);
  normalize.truncate_dim = columns_of(gradient);
}

NormalizeBackwardCall NormalizeBackwardArguments::call(const char* op) const {
  NormalizeBackwardCall call;
  call.normalize = normalize.call(op);
  const Tensor& x = normalize.x;
  call.width = x.size(x.dim() - 1);
  std::vector<int64_t> shape(x.sizes(), x.sizes() + x.dim());
  shape.back() = call.normalize.dim;
  call.gradient = dense(gradient, "gradient", shape, call.normalize.dtype, x, "x", op);
  return call;
}

Tensor NormalizeBackwardArguments::output() const {
  const Tensor& x = normalize.x;
  return empty(x.dim(), x.sizes(), x.dtype(), x.device());
}

Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype, Device device) {
  int64_t strides[64];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  check_api(aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle), "an output");
  return Tensor(handle);
}

}  // namespace fastpool
