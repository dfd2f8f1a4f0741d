// Fills the CUDA key of the ops that python/fastpool/ops.py defines; a library of its own, loaded where torch has CUDA.
// A call is checked, given memory and launched, on the tensors' device and its current stream, without waiting for it.
#include <algorithm>

#include "counters.h"
#include "ops.h"

// Tests run this file on CPU tensors, under another name (tests/cpp/cuda_host).
#if !defined(FASTPOOL_OPS)
#define FASTPOOL_OPS fastpool
#define FASTPOOL_KEY CUDA
#endif

namespace fastpool {
namespace {

using namespace cuda;

const DTypeKernels& kernels(DType dtype) {
  switch (dtype) {
    case DType::float16: return kernels_float16;
    case DType::bfloat16: return kernels_bfloat16;
    case DType::float32: return kernels_float32;
    default: return kernels_float64;
  }
}

DType accumulator(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

template <class Rows, class Call>
Rows rows_of(const Call& call) {
  Rows rows;
  rows.call = call;
  const int64_t size = size_of(call.dtype), alignment = size * 4 < 16 ? size * 4 : 16;
  int64_t at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(call.x));
  for (int d = 0; d < call.leading; ++d) {
    rows.sizes[d] = call.sizes[d], rows.strides[d] = call.strides[d];
    at |= call.strides[d] * size;
  }
  rows.aligned = at % alignment == 0;
  return rows;
}
Rows rows_of(const NormalizeCall& call) {
  Rows rows = rows_of<Rows>(call);
  for (int d = 0; call.truncate_dims.data != nullptr && d < call.leading; ++d)
    rows.truncate_dims_strides[d] = call.truncate_dims_strides[d];
  return rows;
}
QuantizeRows rows_of(const QuantizeCall& call) {
  QuantizeRows rows = rows_of<QuantizeRows>(call);
  rows.ranges_aligned = (reinterpret_cast<uintptr_t>(call.low) | reinterpret_cast<uintptr_t>(call.high)) % 16 == 0;
  return rows;
}

void run(const NormalizeCall& call, cudaStream_t stream) {
  if (call.rows == 0 || call.dim == 0) return;
  check_cuda(kernels(call.dtype).normalize(rows_of(call), stream));
}

void run(const NormalizeBackwardCall& call, cudaStream_t stream) {
  const NormalizeCall& forward = call.normalize;
  if (forward.rows == 0 || forward.dim == 0) return;
  const bool aligned = forward.dim % kQuad == 0 && reinterpret_cast<uintptr_t>(call.gradient) % 16 == 0;
  const RowGradients gradients = {call.width, aligned, call.gradient, call.out};
  check_cuda(kernels(forward.dtype).normalize_backward(rows_of(forward), gradients, stream));
}

void run(const QuantizeCall& call, cudaStream_t stream) {
  if (call.rows == 0 || call.dim == 0) return;
  check_cuda(kernels(call.dtype).quantize(rows_of(call), stream));
}

void check_grid(int64_t blocks, int64_t strips) {
  if (blocks > INT32_MAX || strips > 65535)
    throw std::runtime_error("fastpool: more segments or columns than a GPU's grid can hold");
}

int64_t results_of(const PoolCall& call) { return call.batch * call.queries.count; }

// The kernels read queries in the accumulator's dtype, their columns side by side. Where these are not so, a copy is,
// which lives as long as what is returned.
Tensor with_plain_queries(PoolCall& call, const Tensor& query) {
  Queries& queries = call.queries;
  if (!query || call.width * results_of(call) == 0) return {};
  if (queries.dtype == accumulator(call.dtype) && queries.column_stride == 1) return {};
  queries.dtype = accumulator(call.dtype);
  Tensor plain = empty(query.dim(), query.sizes(), torch_dtype(queries.dtype), query.device());
  plain.copy_from(query);
  queries.data = plain.data();
  queries.column_stride = 1, queries.stride = call.width;
  if (queries.batch_stride != 0) queries.batch_stride = queries.count * call.width;
  return plain;
}

void reduce(const PoolCall& call, const PoolPlan& plan, const Prologue& prologue, const OnDevice& device) {
  check_grid(plan.programs, plan.strips);
  const auto launch = [&](Workspace workspace) {
    workspace.prologue = prologue;
    check_cuda(kernels(call.dtype).pool(call, plan, workspace, device.stream()));
  };
  if (!plan.partial()) return launch({});
  const Tensor memory = device.memory(plan.bytes);
  char* const at = static_cast<char*>(memory.mutable_data());
  with_counters(device, plan.programs * plan.strips, [&](const Counters& counters) {
    launch({at, reinterpret_cast<UnitTotals*>(at + plan.totals), counters, {}});
  });
}

void run(const PoolCall& call, bool cu, const OnDevice& device) {
  const int64_t results = results_of(call);
  if (results == 0 || call.dim == 0) return;
  const PoolPlan plan = make_plan(call, cu, device.properties());
  if (plan.strips == 1 || !call.normalize) return reduce(call, plan, {}, device);

  // The norm needs all columns, which no block has: it is taken of the unrounded result.
  PoolCall wide = call;
  wide.normalize = false;
  wide.out_dtype = accumulator(call.dtype);
  const Tensor unrounded = device.memory(results * call.dim * accumulator_size(call.dtype));
  wide.out = unrounded.mutable_data();
  reduce(wide, plan, {}, device);
  NormalizeCall normalize;
  normalize.dtype = wide.out_dtype, normalize.out_dtype = call.out_dtype;
  normalize.rows = results, normalize.dim = call.dim;
  normalize.x = wide.out, normalize.out = call.out;
  normalize.leading = 1, normalize.sizes = &results, normalize.strides = &call.dim;
  run(normalize, device.stream());
}

// Of every segment's softmax, into prologue.totals. No column is read for them: one is counted where there is none, and
// else as many as one load takes, so that products with a query are taken by whole loads.
void add_up_totals(const PoolCall& call, bool cu, const Prologue& prologue, const OnDevice& device) {
  PoolCall totals = call;
  totals.dim = std::clamp<int64_t>(totals.width, 1, 16 / size_of(totals.dtype));
  reduce(totals, make_plan(totals, cu, device.properties()), prologue, device);
}

// Tokens added up, each times what its product with the query gets.
void query_gradient(const PoolBackwardCall& call, bool cu, const Prologue& prologue, const OnDevice& device) {
  PoolCall sums = call.pool;
  sums.mode = kWeightedSum;
  sums.dim = sums.width, sums.out_dtype = accumulator(sums.dtype), sums.out = call.out;
  reduce(sums, make_plan(sums, cu, device.properties()), prologue, device);
}

int64_t out_bytes(const PoolBackwardCall& call) {
  const PoolCall& pool = call.pool;
  if (call.of == Of::query) return results_of(pool) * pool.width * accumulator_size(pool.dtype);
  if (call.per_token()) return call.out_rows() * size_of(call.token_values().dtype);
  return call.out_rows() * pool.width * size_of(pool.dtype);
}

void run(const PoolBackwardCall& call, bool cu, const OnDevice& device) {
  const PoolCall& pool = call.pool;
  const int64_t bytes = out_bytes(call), results = results_of(pool);
  if (bytes == 0) return;
  const cudaStream_t stream = device.stream();
  if (results == 0) return check_cuda(cudaMemsetAsync(call.out, 0, static_cast<size_t>(bytes), stream));
  const BackwardPlan plan = make_plan(call, device.properties());
  check_grid(plan.blocks, plan.strips);
  check_grid(results, 1);

  const Tensor memory = device.memory(plan.bytes);
  char* const at = static_cast<char*>(memory.mutable_data());
  const Prologue prologue = {reinterpret_cast<OverlapRange*>(at),
                             reinterpret_cast<unsigned long long*>(at + plan.maxima),
                             at + plan.gradient,
                             reinterpret_cast<Segment*>(at + plan.segments),
                             at + plan.products,
                             pool.mode.softmax() ? reinterpret_cast<UnitTotals*>(at + plan.totals) : nullptr,
                             pool.dim};
  if (plan.gradient > 0) check_cuda(cudaMemsetAsync(at, 0xff, static_cast<size_t>(plan.gradient), stream));
  if (pool.mode.softmax()) add_up_totals(pool, cu, prologue, device);
  check_cuda(kernels(accumulator(pool.dtype)).segment_prologue(call, plan, prologue, stream));
  if (call.of == Of::query) return query_gradient(call, cu, prologue, device);
  check_cuda(kernels(pool.dtype).pool_backward(call, plan, prologue, stream));
}

// Where hidden's device and size say so; it stays on the stack.
bool ran_in_python_for(StableIValue hidden, const char* name, StableIValue* stack) {
  const auto tensor = torch::stable::detail::to<AtenTensorHandle>(hidden);
  int64_t numel = 0;
  int32_t dtype = 0, device = 0;
  check_api(aoti_torch_get_numel(tensor, &numel), "a tensor's size");
  check_api(aoti_torch_get_dtype(tensor, &dtype), "a tensor's dtype");
  check_api(aoti_torch_get_device_index(tensor, &device), "a tensor's device");
  return ran_in_python(name, stack, device, numel * size_of(float_dtype(dtype).value_or(DType::float32)));
}

template <int code>
void pool(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const Mode& mode = kModes[code];
  if (ran_in_python_for(stack[0], mode.name, stack)) return;
  PoolArguments arguments(mode, stack);
  answer(mode.name, stack, arguments, [&] {
    PoolCall call = arguments.call();
    const OnDevice device(arguments.hidden.device());
    const Tensor queries = with_plain_queries(call, arguments.query);
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    run(call, static_cast<bool>(arguments.cu_seqlens), device);
    return out;
  });
}

void pool_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_pool_backward";
  if (ran_in_python_for(stack[PoolBackwardArguments::kHidden], name, stack)) return;
  PoolBackwardArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    PoolBackwardCall call = arguments.call();
    const OnDevice device(arguments.pool.hidden.device());
    const Tensor queries = with_plain_queries(call.pool, arguments.pool.query);
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    run(call, static_cast<bool>(arguments.pool.cu_seqlens), device);
    return out;
  });
}

void l2_normalize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "l2_normalize";
  if (ran_in_python_for(stack[0], name, stack)) return;
  NormalizeArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    NormalizeCall call = arguments.call();
    const OnDevice device(arguments.x.device());
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    run(call, device.stream());
    return out;
  });
}

void l2_normalize_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_l2_normalize_backward";
  if (ran_in_python_for(stack[NormalizeBackwardArguments::kX], name, stack)) return;
  NormalizeBackwardArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    NormalizeBackwardCall call = arguments.call();
    const OnDevice device(arguments.normalize.x.device());
    Tensor out = arguments.output();
    call.out = out.mutable_data();
    run(call, device.stream());
    return out;
  });
}

// Whether rows of so many bytes each stand where four values may be loaded at once.
bool are_aligned(const PoolCall& call) {
  const int64_t size = size_of(call.dtype), alignment = size * 4 < 16 ? size * 4 : 16;
  const int64_t strides = (call.row_stride | call.batch_stride) * size;
  return (static_cast<int64_t>(reinterpret_cast<uintptr_t>(call.hidden)) | strides) % alignment == 0;
}

int64_t* integers(const Tensor& memory) { return static_cast<int64_t*>(memory.mutable_data()); }

// How many rows the values have. Where nothing but data says so, the device is waited for, once.
int64_t size_of_values(const TokensArguments& arguments, const TokensCall& call, const int64_t* cu_seqlens,
                       cudaStream_t stream) {
  const PoolArguments& pool = arguments.pool;
  if (arguments.total) return *arguments.total;
  if (!pool.mask && !pool.cu_seqlens && !pool.starts && !pool.ends) return call.pool.batch * call.pool.rows;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone)
    throw std::runtime_error(
        "fastpool.tokens: in a CUDA graph total must be given, for nothing can wait for their number");
  int64_t found = 0;
  check_cuda(cudaMemcpyAsync(&found, cu_seqlens + call.pool.batch, sizeof found, cudaMemcpyDeviceToHost, stream));
  check_cuda(cudaStreamSynchronize(stream));
  return found;
}

// Triton has no token outputs, so that their size sends no call to Python.
bool other_was_requested(const char* name, StableIValue* stack) { return ran_in_python(name, stack, native::kCpu, 0); }

void tokens(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "tokens";
  if (other_was_requested(name, stack)) return;
  TokensArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    TokensCall call = arguments.call();
    const PoolCall& pool = call.pool;
    check_grid(pool.batch, 1);
    const OnDevice device(arguments.pool.hidden.device());
    const cudaStream_t stream = device.stream();
    Tensor cu_seqlens = arguments.cu_seqlens(call);
    TokenRows rows;
    rows.padded = arguments.pool.hidden.dim() == 3;
    rows.most = arguments.total.value_or(INT64_MAX);
    rows.cu_seqlens = integers(cu_seqlens);
    check_cuda(count_tokens(pool, rows, stream));
    call.size = size_of_values(arguments, call, rows.cu_seqlens, stream);
    Tensor values = arguments.values(call);
    if (call.size > 0 && pool.dim > 0) {
      const Tensor sources = device.memory(call.size * 8);
      rows.sources = integers(sources);
      call.pool.out = values.mutable_data();
      check_cuda(find_tokens(pool, rows, stream));
      check_cuda(kernels(pool.dtype).pack_tokens(call, rows, are_aligned(pool), stream));
    }
    return std::pair(std::move(values), std::move(cu_seqlens));
  });
}

void tokens_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_tokens_backward";
  if (other_was_requested(name, stack)) return;
  TokensBackwardArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    TokensBackwardCall call = arguments.call();
    const PoolCall& pool = call.pool;
    check_grid(pool.batch, 1);
    const OnDevice device(arguments.pool.hidden.device());
    const cudaStream_t stream = device.stream();
    Tensor out = arguments.output();
    call.out = out.mutable_data();
    const int64_t tiles = call.padded ? 0 : (pool.rows + kRangeRows - 1) / kRangeRows;
    if (call.out_rows() * pool.width == 0) return out;
    const Tensor memory = device.memory((pool.batch + 1 + call.size + tiles) * 8);
    TokenRows rows;
    rows.padded = call.padded;
    rows.most = call.size;
    rows.cu_seqlens = integers(memory);
    rows.sources = rows.cu_seqlens + pool.batch + 1;
    if (tiles > 0) {
      static_assert(sizeof(OverlapRange) == 8);
      rows.ranges = reinterpret_cast<OverlapRange*>(rows.sources + call.size);
      check_cuda(cudaMemsetAsync(rows.ranges, 0xff, static_cast<size_t>(tiles) * 8, stream));
    }
    check_cuda(count_tokens(pool, rows, stream));
    check_cuda(find_tokens(pool, rows, stream));
    const bool aligned = pool.dim % kQuad == 0 && reinterpret_cast<uintptr_t>(call.gradient) % 16 == 0;
    check_cuda(kernels(pool.dtype).scatter_tokens(call, rows, aligned, stream));
    return out;
  });
}

void quantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "quantize";
  if (ran_in_python_for(stack[0], name, stack)) return;
  QuantizeArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    QuantizeCall call = arguments.call();
    const OnDevice device(arguments.x.device());
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    run(call, device.stream());
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTPOOL_OPS, FASTPOOL_KEY, m) {
  register_modes(m, [](auto code) { return pool<code>; });
  m.impl("_pool_backward", pool_backward);
  m.impl("l2_normalize", l2_normalize);
  m.impl("_l2_normalize_backward", l2_normalize_backward);
  m.impl("tokens", tokens);
  m.impl("_tokens_backward", tokens_backward);
  m.impl("quantize", quantize);
}

}  // namespace fastpool
