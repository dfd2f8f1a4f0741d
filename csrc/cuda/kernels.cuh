// The CUDA kernels and their launches: included once by each dtype's file. A block reduces one unit; the last one to
// arrive at a segment's root, or the only one, runs the epilogue.
#pragma once
#include "arrival_tree.cuh"
#include "finish.cuh"
#include "kernels.h"
#include "leaves.cuh"
#include "normalize.cuh"
#include "quantize.cuh"
#include "scatter_gradient.cuh"
#include "segment.cuh"
#include "segment_prologue.cuh"
#include "tokens.cuh"

namespace fastpool::cuda {

// The columns of a block: all, or a strip of them.
FASTPOOL_KERNEL_INLINE int strip_columns(const PoolCall& call, const PoolPlan& plan) {
  const int64_t left = call.dim - blockIdx.y * plan.strip;
  return static_cast<int>(left < plan.strip ? left : plan.strip);
}

// Where cu_seqlens decrease, some segment may have no block: its row is zeros, not what the memory held before. A block
// with the number of a decrease clears what lies between the one before and the one behind it.
FASTPOOL_KERNEL_INLINE void clear_around(const PoolCall& call, int64_t b, void* results, int64_t result_bytes) {
  int64_t begin = b, end = b + 1;
#pragma unroll 1
  while (begin > 0 && !decreases(call, begin - 1)) --begin;
#pragma unroll 1
  while (end < call.batch && !decreases(call, end)) ++end;
  const int64_t row = call.queries.count * result_bytes / static_cast<int64_t>(sizeof(uint16_t));
  uint16_t* const out = static_cast<uint16_t*>(results);
#pragma unroll 1
  for (int64_t i = begin * row + threadIdx.x; i < end * row; i += blockDim.x) out[i] = 0;
}

// Blocks that a multiprocessor has registers for: products with queries take many in float64.
template <class T, class S>
constexpr int kBlocks = sizeof(T) == 8 && (S::softmax || S::queried) ? 1 : 2;

// K: queries of a unit that a block takes at once.
template <class T, class S, int V, int K>
__global__ void __launch_bounds__(kThreads, kBlocks<T, S>)
    reduce_kernel(const __grid_constant__ PoolCall call, const __grid_constant__ PoolPlan plan,
                  const __grid_constant__ Workspace workspace) {
  using A = typename AccumulatorOf<T>::type;
  const Shared<A> shared(plan.shared);
  clear_stale(workspace.counters);
  const bool at_decrease = plan.search && blockIdx.x < call.batch && decreases(call, blockIdx.x);
  Program program = find_program<K>(call, plan);
  UnitTotals* const totals_alone = S::softmax ? workspace.prologue.totals : nullptr;
  if (at_decrease) {
    if (totals_alone != nullptr)
      clear_around(call, blockIdx.x, totals_alone, sizeof(UnitTotals));
    else
      clear_around(call, blockIdx.x, call.out, call.dim * size_of(call.out_dtype));
  }
  const int b = program.segment;
  if (b < 0) return;
  const Segment bounds = bounds_of(call, b);
  const int64_t first = bounds.begin + nearest_real(call, b, bounds.begin, bounds.end - bounds.begin, 1, shared.found);
  const int filled = static_cast<int>((bounds.end - first + plan.split - 1) >> plan.split_shift);
  if (filled > 1) program.units = filled;
  if (program.unit >= program.units) return;
  if (threadIdx.x == 0) *shared.program = program;

  const int64_t column = blockIdx.y * plan.strip;
  const int columns = strip_columns(call, plan);
  const T* const rows = static_cast<const T*>(call.hidden) + int64_t{b} * call.batch_stride + column;
  const BlockUnit unit(plan, program, first, bounds.end);
  reduce_unit<S, V, K>(call, plan, workspace.prologue, unit, rows, columns, shared);
  program = *shared.program;
  if (!merge_last_block<S, K>(call, workspace, columns, column, program, shared)) return;
#pragma unroll 1
  for (int k = 0; k < queries_from<K>(call, program.query); ++k) {
    const Shared<A> own = shared.of_query(k);
    const int64_t result = program.segment * call.queries.count + program.query + k;
    if (totals_alone == nullptr)
      finish(call, result, column, columns, *own.totals, own);
    else if (threadIdx.x == 0)
      totals_alone[result] = *own.totals;
  }
}

// A mode that looks at one token of a segment copies it: a block takes a segment.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    copy_token_kernel(const __grid_constant__ PoolCall call, const __grid_constant__ PoolPlan plan) {
  using A = typename AccumulatorOf<T>::type;
  const Shared<A> shared(plan.shared);
  const int64_t b = blockIdx.x, column = blockIdx.y * plan.strip;
  const int columns = strip_columns(call, plan);
  const Segment one = selected(call, b, shared.found);
  Totals totals;
  totals.count = one.end - one.begin;
  if (totals.count > 0) {
    const T* const token =
        static_cast<const T*>(call.hidden) + b * call.batch_stride + one.begin * call.row_stride + column;
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x) * V; c < columns; c += static_cast<int>(blockDim.x) * V) {
      const Pack<T, V> pack = load<V>(token + c);
#pragma unroll
      for (int i = 0; i < V; ++i) shared.row[c + i] = widen(pack.x[i]);
    }
  }
  __syncthreads();
  finish(call, b, column, columns, totals, shared);
}

// ---- launches
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared > 48 << 10) {  // beyond what a kernel gets unasked
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T, int V>
cudaError_t launch_pool(const PoolCall& call, const PoolPlan& plan, const Workspace& workspace, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.programs), static_cast<unsigned>(plan.strips));
  const auto reduce = [&](auto kernel) {
    return launch(kernel, grid, plan.threads, plan.shared.bytes, stream, call, plan, workspace);
  };
  if (call.mode.one_token())
    return launch(copy_token_kernel<T, V>, grid, plan.threads, plan.shared.bytes, stream, call, plan);
  if (call.queries.data != nullptr && !call.mode.softmax()) return reduce(reduce_kernel<T, QueryGradientState, V, 1>);
  if (plan.queries > 1) return reduce(reduce_kernel<T, SoftmaxState, V, kQueries>);
  return with_any_state(call.mode, [&](auto state) {
    using S = decltype(state);  // scores are staged alike, given or not
    return reduce(reduce_kernel<T, std::conditional_t<S::softmax, SoftmaxState, S>, V, 1>);
  });
}

template <class T>
cudaError_t pool(const PoolCall& call, const PoolPlan& plan, const Workspace& workspace, cudaStream_t stream) {
  return plan.vector == 1 ? launch_pool<T, 1>(call, plan, workspace, stream)
                          : launch_pool<T, 16 / sizeof(T)>(call, plan, workspace, stream);
}

template <class A>
cudaError_t segment_prologue(const PoolBackwardCall& call, const BackwardPlan& plan, const Prologue& prologue,
                             cudaStream_t stream) {
  return launch(segment_prologue_kernel<A>, dim3(static_cast<unsigned>(call.pool.batch * call.pool.queries.count)),
                plan.prologue_threads, prologue_bytes<A>(plan), stream, call, plan, prologue);
}

template <class T>
cudaError_t pool_backward(const PoolBackwardCall& call, const BackwardPlan& plan, const Prologue& prologue,
                          cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.strips));
  const auto scatter = [&](auto kernel, int more_shared = 0) {
    constexpr int shared = kTileBytes<typename AccumulatorOf<T>::type>;
    return launch(kernel, grid, plan.threads, shared + more_shared, stream, call, plan, prologue);
  };
  constexpr int V = 16 / sizeof(T);
  if (call.per_token()) return scatter(scatter_weight_gradient_kernel<T>);
  if (call.pool.mode.takes_query())
    return scatter(scatter_attention_gradient_kernel<T>, plan.threads / 32 * kChunkBytes);
  if (call.finds_maximum()) {
    const cudaError_t error = scatter(plan.vector == 1 ? find_maxima_kernel<T, 1> : find_maxima_kernel<T, V>);
    if (error != cudaSuccess) return error;
  }
  return scatter(plan.vector == 1 ? scatter_gradient_kernel<T, 1> : scatter_gradient_kernel<T, V>);
}

// A block for each row, as long as there are so many, and threads for `columns`.
template <class... Parameters, class... Arguments>
cudaError_t launch_rows(void (*kernel)(Parameters...), int64_t rows, int64_t columns, int64_t accumulator,
                        cudaStream_t stream, const Arguments&... arguments) {
  const int64_t blocks = rows < INT32_MAX ? rows : INT32_MAX;
  const int64_t warps = (columns + kWarpColumns - 1) / kWarpColumns;
  const int threads = static_cast<int>(warps < kThreads / 32 ? warps : kThreads / 32) * 32;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads,
                static_cast<int>((kBlockSums + kCounterLevels) * accumulator), stream, arguments...);
}
template <class T>
cudaError_t normalize(const Rows& rows, cudaStream_t stream) {
  return launch_rows(normalize_kernel<T>, rows.call.rows, rows.call.dim, accumulator_size(rows.call.dtype), stream,
                     rows);
}
template <class T>
cudaError_t normalize_backward(const Rows& rows, const RowGradients& gradients, cudaStream_t stream) {
  return launch_rows(normalize_backward_kernel<T>, rows.call.rows, gradients.width, accumulator_size(rows.call.dtype),
                     stream, rows, gradients);
}
template <class T>
cudaError_t quantize(const QuantizeRows& rows, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {  // a thread has eight columns, not four
    return launch_rows(kernel, rows.call.rows, (rows.call.dim + 1) / 2, 0, stream, rows);
  };
  switch (rows.call.kind.how) {
    case How::buckets: return launch(quantize_kernel<T, How::buckets>);
    case How::tanh: return launch(quantize_kernel<T, How::tanh>);
    default: return launch(quantize_kernel<T, How::bits>);
  }
}

template <class T>
cudaError_t pack_tokens(const TokensCall& call, const TokenRows& rows, bool aligned, cudaStream_t stream) {
  return launch_rows(pack_tokens_kernel<T>, call.size, call.pool.dim, accumulator_size(call.pool.dtype), stream, call,
                     rows, aligned);
}
template <class T>
cudaError_t scatter_tokens(const TokensBackwardCall& call, const TokenRows& rows, bool aligned, cudaStream_t stream) {
  return launch_rows(scatter_tokens_kernel<T>, call.out_rows(), call.pool.width, accumulator_size(call.pool.dtype),
                     stream, call, rows, aligned);
}

}  // namespace fastpool::cuda
