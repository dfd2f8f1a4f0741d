#include "kernels.cuh"

namespace fastpool::cuda {
const DTypeKernels kernels_float32 = {
    pool<float>,        normalize<float>,      segment_prologue<float>, pool_backward<float>, normalize_backward<float>,
    pack_tokens<float>, scatter_tokens<float>, quantize<float>};
}
