// Vectors of lanes for one instruction set: loads that widen to the accumulator, stores that round once. Included only
// by the kernel files, each inside its own namespace (FASTPOOL_ISA) and with its own compiler flags. Plain GCC/Clang
// vector types: every lane is IEEE arithmetic on one column, so the width changes the speed and never the bits.
#pragma once
#include <cstring>

#include "../elementary.h"
#include "../segment.h"
#include "../state.h"
#include "../storage.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastpool::FASTPOOL_ISA {

// 32 bytes with AVX-512 too, which brings twice the registers: 64-byte loads were measured to stream 15-30 % slower
// from memory (Zen 4), and never faster in the cache by enough to matter.
#if defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int kLineBytes = 64;

// Accumulator lanes, and the unsigned integers of the same width that the conversions work on.
template <class A>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float type __attribute__((vector_size(kBytes)));
  typedef uint32_t word;
  typedef word bits __attribute__((vector_size(kBytes)));
  typedef uint16_t narrow __attribute__((vector_size(kBytes / 2)));
};
template <>
struct Vec<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double type __attribute__((vector_size(kBytes)));
  typedef uint64_t word;
  typedef word bits __attribute__((vector_size(kBytes)));
  typedef float narrow __attribute__((vector_size(kBytes / 2)));
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
#if defined(__AVX512VL__) && defined(__AVX512DQ__)
// Two comparisons, the second only where the first holds, which compilers do not find.
template <>
struct Maximum<FASTPOOL_ISA::Vec<float>::type> {
  FASTPOOL_INLINE __m256 of(__m256 left, __m256 right) {
    const __mmask8 number = _mm256_cmp_ps_mask(left, left, _CMP_ORD_Q);
    return _mm256_mask_mov_ps(left, _mm256_mask_cmp_ps_mask(number, right, left, _CMP_NLE_UQ), right);
  }
};
template <>
struct Maximum<FASTPOOL_ISA::Vec<double>::type> {
  FASTPOOL_INLINE __m256d of(__m256d left, __m256d right) {
    const __mmask8 number = _mm256_cmp_pd_mask(left, left, _CMP_ORD_Q);
    return _mm256_mask_mov_pd(left, _mm256_mask_cmp_pd_mask(number, right, left, _CMP_NLE_UQ), right);
  }
};
#elif defined(__AVX2__)
template <>
struct Maximum<FASTPOOL_ISA::Vec<float>::type> {
  FASTPOOL_INLINE __m256 of(__m256 left, __m256 right) {
    const __m256 number = _mm256_cmp_ps(left, left, _CMP_ORD_Q);
    return _mm256_blendv_ps(left, right, _mm256_and_ps(number, _mm256_cmp_ps(right, left, _CMP_NLE_UQ)));
  }
};
template <>
struct Maximum<FASTPOOL_ISA::Vec<double>::type> {
  FASTPOOL_INLINE __m256d of(__m256d left, __m256d right) {
    const __m256d number = _mm256_cmp_pd(left, left, _CMP_ORD_Q);
    return _mm256_blendv_pd(left, right, _mm256_and_pd(number, _mm256_cmp_pd(right, left, _CMP_NLE_UQ)));
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
  // Subnormals by way of an integer: a float's own subnormals may be flushed to zero.
  const UF subnormal = bit_cast<UF>(__builtin_convertvector(bit_cast<IF>(magnitude), VF) * 0x1p-24f);
  const UF finite = magnitude < 0x400u ? subnormal : (magnitude << 13) + (112u << 23);
  UF special = (magnitude << 13) | 0x7f800000u;
  special = magnitude > 0x7c00u ? special | 0x00400000u : special;
  return bit_cast<VF>(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
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
