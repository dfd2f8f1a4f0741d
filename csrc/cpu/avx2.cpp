#define FASTPOOL_ISA avx2
#include "kernel_impl.h"

namespace fastpool::cpu {
const Kernels kernels_avx2 = {"avx2", FASTPOOL_ISA::reduce, FASTPOOL_ISA::combine, FASTPOOL_ISA::normalize};
}
