#define FASTPOOL_ISA avx512
#include "tokens_impl.h"

namespace fastpool::cpu {
const IsaKernels kernels_avx512 = FASTPOOL_ISA::kernels("avx512");
}
