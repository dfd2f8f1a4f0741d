#include "kernels.cuh"

namespace fastpool::cuda {
const DTypeKernels kernels_bfloat16 = {pool<bfloat16_t>,
                                       normalize<bfloat16_t>,
                                       nullptr,
                                       pool_backward<bfloat16_t>,
                                       normalize_backward<bfloat16_t>,
                                       pack_tokens<bfloat16_t>,
                                       scatter_tokens<bfloat16_t>,
                                       quantize<bfloat16_t>};
}
