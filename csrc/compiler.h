// What is said to compilers, of host code and of device code.
#pragma once

// The library hides its symbols; these few are for fastpool._native (info.cpp).
#define FASTPOOL_API __attribute__((visibility("default")))
#if defined(__CUDACC__)
#define FASTPOOL_HOST_DEVICE __host__ __device__
#define FASTPOOL_INLINE __host__ __device__ __forceinline__ static
#else
#define FASTPOOL_HOST_DEVICE
// Always inlined: a kernel file built for AVX-512 must leave no shared copy that the linker could hand to another file.
#define FASTPOOL_INLINE __attribute__((always_inline)) static inline
#endif
