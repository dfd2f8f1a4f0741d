#include "kernels.cuh"

namespace fastpool::cuda {
const Kernels kernels_float16 = {pool<half_t>, normalize<half_t>};
}
