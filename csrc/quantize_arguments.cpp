// The arguments of quantize.
#include <vector>

#include "argument_checks.h"

namespace fastpool {

template <class Move>
void QuantizeArguments::move(Move move) {
  move.tensor(x);
  move.plain(kind);
  move.optional(ranges);
  move.plain(truncate_dim);
  move.plain(zero_bit);
}
QuantizeArguments::QuantizeArguments(StableIValue* stack) { move(Take(stack)); }
void QuantizeArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

QuantizeCall QuantizeArguments::call() {
  QuantizeCall call;
  call.dtype = required_dtype(x.dtype(), "x");
  require(kind >= 0 && kind < kKindCount, "kind");
  call.kind = kKinds[kind];
  require(x.dim() >= 1 && x.dim() <= 64, "x");
  const int64_t width = x.size(x.dim() - 1);
  call.dim = columns(truncate_dim, width);
  require(!zero_bit || call.kind.how == How::bits, "zero_bit");
  call.zero_bit = zero_bit;
  call.leading = static_cast<int>(x.dim() - 1);
  call.rows = 1;
  for (int d = 0; d < call.leading; ++d) call.rows *= x.size(d);

  require(static_cast<bool>(ranges) == (call.kind.how == How::buckets), "ranges");
  if (ranges) {
    require(ranges.dtype() == aoti_torch_dtype_float32() && ranges.device() == x.device(), "ranges");
    require(ranges.dim() == 2 && ranges.size(0) == 2, "ranges");
    require(ranges.size(1) == width || ranges.size(1) == call.dim, "ranges");
    require(ranges.in_memory(size_of(DType::float32)), "ranges");
    make_columns_contiguous(ranges);
    call.low = static_cast<const float*>(ranges.data());
    call.high = call.low + ranges.stride(0);
  }
  require(x.in_memory(size_of(call.dtype)), "x");
  make_columns_contiguous(x);
  call.x = x.data();
  call.sizes = x.sizes();
  call.strides = x.strides();
  return call;
}

Tensor QuantizeArguments::output(const QuantizeCall& call) const {
  std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  sizes.back() = call.out_columns();
  const int32_t dtype = call.kind.is_signed ? aoti_torch_dtype_int8() : aoti_torch_dtype_uint8();
  return empty(x.dim(), sizes.data(), dtype, x.device());
}

}  // namespace fastpool
