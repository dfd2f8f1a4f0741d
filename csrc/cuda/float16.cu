#include "kernels.cuh"

namespace fastpool::cuda {
const DTypeKernels kernels_float16 = {
    pool<half_t>,        normalize<half_t>,      nullptr,         pool_backward<half_t>, normalize_backward<half_t>,
    pack_tokens<half_t>, scatter_tokens<half_t>, quantize<half_t>};
}
