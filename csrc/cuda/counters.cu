// The counters that every stream keeps (../counters.h). Not of torch's memory: what its allocator hands out while a
// graph is warmed up or captured belongs to the graph, and may not be kept.
#include "kernels.h"

namespace fastpool::cuda {
namespace {
__device__ int counters[kKeptStreams * 2 * kKeptCounters];  // zero when the GPU has loaded this
}  // namespace

cudaError_t kept_counters(int** memory) { return cudaGetSymbolAddress(reinterpret_cast<void**>(memory), counters); }

}  // namespace fastpool::cuda
