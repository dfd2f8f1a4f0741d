#define FASTPOOL_ISA portable
#include "kernel_impl.h"

namespace fastpool::cpu {
const Kernels kernels_portable = {"portable", FASTPOOL_ISA::reduce, FASTPOOL_ISA::combine, FASTPOOL_ISA::normalize};
}
