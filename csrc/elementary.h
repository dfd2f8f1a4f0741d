// e^x, in IEEE additions and multiplications: no library's exp is the same everywhere, and these are the bits of
// python/fastpool/reference/elementary.py. V is a scalar on a GPU and a vector of lanes on a CPU.
#pragma once
#include <cstdint>

#include "compiler.h"

namespace fastpool {

// What a V is made of, and unsigned integers of its size; vectors of lanes add theirs (cpu/vec.h).
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using element = float;
  using bits = uint32_t;
};
template <>
struct Lanes<double> {
  using element = double;
  using bits = uint64_t;
};

template <class A>
struct ElementaryConstants;
template <>
struct ElementaryConstants<float> {
  using Word = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr Word bias = 127, upper_half = ~Word{0xfff};
  // From here on floats are integers; one and a half of it, whose last bits are those of an integer added to it; the
  // largest power of two; and one that normal numbers hold with its inverse.
  static constexpr float integers = 0x1p23f, magic = 0x1.8p23f, largest = 0x1p127f, most = 100;
  // 1 / ln 2 in two parts, the first of so few bits that its product with the upper half of a number is exact.
  static constexpr float log2_e_high = 0x1.714p+0f, log2_e_low = 0x1.47652cp-12f;
  // 2^f = 1 + f P(f): P's coefficients, from the highest on.
  static constexpr int degree = 6;
  FASTPOOL_HOST_DEVICE static constexpr float exp2(int i) {
    constexpr float of[] = {0x1.44138ap-13f, 0x1.5f089p-10f, 0x1.3b2a54p-7f,
                            0x1.c6af6cp-5f,  0x1.ebfbep-3f,  0x1.62e43p-1f};
    return of[i];
  }
};
template <>
struct ElementaryConstants<double> {
  using Word = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr Word bias = 1023, upper_half = ~Word{0x7ffffff};
  static constexpr double integers = 0x1p52, magic = 0x1.8p52, largest = 0x1p1023, most = 1000;
  static constexpr double log2_e_high = 0x1.715476p+0, log2_e_low = 0x1.4ae0bf85ddf44p-26;
  static constexpr int degree = 12;
  FASTPOOL_HOST_DEVICE static constexpr double exp2(int i) {
    constexpr double of[] = {0x1.c4a29324a1038p-36, 0x1.e9ec1fcb69a7fp-32, 0x1.e4cf10dec0f59p-28, 0x1.b524ebd13a55fp-24,
                             0x1.62c02242b879cp-20, 0x1.ffcbfc6da6ed1p-17, 0x1.430912f86b7dbp-13, 0x1.5d87fe78a3f9cp-10,
                             0x1.3b2ab6fba4e79p-7,  0x1.c6b08d704a0c6p-5,  0x1.ebfbdff82c58fp-3,  0x1.62e42fefa39efp-1};
    return of[i];
  }
};

template <class To, class From>
FASTPOOL_INLINE To as_bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// 2^k for an integer k among the exponents of normal numbers.
template <class V>
FASTPOOL_INLINE V power_of_two(V k) {
  using A = typename Lanes<V>::element;
  using U = typename Lanes<V>::bits;
  using C = ElementaryConstants<A>;
  return as_bits_of<V>(static_cast<U>((as_bits_of<U>(k + C::magic) + C::bias) << C::mantissa));
}

// x * 2^k, rounded once, for an integer k of any size.
template <class V>
FASTPOOL_INLINE V times_power_of_two(V x, V k) {
  constexpr typename Lanes<V>::element most = ElementaryConstants<typename Lanes<V>::element>::most;
  const V zero{}, one = zero + most, two = zero + 2 * most;
  k = k < -two ? -two : k;
  k = k > two ? two : k;
  V first = k < -one ? -one : k;
  first = first > one ? one : first;
  return (x * power_of_two(first)) * power_of_two(k - first);
}

// 2^(smaller - larger), for integers of any size or -inf; 1 where they are equal.
template <class V>
FASTPOOL_INLINE V power_between(V smaller, V larger) {
  const V zero{}, one = zero + 1;
  return times_power_of_two(one, smaller == larger ? zero : smaller - larger);
}

// p and an integer n with e^x = p 2^n; p is between 0.7 and 1.42. Where x is so large that n is beyond all exponents, p
// is coarse. -inf: 0 and -inf; NaN and inf: NaN and -inf.
template <class V>
struct Exponential {
  V p, n;
};
template <class V>
FASTPOOL_INLINE Exponential<V> exponential(V x) {
  using A = typename Lanes<V>::element;
  using U = typename Lanes<V>::bits;
  using C = ElementaryConstants<A>;
  constexpr A inf = static_cast<A>(__builtin_inff()), high = C::log2_e_high, low = C::log2_e_low;
  const V zero{}, one = zero + 1, largest = zero + C::largest, integers = zero + C::integers;
  V s = x - x == zero ? x : zero;
  s = s < -largest ? -largest : s;
  s = s > largest ? largest : s;
  const V t = s * static_cast<A>(static_cast<double>(high) + static_cast<double>(low));
  const V magic = t < zero ? -integers : integers;  // whose neighbours are integers
  V n = (t + magic) - magic;
  const V upper = as_bits_of<V>(static_cast<U>(as_bits_of<U>(s) & C::upper_half));
  V f = (upper * high - n) + ((s - upper) * high + s * low);
  const auto small = (t < zero ? -t : t) < integers;
  n = small ? n : t;
  f = small ? f : zero;
  V p = zero;
  for (int i = 0; i < C::degree; ++i) p = p * f + C::exp2(i);
  p = one + f * p;
  const V none = zero - inf;
  p = x - x == zero ? p : (x == none ? zero : zero + static_cast<A>(__builtin_nanf("")));
  n = x - x == zero ? n : none;
  return {p, n};
}

}  // namespace fastpool
