#define FASTPOOL_ISA avx512
#include "kernel_impl.h"

namespace fastpool::cpu {
const Kernels kernels_avx512 = {"avx512", FASTPOOL_ISA::reduce, FASTPOOL_ISA::combine, FASTPOOL_ISA::normalize};
}
