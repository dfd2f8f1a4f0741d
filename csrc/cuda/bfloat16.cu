#include "kernels.cuh"

namespace fastpool::cuda {
const Kernels kernels_bfloat16 = {pool<bfloat16_t>, normalize<bfloat16_t>};
}
