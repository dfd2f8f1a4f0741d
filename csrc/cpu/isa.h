#pragma once
#include "kernel.h"

namespace fastpool::cpu {

// The kernel file in use on this CPU.
const IsaKernels& kernels();

}  // namespace fastpool::cpu
