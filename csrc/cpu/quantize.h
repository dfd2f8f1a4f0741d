// Quantised rows: a byte for each value, or a bit. Included by kernel_impl.h, into an instruction set's namespace.
#pragma once
#include "../quantize.h"
#include "kernel.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

constexpr bool kLittleEndian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// The lowest byte of each number.
template <class Whole, int... i>
FASTPOOL_INLINE auto lowest_bytes(Whole whole, std::integer_sequence<int, i...>) {
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(Whole))));
  const auto bytes = bit_cast<Bytes>(whole);
  return __builtin_shufflevector(bytes, bytes, (4 * i + (kLittleEndian ? 0 : 3))...);
}

// The first n lanes of whole numbers, as bytes.
template <class A>
FASTPOOL_INLINE void store_bytes(uint8_t* p, typename Vec<A>::type v, uint8_t flip, int n) {
  const auto whole = __builtin_convertvector(v, typename Vec<A>::whole);
  const auto bytes = lowest_bytes(whole, std::make_integer_sequence<int, Vec<A>::lanes>()) ^ flip;
  std::memcpy(p, &bytes, static_cast<size_t>(n));
}

// A bit for each lane that is set, the first lane's the highest.
template <class Mask, int... i>
FASTPOOL_INLINE unsigned bits_of(Mask mask, std::integer_sequence<int, i...>) {
  constexpr int lanes = sizeof...(i);
  const Mask reversed = __builtin_shufflevector(mask, mask, (lanes - 1 - i)...);
#if defined(__AVX2__)
  if constexpr (lanes == 8)
    return static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(reversed)));
  else
    return static_cast<unsigned>(_mm256_movemask_pd(bit_cast<__m256d>(reversed)));
#else
  return (0u | ... | (static_cast<unsigned>(reversed[i] & 1) << i));
#endif
}

template <class T>
FASTPOOL_INLINE const T* row_of(const QuantizeCall& call, int64_t row) {
  return static_cast<const T*>(call.x) + offset_of(row, call.leading, call.sizes, call.strides);
}

// `value(x, c)`: of the vector of columns from c on, as whole numbers.
template <class T, class A, class Value>
FASTPOOL_INLINE void quantize_to_bytes(const QuantizeCall& call, int64_t begin, int64_t end, uint8_t flip,
                                       Value value) {
  using V = typename Vec<A>::type;
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = row_of<T>(call, row);
    uint8_t* const out = static_cast<uint8_t*>(call.out) + row * call.dim;
    over_columns<A>(0, call.dim, [&](int64_t c, int n) __attribute__((always_inline)) {
      store_bytes<A>(out + c, value(load_part<V>(x + c, n), c), flip, n);
    });
  }
}

template <class T, class A, bool zero_bit>
FASTPOOL_INLINE void quantize_to_bits(const QuantizeCall& call, int64_t begin, int64_t end) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  constexpr std::make_integer_sequence<int, lanes> each;
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = row_of<T>(call, row);
    uint8_t* out = static_cast<uint8_t*>(call.out) + row * call.out_columns();
    // Eight columns, or the n that are left.
    const auto octet = [&](int64_t c, int n) __attribute__((always_inline)) {
      unsigned bits = 0;
      for (int i = 0; i < 8; i += lanes) {
        const int left = n - i < 0 ? 0 : n - i < lanes ? n - i : lanes;
        bits = bits << lanes | bits_of(is_one(load_part<V>(x + c + (left > 0 ? i : 0), left), zero_bit), each);
      }
      *out++ = static_cast<uint8_t>((bits & 0xff00u >> n) ^ call.kind.flip);
    };
    int64_t c = 0;
    for (; c + 8 <= call.dim; c += 8) octet(c, 8);
    if (c < call.dim) octet(c, static_cast<int>(call.dim - c));
  }
}

// `scratch` has room for two rows of accumulators.
template <class T, class A>
static void quantize_rows(const QuantizeCall& call, int64_t begin, int64_t end, void* scratch) {
  using V = typename Vec<A>::type;
  const uint8_t flip = call.kind.flip;
  switch (call.kind.how) {
    case How::bits:
      return call.zero_bit ? quantize_to_bits<T, A, true>(call, begin, end)
                           : quantize_to_bits<T, A, false>(call, begin, end);
    case How::tanh:
      return quantize_to_bytes<T, A>(call, begin, end, flip,
                                     [](V x, int64_t) __attribute__((always_inline)) { return scaled_tanh(x); });
    case How::buckets: break;
  }
  A *const low = static_cast<A*>(scratch), *const step = low + cpu::padded_columns(call.dim);
  for (int64_t c = 0; c < cpu::padded_columns(call.dim); ++c) {
    low[c] = c < call.dim ? call.low[c] : 0;
    step[c] = c < call.dim ? step_of(call.low[c], call.high[c]) : 1;
  }
  quantize_to_bytes<T, A>(call, begin, end, flip, [&](V x, int64_t c) __attribute__((always_inline)) {
    return bucket_of(x, read<V>(low + c), read<V>(step + c), flip);
  });
}

}  // namespace fastpool::FASTPOOL_ISA
