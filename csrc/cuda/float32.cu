#include "kernels.cuh"

namespace fastpool::cuda {
const Kernels kernels_float32 = {pool<float>, normalize<float>, prepare<float>, pool_backward<float>,
                                 normalize_backward<float>};
}
