// What a quantising call is, and how a value becomes a whole number, for host and device code alike. V is a scalar on a
// GPU and a vector of lanes on a CPU.
#pragma once
#include "elementary.h"
#include "pool.h"

namespace fastpool {

// How a value becomes a byte, or a bit of one; and the kinds, in the order of KINDS (python/fastpool/kinds.py).
enum class How : uint8_t { buckets, tanh, bits };
struct Kind {
  How how = How::buckets;
  bool is_signed = true;  // what the bytes are for torch
  uint8_t flip = 0;       // that a byte is exclusive-ored with: in two's complement 0x80 subtracts 128
};
constexpr Kind kKinds[] = {{How::buckets, true, 0x80},
                           {How::buckets, false, 0},
                           {How::bits, true, 0x80},
                           {How::bits, false, 0},
                           {How::tanh, true, 0}};
constexpr int kKindCount = sizeof kKinds / sizeof kKinds[0];

struct QuantizeCall {
  Kind kind;
  bool zero_bit = false;
  DType dtype = DType::float32;
  int64_t rows = 0, dim = 0;
  const void* x = nullptr;
  int leading = 0;  // leading dimensions
  const int64_t *sizes = nullptr, *strides = nullptr;
  const float *low = nullptr, *high = nullptr;  // of each column, side by side; where there are buckets
  void* out = nullptr;                          // [rows, out_columns()], contiguous
  FASTPOOL_HOST_DEVICE int64_t out_columns() const { return kind.how == How::bits ? (dim + 7) / 8 : dim; }
};

// The width of a bucket.
FASTPOOL_INLINE float step_of(float low, float high) {
  const float step = (high - low) / 255;
  return step == 0 ? 1 : step;
}

// A number from 0 to 255 whose whole part is the bucket. NaN gets the one whose byte is 0.
template <class V>
FASTPOOL_INLINE V bucket_of(V x, V low, V step, uint8_t flip) {
  const V zero{}, last = zero + 255;
  V bucket = (x - low) / step;
  bucket = bucket < zero ? zero : bucket;
  bucket = bucket > last ? last : bucket;
  return bucket == bucket ? bucket : zero + flip;
}

// 127 tanh(x) to the nearest whole number, in ties to the even one; 0 of NaN.
template <class V>
FASTPOOL_INLINE V scaled_tanh(V x) {
  constexpr auto magic = ElementaryConstants<typename Lanes<V>::element>::magic;
  const V scaled = tanh(x) * 127;
  return scaled == scaled ? (scaled + magic) - magic : V{};
}

// Whether its bit is 1; of a vector a mask.
template <class V>
FASTPOOL_INLINE auto is_one(V x, bool zero_bit) {
  return zero_bit ? x >= V{} : x > V{};
}

}  // namespace fastpool
