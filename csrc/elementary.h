// e^x, ln(1 + x) and tanh(x), in IEEE additions, multiplications and divisions: no library's are the same everywhere,
// and these have the bits of python/fastpool/reference/elementary.py, which says how exact they are. V is a scalar on a
// GPU and a vector of lanes on a CPU.
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
  // ln 2 in two parts, the first of so few bits that its product with an exponent is exact; the bits of sqrt(1/2).
  static constexpr float ln_2_high = 0x1.62e4p-1f, ln_2_low = 0x1.7f7d1cp-20f;
  static constexpr Word sqrt_half = 0x3f3504f3, sign = Word{1} << 31;
  // Coefficients, from the highest on: 2^f = 1 + f P(f), ln(1 + f) = 2 s + s^3 L(s^2) with s = f / (2 + f), and
  // tanh(x) = x + x^3 T(x^2) for |x| < tanh_small.
  static constexpr float tanh_small = 0.5625f;
  static constexpr int exp2_terms = 6, log_terms = 3, tanh_terms = 5;
  FASTPOOL_HOST_DEVICE static constexpr float exp2(int i) {
    constexpr float of[] = {0x1.44138ap-13f, 0x1.5f089p-10f, 0x1.3b2a54p-7f,
                            0x1.c6af6cp-5f,  0x1.ebfbep-3f,  0x1.62e43p-1f};
    return of[i];
  }
  FASTPOOL_HOST_DEVICE static constexpr float log(int i) {
    constexpr float of[] = {0x1.2ee61p-2f, 0x1.997c3p-2f, 0x1.55555cp-1f};
    return of[i];
  }
  FASTPOOL_HOST_DEVICE static constexpr float tanh(int i) {
    constexpr float of[] = {-0x1.aba8fp-8f, 0x1.5c60f8p-6f, -0x1.b9902cp-5f, 0x1.110fb4p-3f, -0x1.555554p-2f};
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
  static constexpr double ln_2_high = 0x1.62e42fefa38p-1, ln_2_low = 0x1.ef35793c7673p-45;
  static constexpr Word sqrt_half = 0x3fe6a09e667f3bcd, sign = Word{1} << 63;
  static constexpr double tanh_small = 0.5625;
  static constexpr int exp2_terms = 12, log_terms = 7, tanh_terms = 11;
  FASTPOOL_HOST_DEVICE static constexpr double exp2(int i) {
    constexpr double of[] = {0x1.c4a29324a1038p-36, 0x1.e9ec1fcb69a7fp-32, 0x1.e4cf10dec0f59p-28, 0x1.b524ebd13a55fp-24,
                             0x1.62c02242b879cp-20, 0x1.ffcbfc6da6ed1p-17, 0x1.430912f86b7dbp-13, 0x1.5d87fe78a3f9cp-10,
                             0x1.3b2ab6fba4e79p-7,  0x1.c6b08d704a0c6p-5,  0x1.ebfbdff82c58fp-3,  0x1.62e42fefa39efp-1};
    return of[i];
  }
  FASTPOOL_HOST_DEVICE static constexpr double log(int i) {
    constexpr double of[] = {0x1.2b584aae78a57p-3, 0x1.39fe606542ddep-3, 0x1.7462b4ab2ef6bp-3, 0x1.c71c62e5800a1p-3,
                             0x1.2492492df148dp-2, 0x1.99999999952e2p-2, 0x1.5555555555558p-1};
    return of[i];
  }
  FASTPOOL_HOST_DEVICE static constexpr double tanh(int i) {
    constexpr double of[] = {-0x1.4ffe31971aeb8p-16, 0x1.616f17dcc6fd8p-14,  -0x1.eaf47874aab53p-13,
                             0x1.34ad2f7abd75ap-11,  -0x1.7d9545835e3e5p-10, 0x1.d6d30f918e945p-9,
                             -0x1.226e32212f8e9p-7,  0x1.664f48727bbfdp-6,   -0x1.ba1ba1b9f19a0p-5,
                             0x1.1111111110fbep-3,   -0x1.5555555555555p-2};
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

template <auto coefficient, int terms, class V>
FASTPOOL_INLINE V polynomial(V x) {
  V p{};
  for (int i = 0; i < terms; ++i) p = p * x + coefficient(i);
  return p;
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

// p and an integer n with e^x = p 2^n; p is between 0.7 and 1.42, and coarse where x is so large that its last place
// is. -inf: 0 and -inf; NaN and inf: NaN and -inf.
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
  V p = one + f * polynomial<C::exp2, C::exp2_terms>(f);
  const V none = zero - inf;
  p = x - x == zero ? p : (x == none ? zero : zero + static_cast<A>(__builtin_nanf("")));
  n = x - x == zero ? n : none;
  return {p, n};
}

// e^x. -inf: 0; inf: inf; NaN: NaN.
template <class V>
FASTPOOL_INLINE V exp(V x) {
  const V zero{}, inf = zero + static_cast<typename Lanes<V>::element>(__builtin_inff());
  const Exponential<V> e = exponential(x);
  return times_power_of_two(x == inf ? x : e.p, e.n == -inf ? zero : e.n);
}

// ln(1 + x) for x >= 0. 0 and -0: 0; inf: inf; below 0 and NaN: NaN.
template <class V>
FASTPOOL_INLINE V log1p(V x) {
  using A = typename Lanes<V>::element;
  using U = typename Lanes<V>::bits;
  using C = ElementaryConstants<A>;
  const V zero{}, one = zero + 1, most = zero + C::most, inf = zero + static_cast<A>(__builtin_inff());
  V s = x >= zero ? x : zero;
  s = s < inf ? s : zero;
  // 1 + x = 2^k (1 + f), with f rounded once: x 2^-k is exact, and so is 2^-k - 1 unless it is lost in any case.
  const U exponent = static_cast<U>((as_bits_of<U>(one + s) - C::sqrt_half) >> C::mantissa);
  const V k = as_bits_of<V>(static_cast<U>(exponent + as_bits_of<U>(zero + C::magic))) - C::magic;
  const V part = as_bits_of<V>(static_cast<U>(as_bits_of<U>(s) - (exponent << C::mantissa)));
  const V f = part + (power_of_two(k > most ? -most : -k) - one);
  const V quotient = f / (one + one + f), square = quotient * quotient, half = static_cast<A>(0.5) * f * f;
  // f - f^2 / 2 + what is left of the logarithm, which the smaller terms are added up for first.
  const V rest = quotient * (half + square * polynomial<C::log, C::log_terms>(square)) + k * C::ln_2_low;
  const V result = k * C::ln_2_high + (f - (half - rest));
  const V beyond = x == inf ? x : zero + static_cast<A>(__builtin_nanf(""));
  return x >= zero ? (x < inf ? result : beyond) : beyond;
}

// An odd function in every bit. NaN: NaN.
template <class V>
FASTPOOL_INLINE V tanh(V x) {
  using A = typename Lanes<V>::element;
  using U = typename Lanes<V>::bits;
  using C = ElementaryConstants<A>;
  const V zero{}, one = zero + 1;
  const U sign = static_cast<U>(as_bits_of<U>(x) & C::sign);
  const V magnitude = as_bits_of<V>(static_cast<U>(as_bits_of<U>(x) ^ sign)), square = magnitude * magnitude;
  const V near = magnitude + magnitude * square * polynomial<C::tanh, C::tanh_terms>(square);
  const V far = one - (one + one) / (exp(magnitude + magnitude) + one);
  return as_bits_of<V>(static_cast<U>(as_bits_of<U>(magnitude < C::tanh_small ? near : far) | sign));
}

}  // namespace fastpool
