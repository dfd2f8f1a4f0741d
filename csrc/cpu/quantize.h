// Quantised rows: a byte for each value, or a bit. Included by kernel_impl.h, into an instruction set's namespace.
#pragma once
#include "../quantize.h"
#include "kernel.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

// The first n lanes of whole numbers, as bytes.
template <class A>
FASTPOOL_INLINE void store_bytes(uint8_t* p, typename Vec<A>::type v, uint8_t flip, int n) {
  const auto whole = __builtin_convertvector(v, typename Vec<A>::whole);
  const auto bytes = __builtin_convertvector(whole, typename Vec<A>::bytes) ^ flip;
  std::memcpy(p, &bytes, static_cast<size_t>(n));
}

// Eight bytes of 0 or 1 make one, the first of them its highest bit: each is moved there by a product of its own, and
// no two products meet in a bit.
FASTPOOL_INLINE uint8_t packed(const uint8_t* bytes) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return static_cast<uint8_t>((read<uint64_t>(bytes) * 0x8040201008040201u) >> 56);
#else
  uint8_t packed = 0;
  for (int i = 0; i < 8; ++i) packed = static_cast<uint8_t>(packed << 1 | bytes[i]);
  return packed;
#endif
}

// `value(x, c)`: of the vector of columns from c on.
template <class T, class A, class Value>
FASTPOOL_INLINE void quantize_rows(const QuantizeCall& call, int64_t begin, int64_t end, uint8_t* bits, Value value) {
  using V = typename Vec<A>::type;
  const bool packs = call.kind.how == How::bits;
  const uint8_t flip = packs ? uint8_t{0} : call.kind.flip;
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(call.x) + offset_of(row, call.leading, call.sizes, call.strides);
    uint8_t* const out = static_cast<uint8_t*>(call.out) + row * call.out_columns();
    uint8_t* const bytes = packs ? bits : out;
    over_columns<A>(0, call.dim, [&](int64_t c, int n) __attribute__((always_inline)) {
      store_bytes<A>(bytes + c, value(load_part<V>(x + c, n), c), flip, n);
    });
    for (int64_t i = 0; packs && i < call.out_columns(); ++i) out[i] = packed(bits + 8 * i) ^ call.kind.flip;
  }
}

// `scratch` has room for two rows of accumulators, or one of bytes.
template <class T, class A>
static void quantize_rows(const QuantizeCall& call, int64_t begin, int64_t end, void* scratch) {
  using V = typename Vec<A>::type;
  if (call.kind.how == How::bits) {
    auto* const bits = static_cast<uint8_t*>(scratch);
    std::memset(bits + call.dim, 0, static_cast<size_t>(8 * call.out_columns() - call.dim));
    const bool zero_bit = call.zero_bit;
    return quantize_rows<T, A>(call, begin, end, bits,
                               [&](V x, int64_t) __attribute__((always_inline)) { return bit_of(x, zero_bit); });
  }
  if (call.kind.how == How::tanh)
    return quantize_rows<T, A>(call, begin, end, nullptr,
                               [](V x, int64_t) __attribute__((always_inline)) { return scaled_tanh(x); });
  A *const low = static_cast<A*>(scratch), *const step = low + cpu::padded_columns(call.dim);
  for (int64_t c = 0; c < cpu::padded_columns(call.dim); ++c) {
    low[c] = c < call.dim ? call.low[c] : 0;
    step[c] = c < call.dim ? step_of(call.low[c], call.high[c]) : 1;
  }
  const uint8_t flip = call.kind.flip;
  quantize_rows<T, A>(call, begin, end, nullptr, [&](V x, int64_t c) __attribute__((always_inline)) {
    return bucket_of(x, read<V>(low + c), read<V>(step + c), flip);
  });
}

}  // namespace fastpool::FASTPOOL_ISA
