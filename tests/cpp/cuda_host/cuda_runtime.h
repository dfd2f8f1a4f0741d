// Stands for CUDA's own <cuda_runtime.h>, so that the kernels compile as plain C++ and run on a CPU: as much of it as
// they use. A block's threads are fibers that take turns at barriers and warp operations; blocks run one after another.
// Threads and blocks come in an order that a seed decides: one that needs another barrier, or arrivals in order, is
// noticed.
//
// What this cannot show: memory ordering (everything is sequentially consistent here), races between blocks or between
// two barriers, whether loads coalesce, how fast anything is, and what nvcc makes of the same source.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_host {

void barrier();
// Waits for all lanes of the warp; then every one of them sees what each has brought.
const uint64_t* exchange(uint64_t value);
void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& body);

// What a test reads and sets; tests/helpers/cuda_host.py has the same fields.
struct Control {
  std::atomic<int64_t> launches{0}, memsets{0}, allocated{0};  // so far; bytes that torch was asked for
  const void *arrived = nullptr, *stale = nullptr;             // counters of the last launch that had some
  void* stream = nullptr;                                      // the current one
  int device = 0;                                              // of every tensor
  bool capturing = false;                                      // every stream
  bool fail_next = false;                                      // the next launch fails
  const void *watched = nullptr, *watched_end = nullptr;       // memory of which loads are counted
  int64_t loaded = 0;                                          // bytes, so far
  int64_t waits = 0;                                           // of the host for a stream, so far
};
extern Control control;
extern bool skip_launches;

// A launch's counters must be zero when it starts: one for every block.
void check_counters(const int* arrived, const int* stale, size_t blocks);
template <class T>
auto check(const T& argument, const dim3& grid, int) -> decltype((void)argument.counters) {
  const auto& counters = argument.counters;
  if (counters.arrived != nullptr) check_counters(counters.arrived, counters.stale, size_t{grid.x} * grid.y);
}
template <class T>
void check(const T&, const dim3&, long) {}  // an argument without counters

}  // namespace cuda_host

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

inline void __syncthreads() { cuda_host::barrier(); }
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* lanes = cuda_host::exchange(predicate);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(lanes[i] != 0) << i;
  return ballot;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* lanes = cuda_host::exchange(bits);
  std::memcpy(&value, &lanes[lane], sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned all, T value, int mask) {
  return __shfl_sync(all, value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline void __syncwarp() { cuda_host::exchange(0); }
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline int add_acq_rel(int* counter, int value) { return atomicAdd(counter, value); }
template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  if (value < before) *address = value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* p) {
  if (p >= cuda_host::control.watched && p < cuda_host::control.watched_end) cuda_host::control.loaded += sizeof(T);
  return *p;
}
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __double2float_rz(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}
inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline uint16_t float_to_bfloat16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// ---- the host's side
using cudaStream_t = void*;
#define cudaStreamPerThread reinterpret_cast<cudaStream_t>(2)
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "a launch that a test lets fail"; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 227 << 10;  // few, so that small batches are cut too
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 128;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_host::control.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
// Of the current device: each has memory of its own, of which nothing but zeros is known.
template <class T, size_t n>
cudaError_t cudaGetSymbolAddress(void** address, T (&)[n]) {
  static T* devices[128] = {};
  T*& memory = devices[cuda_host::control.device];
  if (memory == nullptr) memory = new T[n]();
  *address = memory;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  ++cuda_host::control.memsets;
  std::memset(p, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++cuda_host::control.waits;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (std::exchange(cuda_host::control.fail_next, false)) return cudaErrorInvalidValue;
  ++cuda_host::control.launches;
  if (cuda_host::skip_launches) return cudaSuccess;
  (cuda_host::check(arguments, config->gridDim, 0), ...);
  cuda_host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
