#include "kernels.cuh"

namespace fastpool::cuda {
const Kernels kernels_float64 = {pool<double>, normalize<double>, prepare<double>, pool_backward<double>,
                                 normalize_backward<double>};
}
