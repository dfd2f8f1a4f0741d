// The schemas of the ops for C++ programs without Python, such as hosts of AOTInductor packages: a library of its own,
// which brings libfastpool.so along. In Python the same schemas come from python/fastpool/ops.py, and a test compares.
#include <torch/csrc/stable/library.h>

#include <string>

#include "pool.h"

namespace fastpool {

STABLE_TORCH_LIBRARY(fastpool, m) {
  for (const Mode& mode : kModes) {
    const std::string query = mode.takes_query() ? "Tensor query, " : "";
    const std::string per_token = mode.takes_weights()  ? "Tensor? weights=None, "
                                  : mode.takes_scores() ? "Tensor? scores=None, "
                                                        : "";
    const std::string scale = mode.takes_query() ? "float scale=1.0, " : "";
    const std::string schema = std::string(mode.name) + "(Tensor hidden, " + query +
                               "Tensor? mask=None, Tensor? cu_seqlens=None, " + per_token +
                               "*, Tensor? starts=None, Tensor? ends=None, " + scale +
                               "int? truncate_dim=None, bool normalize=False, ScalarType? out_dtype=None) -> Tensor";
    m.def(schema.c_str());
  }
  m.def(
      "l2_normalize(Tensor x, *, int? truncate_dim=None, Tensor? truncate_dims=None, float eps=1e-12, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "tokens(Tensor hidden, Tensor? mask=None, Tensor? cu_seqlens=None, *, Tensor? starts=None, Tensor? ends=None, "
      "int? truncate_dim=None, bool normalize=False, ScalarType? out_dtype=None, int? total=None) -> "
      "(Tensor, Tensor)");
  m.def("quantize(Tensor x, int kind, *, Tensor? ranges=None, int? truncate_dim=None, bool zero_bit=False) -> Tensor");
}

}  // namespace fastpool
