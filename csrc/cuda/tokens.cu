// Where tokens are, for token outputs: of no dtype.
#include "kernels.cuh"

namespace fastpool::cuda {
namespace {

// How many tokens each segment has, behind its place in cu_seqlens: a block takes a segment.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ PoolCall call, const __grid_constant__ TokenRows rows) {
  const int64_t b = blockIdx.x;
  const int64_t count = total_count(call, b, bounds_of(call, b), reinterpret_cast<int64_t*>(shared_memory));
  if (threadIdx.x == 0) rows.cu_seqlens[b + 1] = count;
}

// Adds them up, in one block; segments without a mask are as long as their bounds say.
__global__ void __launch_bounds__(kThreads)
    offsets_kernel(const __grid_constant__ PoolCall call, const __grid_constant__ TokenRows rows) {
  int64_t* const sums = reinterpret_cast<int64_t*>(shared_memory);
  int64_t total = 0;
  if (threadIdx.x == 0) rows.cu_seqlens[0] = 0;
#pragma unroll 1
  for (int64_t base = 0; base < call.batch; base += blockDim.x) {
    const int64_t b = base + threadIdx.x;
    int64_t n = 0;
    if (b < call.batch) {
      const Segment bounds = bounds_of(call, b);
      n = call.mask.data != nullptr ? rows.cu_seqlens[b + 1] : bounds.end - bounds.begin;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t before = __shfl_sync(kAll, n, lane() < step ? lane() : lane() - step);
      n += lane() < step ? 0 : before;
    }
    __syncthreads();  // the sums before have been read
    if (lane() == 31) sums[warp()] = n;
    __syncthreads();
    int64_t before = total;
#pragma unroll 1
    for (int w = 0; w < warps(); ++w) {
      before += w < warp() ? sums[w] : 0;
      total += sums[w];
    }
    if (b < call.batch) rows.cu_seqlens[b + 1] = before + n < rows.most ? before + n : rows.most;
  }
}

// A block takes a segment.
__global__ void __launch_bounds__(kThreads)
    find_kernel(const __grid_constant__ PoolCall call, const __grid_constant__ TokenRows rows) {
  int* const counts = reinterpret_cast<int*>(shared_memory);
  const int64_t b = blockIdx.x, origin = rows.padded ? b * call.rows : 0;
  const Segment bounds = bounds_of(call, b);
  if (rows.ranges != nullptr && bounds.begin < bounds.end)
    for (int64_t at = bounds.begin / kRangeRows + threadIdx.x; at <= (bounds.end - 1) / kRangeRows; at += blockDim.x) {
      atomicMin(&rows.ranges[at].first, static_cast<unsigned>(b));
      atomicMax(&rows.ranges[at].last, static_cast<int>(b));
    }
  int64_t at = rows.cu_seqlens[b];
  const int64_t stop = rows.cu_seqlens[b + 1];
#pragma unroll 1
  for (int64_t base = bounds.begin; base < bounds.end && at < stop; base += blockDim.x) {
    const int64_t row = base + threadIdx.x;
    const bool real = row < bounds.end && is_real(call.mask, b, row);
    const unsigned word = __ballot_sync(kAll, real);
    __syncthreads();  // the counts before have been read
    if (lane() == 0) counts[warp()] = __popc(word);
    __syncthreads();
    int64_t place = at + __popc(word & ((1u << lane()) - 1));
#pragma unroll 1
    for (int w = 0; w < warps(); ++w) {
      place += w < warp() ? counts[w] : 0;
      at += counts[w];
    }
    if (real && place < stop) rows.sources[place] = origin + row;
  }
}

}  // namespace

cudaError_t count_tokens(const PoolCall& call, const TokenRows& rows, cudaStream_t stream) {
  if (call.mask.data != nullptr && call.batch > 0) {
    const dim3 grid(static_cast<unsigned>(call.batch));
    const cudaError_t error = launch(count_kernel, grid, kThreads, kSumsBytes, stream, call, rows);
    if (error != cudaSuccess) return error;
  }
  return launch(offsets_kernel, dim3(1), kThreads, kThreads / 32 * 8, stream, call, rows);
}

cudaError_t find_tokens(const PoolCall& call, const TokenRows& rows, cudaStream_t stream) {
  if (call.batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(call.batch));
  return launch(find_kernel, grid, kThreads, kThreads / 32 * 4, stream, call, rows);
}

}  // namespace fastpool::cuda
