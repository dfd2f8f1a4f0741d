#include "arguments.h"

#include <vector>

#include "state.h"

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

namespace {

DType required_dtype(int32_t torch_dtype, const char* argument) {
  const auto dtype = float_dtype(torch_dtype);
  require(dtype.has_value(), argument);
  return *dtype;
}

// Of bool and the integer types; 0 for any other.
int integer_bytes(int32_t dtype) {
  if (dtype == aoti_torch_dtype_int64() || dtype == aoti_torch_dtype_uint64()) return 8;
  if (dtype == aoti_torch_dtype_int32() || dtype == aoti_torch_dtype_uint32()) return 4;
  if (dtype == aoti_torch_dtype_int16() || dtype == aoti_torch_dtype_uint16()) return 2;
  if (dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_int8())
    return 1;
  return 0;
}

// The columns that are used: `truncate_dim`, or all.
int64_t columns(const std::optional<int64_t>& truncate_dim, int64_t width) {
  require(!truncate_dim || (*truncate_dim >= 1 && *truncate_dim <= width), "truncate_dim");
  return truncate_dim.value_or(width);
}
// The columns that a gradient [..., dim] says were used.
std::optional<int64_t> columns_of(const Tensor& gradient) {
  if (gradient.dim() == 0 || gradient.size(gradient.dim() - 1) == 0) return std::nullopt;
  return gradient.size(gradient.dim() - 1);
}

// Columns that do not stand side by side, as kernels read them, are copied so that they do.
void make_columns_contiguous(Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) <= 1 || x.stride(last) == 1) return;
  Tensor copy = empty(x.dim(), x.sizes(), x.dtype(), x.device());
  copy.copy_from(x);
  x = std::move(copy);
}

void require_leading(const Tensor& t, const Tensor& like, const char* argument) {
  bool same = t.dim() == like.dim() - 1;
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  require(same, argument);
}

// A gradient or a result, as autograd hands it to a backward op: of the accumulator, and contiguous.
const void* dense(const Tensor& t, const std::vector<int64_t>& shape, DType dtype, Device device,
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
PerToken per_token(const Tensor& t, const Tensor& hidden, int64_t bytes, const char* argument) {
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
Indices index_values(const Tensor& t, const char* argument) {
  require(t.dtype() == aoti_torch_dtype_int32() || t.dtype() == aoti_torch_dtype_int64(), argument);
  require(t.in_memory(integer_bytes(t.dtype())), argument);
  Indices indices;
  indices.data = t.data();
  static const int64_t none = 0;
  if (indices.data == nullptr) indices.data = &none;
  indices.wide = integer_bytes(t.dtype()) == 8;
  return indices;
}
Indices indices(const Tensor& t, const char* argument) {
  Indices indices = index_values(t, argument);
  require(t.dim() == 1, argument);
  indices.stride = t.stride(0);
  return indices;
}

// [H] or [K, H] for every segment, or [B, K, H].
Queries queries(const Tensor& t, const PoolCall& call, double scale) {
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
  queries.scale = scale;
  return queries;
}

}  // namespace

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

// ---- pooling: in the schema's order
template <class Move>
void PoolArguments::move(Move move) {
  move.tensor(hidden);
  if (mode->takes_query()) move.tensor(query);
  move.optional(mask);
  move.optional(cu_seqlens);
  if (mode->takes_weights()) move.optional(weights);
  if (mode->takes_scores()) move.optional(scores);
  move.optional(starts);
  move.optional(ends);
  if (mode->takes_query()) move.plain(scale);
  move.plain(truncate_dim);
  move.plain(normalize);
  move.plain(out_dtype);
}
PoolArguments::PoolArguments(const Mode& m, StableIValue* stack) : mode(&m) { move(Take(stack)); }
void PoolArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

PoolCall PoolArguments::call(const std::optional<int64_t>& truncate_dim) {
  PoolCall call;
  call.mode = *mode;
  call.normalize = normalize;
  call.dtype = required_dtype(hidden.dtype(), "hidden");
  require(hidden.dim() == 2 || hidden.dim() == 3, "hidden");
  call.width = hidden.size(hidden.dim() - 1);
  call.dim = columns(truncate_dim, call.width);
  call.out_dtype = out_dtype ? required_dtype(*out_dtype, "out_dtype") : call.dtype;

  const Device device = hidden.device();
  const auto require_device = [&](const Tensor& t, const char* argument) {
    require(!t || t.device() == device, argument);
  };
  require_device(mask, "mask");
  require_device(cu_seqlens, "cu_seqlens");
  require_device(weights, "weights");
  require_device(scores, "scores");
  require_device(query, "query");
  require_device(starts, "starts");
  require_device(ends, "ends");

  const bool padded = hidden.dim() == 3;
  call.rows = hidden.size(hidden.dim() - 2);
  if (mask) {
    const int bytes = integer_bytes(mask.dtype());
    require(bytes != 0, "mask");
    call.mask = per_token(mask, hidden, bytes, "mask");
    call.mask.bytes = bytes;
    call.mask.boolean = mask.dtype() == aoti_torch_dtype_bool();
  }
  const auto values = [&](const Tensor& t, const char* argument) {
    if (!t) return PerToken{};
    const DType dtype = required_dtype(t.dtype(), argument);
    PerToken values = per_token(t, hidden, size_of(dtype), argument);
    values.dtype = dtype;
    return values;
  };
  call.weights = values(weights, "weights");
  call.scores = values(scores, "scores");
  require(scores || !mode->takes_scores(), "scores");
  require(query || !mode->takes_query(), "query");

  require(!(padded && cu_seqlens) && (padded || cu_seqlens || (starts && ends)), "cu_seqlens");
  require(!(cu_seqlens && (starts || ends)), "cu_seqlens");
  if (cu_seqlens) {
    call.starts = indices(cu_seqlens, "cu_seqlens");
    require(cu_seqlens.size(0) >= 1, "cu_seqlens");
    call.batch = cu_seqlens.size(0) - 1;
    call.ends = call.starts;
    call.ends.data = static_cast<const char*>(call.starts.data) + call.starts.stride * (call.starts.wide ? 8 : 4);
  } else {
    if (starts) call.starts = indices(starts, "starts");
    if (ends) call.ends = indices(ends, "ends");
    call.batch = padded ? hidden.size(0) : starts.size(0);
    require(!starts || starts.size(0) == call.batch, "starts");
    require(!ends || ends.size(0) == call.batch, "ends");
  }

  if (query) call.queries = queries(query, call, scale);

  require(hidden.in_memory(size_of(call.dtype)), "hidden");
  make_columns_contiguous(hidden);
  call.row_stride = hidden.stride(hidden.dim() - 2);
  call.batch_stride = padded ? hidden.stride(0) : 0;
  call.hidden = hidden.data();
  return call;
}

std::vector<int64_t> PoolArguments::shape(const PoolCall& call) const {
  if (!query || query.dim() == 1) return {call.batch, call.dim};
  return {call.batch, call.queries.count, call.dim};
}
Tensor PoolArguments::output(const PoolCall& call) const {
  const std::vector<int64_t> sizes = shape(call);
  return empty(static_cast<int64_t>(sizes.size()), sizes.data(), torch_dtype(call.out_dtype), hidden.device());
}

// ---- several modes
template <class Move>
void PoolSeveralArguments::move(Move move) {
  move.plain(modes);
  move.tensor(pool.hidden);
  move.optional(pool.mask);
  move.optional(pool.cu_seqlens);
  move.optional(pool.weights);
  move.optional(pool.scores);
  move.optional(pool.starts);
  move.optional(pool.ends);
  move.plain(pool.truncate_dim);
  move.plain(pool.normalize);
  move.plain(pool.out_dtype);
}
PoolSeveralArguments::PoolSeveralArguments(StableIValue* stack) { move(Take(stack)); }
void PoolSeveralArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

PoolCall PoolSeveralArguments::call() {
  static constexpr Mode all{};
  for (auto left = static_cast<uint64_t>(modes); left != 0; left >>= 4) {
    const int place = static_cast<int>(left & 15) - 1;
    require(place >= 0 && place < kModeCount && several.count < Several::kMost, "modes");
    // The others are left to Python, where each is a call of its own.
    require(!kModes[place].softmax(), "modes");
    several.modes[several.count++] = kModes[place];
  }
  const StatesOfSeveral states(several);
  require(states.count() > 0, "modes");
  pool.mode = &all;
  PoolCall call = pool.call(std::nullopt);
  several.dim = columns(pool.truncate_dim, several.count * call.width);
  call.several = &several;
  call.queries.count = states.count();
  return call;
}

Tensor PoolSeveralArguments::output(const PoolCall& call) const {
  const int64_t sizes[] = {call.batch, several.dim};
  return empty(2, sizes, torch_dtype(call.out_dtype), pool.hidden.device());
}

// ---- l2_normalize
template <class Move>
void NormalizeArguments::move(Move move) {
  move.tensor(x);
  move.plain(truncate_dim);
  move.optional(truncate_dims);
  move.plain(eps);
  move.plain(out_dtype);
}
NormalizeArguments::NormalizeArguments(StableIValue* stack) { move(Take(stack)); }
void NormalizeArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

NormalizeCall NormalizeArguments::call() {
  NormalizeCall call;
  call.dtype = required_dtype(x.dtype(), "x");
  // At most as many dimensions as most of torch's own ops take; kernels have room for as many.
  require(x.dim() >= 1 && x.dim() <= 64, "x");
  call.dim = columns(truncate_dim, x.size(x.dim() - 1));
  call.out_dtype = out_dtype ? required_dtype(*out_dtype, "out_dtype") : call.dtype;
  require(eps >= 0, "eps");
  call.eps = eps;
  call.leading = static_cast<int>(x.dim() - 1);
  call.rows = 1;
  for (int d = 0; d < call.leading; ++d) call.rows *= x.size(d);
  if (truncate_dims) {
    require(truncate_dims.device() == x.device(), "truncate_dims");
    call.truncate_dims = index_values(truncate_dims, "truncate_dims");
    require_leading(truncate_dims, x, "truncate_dims");
    call.truncate_dims_strides = truncate_dims.strides();
  }

  require(x.in_memory(size_of(call.dtype)), "x");
  make_columns_contiguous(x);
  call.x = x.data();
  call.sizes = x.sizes();
  call.strides = x.strides();
  return call;
}

Tensor NormalizeArguments::output(const NormalizeCall& call) const {
  std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  sizes.back() = call.dim;
  return empty(x.dim(), sizes.data(), torch_dtype(call.out_dtype), x.device());
}

// ---- the gradient of pooling
template <class Move>
void PoolBackwardArguments::move(Move move) {
  move.plain(mode);
  move.plain(of);
  move.tensor(gradient);
  move.tensor(pool.hidden);
  move.optional(pool.query);
  move.optional(pool.mask);
  move.optional(pool.cu_seqlens);
  move.optional(pool.weights);
  move.optional(pool.scores);
  move.optional(pool.starts);
  move.optional(pool.ends);
  move.plain(pool.scale);
  move.optional(result);
}
PoolBackwardArguments::PoolBackwardArguments(StableIValue* stack) { move(Take(stack)); }
void PoolBackwardArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

PoolBackwardCall PoolBackwardArguments::call() {
  require(mode >= 0 && mode < kModeCount, "mode");
  pool.mode = &kModes[mode];
  pool.truncate_dim = columns_of(gradient);
  PoolBackwardCall call;
  call.pool = pool.call();
  call.padded = pool.hidden.dim() == 3;
  require(of >= 0 && of <= static_cast<int64_t>(Of::scores), "of");
  call.of = static_cast<Of>(of);
  require(call.of == Of::hidden || (call.of == Of::weights && pool.weights && pool.mode->takes_weights()) ||
              (call.of == Of::scores && pool.mode->takes_scores()) ||
              (call.of == Of::query && pool.mode->takes_query()),
          "of");
  const std::vector<int64_t> shape = pool.shape(call.pool);
  const Device device = pool.hidden.device();
  call.gradient = dense(gradient, shape, call.pool.dtype, device, "gradient");
  if (call.needs_result() || result) call.result = dense(result, shape, call.pool.dtype, device, "result");
  return call;
}

Tensor PoolBackwardArguments::output(const PoolBackwardCall& call) const {
  if (call.of == Of::query) {
    const int64_t sizes[] = {call.pool.batch, call.pool.queries.count, call.pool.width};
    return empty(3, sizes, gradient.dtype(), gradient.device());
  }
  const Tensor& like = call.of == Of::weights ? pool.weights : call.of == Of::scores ? pool.scores : pool.hidden;
  return empty(like.dim(), like.sizes(), like.dtype(), like.device());
}

// ---- the gradient of l2_normalize
template <class Move>
void NormalizeBackwardArguments::move(Move move) {
  move.tensor(gradient);
  move.tensor(normalize.x);
  move.plain(normalize.eps);
  move.optional(normalize.truncate_dims);
}
NormalizeBackwardArguments::NormalizeBackwardArguments(StableIValue* stack) { move(Take(stack)); }
void NormalizeBackwardArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

NormalizeBackwardCall NormalizeBackwardArguments::call() {
  normalize.truncate_dim = columns_of(gradient);
  NormalizeBackwardCall call;
  call.normalize = normalize.call();
  const Tensor& x = normalize.x;
  call.width = x.size(x.dim() - 1);
  std::vector<int64_t> shape(x.sizes(), x.sizes() + x.dim());
  shape.back() = call.normalize.dim;
  call.gradient = dense(gradient, shape, call.normalize.dtype, x.device(), "gradient");
  return call;
}

Tensor NormalizeBackwardArguments::output() const {
  const Tensor& x = normalize.x;
  return empty(x.dim(), x.sizes(), x.dtype(), x.device());
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
