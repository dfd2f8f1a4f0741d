#define FASTPOOL_ISA portable
#include "tokens_impl.h"

namespace fastpool::cpu {
const IsaKernels kernels_portable = FASTPOOL_ISA::kernels("portable");
}
