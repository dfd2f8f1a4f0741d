// What a real token is multiplied by: given weights, or else its position.
#pragma once
#include "pool.h"
#include "storage.h"

namespace fastpool {

// The weight of the token at row `i` of sequence `b`, whose first real token is at `first`: without weights its
// position, which counts 1, 2, 3, ... from there, holes included. `widen(p)` is the value at p in the accumulator's
// dtype or a narrower one.
template <class A, class Widen>
FASTPOOL_INLINE A weight_of(const PoolCall& call, int64_t b, int64_t first, int64_t i, Widen widen) {
  const PerToken& weights = call.weights;
  if (weights.data == nullptr) return static_cast<A>(i - first + 1);
  const int64_t at = b * weights.batch_stride + i * weights.stride;
  switch (weights.dtype) {
    case DType::float16: return widen(static_cast<const half_t*>(weights.data) + at);
    case DType::bfloat16: return widen(static_cast<const bfloat16_t*>(weights.data) + at);
    case DType::float32: return static_cast<const float*>(weights.data)[at];
    default: return static_cast<A>(static_cast<const double*>(weights.data)[at]);
  }
}

}  // namespace fastpool
