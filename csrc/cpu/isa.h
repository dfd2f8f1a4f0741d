#pragma once
#include "kernel.h"

namespace fastpool::cpu {

// The kernel file in use on this CPU.
const Kernels& kernels();

}  // namespace fastpool::cpu
