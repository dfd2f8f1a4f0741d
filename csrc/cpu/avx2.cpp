#define FASTPOOL_ISA avx2
#include "tokens_impl.h"

namespace fastpool::cpu {
const IsaKernels kernels_avx2 = FASTPOOL_ISA::kernels("avx2");
}
