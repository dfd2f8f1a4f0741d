// Storage types: loads that widen to the accumulator, one rounding back.
#pragma once
#include <cuda_runtime.h>

#include <cstring>

#include "../state.h"
#include "../storage.h"

namespace fastpool::cuda {

#define FASTPOOL_KERNEL_INLINE __device__ __forceinline__ static

template <class To, class From>
FASTPOOL_KERNEL_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- exact
#if defined(__CUDACC__)
FASTPOOL_KERNEL_INLINE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// ---- to nearest even
FASTPOOL_KERNEL_INLINE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
FASTPOOL_KERNEL_INLINE uint16_t float_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// ---- adds to a counter in global memory, and says what it was
FASTPOOL_KERNEL_INLINE int add_acq_rel(int* counter, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
}
#endif

FASTPOOL_KERNEL_INLINE float widen(half_t x) { return half_to_float(x.bits); }
FASTPOOL_KERNEL_INLINE float widen(bfloat16_t x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FASTPOOL_KERNEL_INLINE float widen(float x) { return x; }
FASTPOOL_KERNEL_INLINE double widen(double x) { return x; }

FASTPOOL_KERNEL_INLINE void narrow(float x, half_t& to) { to.bits = float_to_half(x); }
FASTPOOL_KERNEL_INLINE void narrow(float x, bfloat16_t& to) { to.bits = float_to_bfloat16(x); }
FASTPOOL_KERNEL_INLINE void narrow(float x, float& to) { to = x; }
FASTPOOL_KERNEL_INLINE void narrow(float x, double& to) { to = x; }
FASTPOOL_KERNEL_INLINE void narrow(double x, double& to) { to = x; }
FASTPOOL_KERNEL_INLINE void narrow(double x, float& to) { to = static_cast<float>(x); }
// float64 to 16 bits in one rounding: by way of a float32 rounded to odd (towards zero, and the last bit set where that
// lost something), which has bits enough that rounding it again is the same as rounding once (Boldo and Melquiond,
// "Emulation of FMA and Correctly Rounded Sums", IEEE Trans. Comput. 57, 2008).
template <class N>
FASTPOOL_KERNEL_INLINE void narrow(double x, N& to) {
  const float shorter = __double2float_rz(x);
  const bool inexact = x == x && static_cast<double>(shorter) != x;
  narrow(bit_cast<float>(bit_cast<uint32_t>(shorter) | static_cast<uint32_t>(inexact)), to);
}

// ---- several columns at once
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T x[V];
};

// What a pack is on its way: registers as a load fills them.
template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <class T, int V>
using Word = typename WordOf<V * sizeof(T)>::type;

// Tokens are read once and never written meanwhile: one load of the whole pack, by the read-only path.
template <int V, class T>
FASTPOOL_KERNEL_INLINE Word<T, V> load_word(const T* p) {
  return __ldg(reinterpret_cast<const Word<T, V>*>(p));
}
template <int V, class T>
FASTPOOL_KERNEL_INLINE Pack<T, V> load(const T* p) {
  return bit_cast<Pack<T, V>>(load_word<V>(p));
}
// As accumulators, in loads of at most 16 bytes.
template <int V, class T, class A>
FASTPOOL_KERNEL_INLINE void read(const T* p, A (&x)[V]) {
  constexpr int N = V * sizeof(T) <= 16 ? V : 16 / sizeof(T);
#pragma unroll
  for (int k = 0; k < V; k += N) {
    const Pack<T, N> pack = load<N>(p + k);
#pragma unroll
    for (int i = 0; i < N; ++i) x[k + i] = widen(pack.x[i]);
  }
}
template <int V, class T, class A>
FASTPOOL_KERNEL_INLINE void store(T* p, const A (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(x[i], pack.x[i]);
  // Written back like any other store; but of a plain one nvcc makes several where two branches meet before it.
  __stwb(reinterpret_cast<Word<T, V>*>(p), bit_cast<Word<T, V>>(pack));
}

// What a hole adds: +0, or for a maximum -inf.
template <class S, class T, int V>
FASTPOOL_KERNEL_INLINE Word<T, V> neutral() {
  Pack<T, V> pack{};
  if constexpr (!S::starts_from_zero) {
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(-__builtin_inff(), pack.x[i]);
  }
  return bit_cast<Word<T, V>>(pack);
}

FASTPOOL_KERNEL_INLINE float square_root(float x) { return __fsqrt_rn(x); }
FASTPOOL_KERNEL_INLINE double square_root(double x) { return __dsqrt_rn(x); }

}  // namespace fastpool::cuda
