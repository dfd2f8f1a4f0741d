// Vectors of lanes for one instruction set: loads that widen to the accumulator, stores that round once. Included only
// by the kernel files, each inside its own namespace (FASTPOOL_ISA) and with its own compiler flags. Plain GCC/Clang
// vector types: every lane is IEEE arithmetic on one column, so the width changes the speed and never the bits.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "../elementary.h"
#include "../segment.h"
#include "../state.h"
#include "../storage.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastpool::FASTPOOL_ISA {

// 32 bytes with AVX-512 too, which brings twice the registers: 64-byte loads were measured to stream slower from
// memory, by 15 to 30 % on Zen 4, and of float32 by 20 to 30 % on Zen 5. Wide ones are for what comes from the cache
// anyway, and for several modes (RowVec, rows.h).
#if defined(__AVX512VL__)
constexpr int kBytes = 32, kWideBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kWideBytes = 32;
#else
constexpr int kBytes = 16, kWideBytes = 16;
#endif

constexpr int kLineBytes = 64;

// Accumulator lanes, and the unsigned integers of the same width that the conversions work on; as many whole numbers.
template <class A>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float type __attribute__((vector_size(kBytes)));
  typedef uint32_t word;
  typedef word bits __attribute__((vector_size(kBytes)));
  typedef uint16_t narrow __attribute__((vector_size(kBytes / 2)));
  typedef int32_t whole __attribute__((vector_size(kBytes)));
};
template <>
struct Vec<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double type __attribute__((vector_size(kBytes)));
  typedef uint64_t word;
  typedef word bits __attribute__((vector_size(kBytes)));
  typedef float narrow __attribute__((vector_size(kBytes / 2)));
  typedef int32_t whole __attribute__((vector_size(kBytes / 2)));
};
struct WideVec {
  typedef float type __attribute__((vector_size(kWideBytes)));
};
}  // namespace fastpool::FASTPOOL_ISA
namespace fastpool {
template <>
struct Lanes<FASTPOOL_ISA::Vec<float>::type> {
  using element = float;
  using bits = FASTPOOL_ISA::Vec<float>::bits;
};
template <>
struct Lanes<FASTPOOL_ISA::Vec<double>::type> {
  using element = double;
  using bits = FASTPOOL_ISA::Vec<double>::bits;
};
#if defined(__AVX512VL__)
// max gives its second operand where both are zeros or one is no number, so that left stays; a NaN on the right is then
// put in.
template <>
struct Maximum<FASTPOOL_ISA::Vec<float>::type> {
  FASTPOOL_INLINE __m256 of(__m256 left, __m256 right) {
    const __m256i nan_of_right = _mm256_set1_epi32(0x21);  // for quiet and signalling ones; else the first operand
    return _mm256_fixupimm_ps(_mm256_max_ps(right, left), right, nan_of_right, 0);
  }
};
template <>
struct Maximum<FASTPOOL_ISA::Vec<double>::type> {
  FASTPOOL_INLINE __m256d of(__m256d left, __m256d right) {
    const __m256i nan_of_right = _mm256_set1_epi64x(0x21);
    return _mm256_fixupimm_pd(_mm256_max_pd(right, left), right, nan_of_right, 0);
  }
};
template <>
struct Maximum<FASTPOOL_ISA::WideVec::type> {
  FASTPOOL_INLINE __m512 of(__m512 left, __m512 right) {
    const __m512i nan_of_right = _mm512_set1_epi32(0x21);
    return _mm512_fixupimm_ps(_mm512_max_ps(right, left), right, nan_of_right, 0);
  }
};
#elif defined(__AVX2__)
template <>
struct Maximum<FASTPOOL_ISA::Vec<float>::type> {
  FASTPOOL_INLINE __m256 of(__m256 left, __m256 right) {
    return _mm256_blendv_ps(_mm256_max_ps(right, left), right, _mm256_cmp_ps(right, right, _CMP_UNORD_Q));
  }
};
template <>
struct Maximum<FASTPOOL_ISA::Vec<double>::type> {
  FASTPOOL_INLINE __m256d of(__m256d left, __m256d right) {
    return _mm256_blendv_pd(_mm256_max_pd(right, left), right, _mm256_cmp_pd(right, right, _CMP_UNORD_Q));
  }
};
#endif
}  // namespace fastpool
namespace fastpool::FASTPOOL_ISA {

using VF = Vec<float>::type;
using UF = Vec<float>::bits;
using NF = Vec<float>::narrow;
typedef int32_t IF __attribute__((vector_size(kBytes)));
using VD = Vec<double>::type;
using WideF = WideVec::type;

template <class To, class From>
FASTPOOL_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class V>
FASTPOOL_INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// ---- loads: storage type -> accumulator lanes, exact
FASTPOOL_INLINE VF load(const float* p) { return read<VF>(p); }
FASTPOOL_INLINE VD load(const double* p) { return read<VD>(p); }
FASTPOOL_INLINE VF load(const bfloat16_t* p) {
#if defined(__AVX2__)  // GCC 12 widens a generic vector in three instructions instead of one
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16));
#else
  return bit_cast<VF>(__builtin_convertvector(read<NF>(p), UF) << 16);
#endif
}
FASTPOOL_INLINE VF load(const half_t* p) {
#if defined(__F16C__)
  return _mm256_cvtph_ps(read<__m128i>(p));
#else
  const UF h = __builtin_convertvector(read<NF>(p), UF);
  const UF sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // Subnormals by way of an integer.
  const UF subnormal = bit_cast<UF>(__builtin_convertvector(bit_cast<IF>(magnitude), VF) * 0x1p-24f);
  const UF finite = magnitude < 0x400u ? subnormal : (magnitude << 13) + (112u << 23);
  UF special = (magnitude << 13) | 0x7f800000u;
  special = magnitude > 0x7c00u ? special | 0x00400000u : special;
  return bit_cast<VF>(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

// Two vectors of columns, the first one at p. Those of bfloat16 come apart, the even ones and the odd ones, which takes
// an operation each; in order they take two, one of them between the halves of a vector.
template <class T>
constexpr bool kApart = std::is_same_v<T, bfloat16_t> && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
template <class V>
struct Two {
  V first, second;
};
template <class V, class T>
FASTPOOL_INLINE Two<V> load_two(const T* p) {
  constexpr int lanes = sizeof(V) / sizeof(typename AccumulatorOf<T>::type);
  if constexpr (kApart<T>) {
    typedef uint32_t U __attribute__((vector_size(sizeof(V))));
    const U u = read<U>(p);
    return {bit_cast<V>(u << 16), bit_cast<V>(u & 0xffff0000u)};
  } else if constexpr (std::is_same_v<T, typename AccumulatorOf<T>::type>) {
    return {read<V>(p), read<V>(p + lanes)};
  } else if constexpr (sizeof(V) == kBytes) {
    return {load(p), load(p + lanes)};
  } else {
#if defined(__AVX512VL__)
    return {_mm512_cvtph_ps(read<__m256i>(p)), _mm512_cvtph_ps(read<__m256i>(p + lanes))};
#endif
  }
}
template <class V, int... i>
FASTPOOL_INLINE Two<V> take_apart(V a, V b, std::integer_sequence<int, i...>) {
  return {__builtin_shufflevector(a, b, 2 * i...), __builtin_shufflevector(a, b, (2 * i + 1)...)};
}
// Accumulators of columns in order, as load_two() of bfloat16 has them.
template <class V>
FASTPOOL_INLINE Two<V> take_apart(V first, V second) {
  return take_apart(first, second, std::make_integer_sequence<int, sizeof(V) / sizeof(first[0])>());
}
template <int from, class V, int... i>
FASTPOOL_INLINE V interleave(V even, V odd, std::integer_sequence<int, i...>) {
  constexpr int lanes = sizeof...(i);
  return __builtin_shufflevector(even, odd, (from + i / 2 + i % 2 * lanes)...);
}
// A row of `dim` accumulators that load_two<V>() of T has taken apart, in order again.
template <class V, class T, class A>
FASTPOOL_INLINE void put_in_order(A* x, int64_t dim) {
  if constexpr (kApart<T>) {
    constexpr int lanes = sizeof(V) / sizeof(A);
    constexpr std::make_integer_sequence<int, lanes> each;
    for (; dim >= 2 * lanes; dim -= 2 * lanes, x += 2 * lanes) {
      const V even = read<V>(x), odd = read<V>(x + lanes);
      const V first = interleave<0>(even, odd, each), second = interleave<lanes / 2>(even, odd, each);
      std::memcpy(x, &first, sizeof(V));
      std::memcpy(x + lanes, &second, sizeof(V));
    }
  }
}

// ---- stores: accumulator lanes -> storage type, rounded to nearest even, once
FASTPOOL_INLINE void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }
FASTPOOL_INLINE void store(double* p, VF v) {
  for (int i = 0; i < Vec<float>::lanes; ++i) p[i] = v[i];
}
FASTPOOL_INLINE void store(bfloat16_t* p, VF v) {
  const UF u = bit_cast<UF>(v);
  const UF rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const NF n = __builtin_convertvector((v == v) ? rounded : UF{} + 0x7fc0u, NF);
  std::memcpy(p, &n, sizeof n);
}
FASTPOOL_INLINE void store(half_t* p, VF v) {
#if defined(__F16C__)
  const __m128i n = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const UF u = bit_cast<UF>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal results round in place; subnormal ones by adding 0.5, whose last mantissa bit is fp16's smallest step.
  const UF normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const UF subnormal = bit_cast<UF>(bit_cast<VF>(magnitude) + 0.5f) - 0x3f000000u;
  UF h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? UF{} + 0x7c00u : h;  // 65520 and beyond round to infinity
  h = magnitude > 0x7f800000u ? UF{} + 0x7e00u : h;
  const NF n = __builtin_convertvector(sign | h, NF);
#endif
  std::memcpy(p, &n, sizeof n);
}
FASTPOOL_INLINE void store(double* p, VD v) { std::memcpy(p, &v, sizeof v); }
FASTPOOL_INLINE void store(float* p, VD v) {
  const auto n = __builtin_convertvector(v, Vec<double>::narrow);
  std::memcpy(p, &n, sizeof n);
}
// float64 to 16 bits in one rounding: first to float32 rounded to odd (an inexact result keeps its last bit set), which
// has bits enough that rounding it again to 16 is the same as rounding once (Boldo and Melquiond, "Emulation of FMA and
// Correctly Rounded Sums", IEEE Trans. Comput. 57, 2008).
template <class N>
FASTPOOL_INLINE void store16(N* p, VD v) {
  constexpr int n = Vec<double>::lanes;
  float odd[Vec<float>::lanes] = {};
  for (int i = 0; i < n; ++i) {
    const double d = v[i];
    const float nearest = static_cast<float>(d);
    uint32_t u = bit_cast<uint32_t>(nearest);
    if (nearest == nearest && static_cast<double>(nearest) != d && (u & 1u) == 0) {
      // The neighbour on d's side is odd; infinity's inner neighbour is the largest finite number, also odd.
      const bool beyond = (nearest < 0 ? -static_cast<double>(nearest) : nearest) > (d < 0 ? -d : d);
      u = beyond ? u - 1 : u + 1;
      if (nearest == 0) u = (d < 0 ? 0x80000000u : 0u) | 1u;
    }
    odd[i] = bit_cast<float>(u);
  }
  N narrow[Vec<float>::lanes];
  store(narrow, load(odd));
  std::memcpy(p, narrow, n * sizeof(N));
}
FASTPOOL_INLINE void store(half_t* p, VD v) { store16(p, v); }
FASTPOOL_INLINE void store(bfloat16_t* p, VD v) { store16(p, v); }

// The first n columns of a vector; where that is not all of it, no memory behind them is touched.
template <class V, class T>
FASTPOOL_INLINE V load_part(const T* p, int n) {
  constexpr int lanes = sizeof(V) / sizeof(typename AccumulatorOf<T>::type);
  if (n == lanes) return load(p);
  T buffer[lanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T, class V>
FASTPOOL_INLINE void store_part(T* p, V v, int n) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if (n == lanes) return store(p, v);
  T buffer[lanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// body(c, n) for every vector of the columns [from, to): its first one, and how many.
template <class A, class Body>
FASTPOOL_INLINE void over_columns(int64_t from, int64_t to, Body body) {
  constexpr int lanes = Vec<A>::lanes;
  for (; from + lanes <= to; from += lanes) body(from, lanes);
  if (from < to) body(from, static_cast<int>(to - from));
}

}  // namespace fastpool::FASTPOOL_ISA
