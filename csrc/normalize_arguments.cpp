// The arguments of l2_normalize and of its gradient.
#include <vector>

#include "argument_checks.h"

namespace fastpool {

// ---- l2_normalize
template <class Move>
void NormalizeArguments::move(Move move) {
  move.tensor(x);
  move.plain(truncate_dim);
  move.optional(truncate_dims);
  move.plain(eps);
  move.plain(out_dtype);
}
NormalizeArguments::NormalizeArguments(StableIValue* stack) { move(Take(stack)); }
void NormalizeArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

NormalizeCall NormalizeArguments::call() {
  NormalizeCall call;
  call.dtype = required_dtype(x.dtype(), "x");
  // At most as many dimensions as most of torch's own ops take; kernels have room for as many.
  require(x.dim() >= 1 && x.dim() <= 64, "x");
  call.dim = columns(truncate_dim, x.size(x.dim() - 1));
  call.out_dtype = out_dtype ? required_dtype(*out_dtype, "out_dtype") : call.dtype;
  require(eps >= 0, "eps");
  call.eps = eps;
  call.leading = static_cast<int>(x.dim() - 1);
  call.rows = 1;
  for (int d = 0; d < call.leading; ++d) call.rows *= x.size(d);
  if (truncate_dims) {
    require(truncate_dims.device() == x.device(), "truncate_dims");
    call.truncate_dims = index_values(truncate_dims, "truncate_dims");
    require_leading(truncate_dims, x, "truncate_dims");
    call.truncate_dims_strides = truncate_dims.strides();
  }

  require(x.in_memory(size_of(call.dtype)), "x");
  make_columns_contiguous(x);
  call.x = x.data();
  call.sizes = x.sizes();
  call.strides = x.strides();
  return call;
}

Tensor NormalizeArguments::output(const NormalizeCall& call) const {
  std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  sizes.back() = call.dim;
  return empty(x.dim(), sizes.data(), torch_dtype(call.out_dtype), x.device());
}

// ---- the gradient of l2_normalize
template <class Move>
void NormalizeBackwardArguments::move(Move move) {
  move.tensor(gradient);
  move.tensor(normalize.x);
  move.plain(normalize.eps);
  move.optional(normalize.truncate_dims);
}
NormalizeBackwardArguments::NormalizeBackwardArguments(StableIValue* stack) { move(Take(stack)); }
void NormalizeBackwardArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

NormalizeBackwardCall NormalizeBackwardArguments::call() {
  normalize.truncate_dim = columns_of(gradient);
  NormalizeBackwardCall call;
  call.normalize = normalize.call();
  const Tensor& x = normalize.x;
  call.width = x.size(x.dim() - 1);
  std::vector<int64_t> shape(x.sizes(), x.sizes() + x.dim());
  shape.back() = call.normalize.dim;
  call.gradient = dense(gradient, shape, call.normalize.dtype, x.device(), "gradient");
  return call;
}

Tensor NormalizeBackwardArguments::output() const {
  const Tensor& x = normalize.x;
  return empty(x.dim(), x.sizes(), x.dtype(), x.device());
}

}  // namespace fastpool
