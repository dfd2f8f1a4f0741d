// What a real token is multiplied by: given weights, or else its position; and the scores whose exponentials are.
#pragma once
#include "pool.h"
#include "storage.h"

namespace fastpool {

// What stands for the token at row `i` of sequence `b`. `widen(p)` is the value at p in the accumulator's dtype or a
// narrower one.
template <class A, class Widen>
FASTPOOL_INLINE A value_of(const PerToken& values, int64_t b, int64_t i, Widen widen) {
  const int64_t at = b * values.batch_stride + i * values.stride;
  switch (values.dtype) {
    case DType::float16: return widen(static_cast<const half_t*>(values.data) + at);
    case DType::bfloat16: return widen(static_cast<const bfloat16_t*>(values.data) + at);
    case DType::float32: return static_cast<const float*>(values.data)[at];
    default: return static_cast<A>(static_cast<const double*>(values.data)[at]);
  }
}

// The weight of the token at row `i` of sequence `b`, whose first real token is at `first`: without weights its
// position, which counts 1, 2, 3, ... from there, holes included.
template <class A, class Widen>
FASTPOOL_INLINE A weight_of(const PoolCall& call, int64_t b, int64_t first, int64_t i, Widen widen) {
  const PerToken& weights = call.weights;
  if (weights.data == nullptr) return static_cast<A>(i - first + 1);
  return value_of<A>(weights, b, i, widen);
}

}  // namespace fastpool
