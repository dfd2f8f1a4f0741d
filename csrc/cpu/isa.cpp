// Picks the kernel file for this CPU, once, and lets tests ask for a lower one. Every one of them gives the same bits.
#include <atomic>

#include "isa.h"
#include "pool_cpu.h"

namespace fastpool::cpu {
namespace {

bool runs(const IsaKernels& kernels) {
  if (&kernels == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && runs(kernels_avx2);
  if (&kernels == &kernels_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return true;
}

const IsaKernels* const kAll[] = {&kernels_avx512, &kernels_avx2, &kernels_portable};  // best first

const IsaKernels* best() {
  for (const IsaKernels* kernels : kAll)
    if (runs(*kernels)) return kernels;
  return &kernels_portable;
}

std::atomic<const IsaKernels*> in_use{nullptr};

}  // namespace

const IsaKernels& kernels() {
  const IsaKernels* kernels = in_use.load(std::memory_order_relaxed);
  if (kernels == nullptr) in_use.store(kernels = best(), std::memory_order_relaxed);
  return *kernels;
}

const char* isa() { return kernels().name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const IsaKernels* kernels : kAll)
    if (runs(*kernels)) names.emplace_back(kernels->name);
  return names;
}

bool use_isa(const std::string& name) {
  for (const IsaKernels* kernels : kAll) {
    if ((name.empty() || name == kernels->name) && runs(*kernels)) {
      in_use.store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fastpool::cpu
