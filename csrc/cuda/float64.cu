#include "kernels.cuh"

namespace fastpool::cuda {
const DTypeKernels kernels_float64 = {pool<double>,
                                      normalize<double>,
                                      segment_prologue<double>,
                                      pool_backward<double>,
                                      normalize_backward<double>,
                                      pack_tokens<double>,
                                      scatter_tokens<double>,
                                      quantize<double>};
}
