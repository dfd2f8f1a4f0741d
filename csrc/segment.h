// Where a segment's real tokens are, and which of them a mode looks at.
#pragma once
#include "pool.h"

namespace fastpool {

struct Segment {
  int64_t begin, end;  // from the first real token to behind the last one; holes stay inside
};

// Whether the token at row `i` of sequence `b` is real, given its segment holds it.
FASTPOOL_INLINE bool is_real(const PerToken& mask, int64_t b, int64_t i) {
  if (mask.data == nullptr) return true;
  const int64_t at = b * mask.batch_stride + i * mask.stride;
  switch (mask.bytes) {
    case 1: return static_cast<const uint8_t*>(mask.data)[at] != 0;
    case 2: return static_cast<const uint16_t*>(mask.data)[at] != 0;
    case 4: return static_cast<const uint32_t*>(mask.data)[at] != 0;
    default: return static_cast<const uint64_t*>(mask.data)[at] != 0;
  }
}

// How many of the n tokens from row `i` on are real.
template <class T>
FASTPOOL_INLINE int64_t count_nonzero(const T* p, int64_t stride, int64_t n) {
  int64_t count = 0;
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) count += p[j] != 0;
  else
    for (int64_t j = 0; j < n; ++j) count += p[j * stride] != 0;
  return count;
}
FASTPOOL_INLINE int64_t count_real(const PerToken& mask, int64_t b, int64_t i, int64_t n) {
  if (mask.data == nullptr) return n;
  const int64_t at = b * mask.batch_stride + i * mask.stride;
  switch (mask.bytes) {
    case 1: return count_nonzero(static_cast<const uint8_t*>(mask.data) + at, mask.stride, n);
    case 2: return count_nonzero(static_cast<const uint16_t*>(mask.data) + at, mask.stride, n);
    case 4: return count_nonzero(static_cast<const uint32_t*>(mask.data) + at, mask.stride, n);
    default: return count_nonzero(static_cast<const uint64_t*>(mask.data) + at, mask.stride, n);
  }
}

// Whether all of them are, of a mask that holds 0 and 1 alone; of another one it may say no too often. `seen` takes on
// the bits of all values: no others than 0 and 1 were among them if it is one of the two.
template <class T>
FASTPOOL_INLINE bool all_nonzero(const T* p, int64_t stride, int64_t n, uint64_t& seen) {
  T all = static_cast<T>(~T{}), any = 0;
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) all &= p[j], any |= p[j];
  else
    for (int64_t j = 0; j < n; ++j) all &= p[j * stride], any |= p[j * stride];
  seen |= any;
  return all != 0;
}
FASTPOOL_INLINE bool all_real(const PerToken& mask, int64_t b, int64_t i, int64_t n, uint64_t& seen) {
  if (mask.data == nullptr) return true;
  const int64_t at = b * mask.batch_stride + i * mask.stride;
  switch (mask.bytes) {
    case 1: return all_nonzero(static_cast<const uint8_t*>(mask.data) + at, mask.stride, n, seen);
    case 2: return all_nonzero(static_cast<const uint16_t*>(mask.data) + at, mask.stride, n, seen);
    case 4: return all_nonzero(static_cast<const uint32_t*>(mask.data) + at, mask.stride, n, seen);
    default: return all_nonzero(static_cast<const uint64_t*>(mask.data) + at, mask.stride, n, seen);
  }
}

// Whether any of them is. The same tokens of the next sequence are asked for too: a row of a mask is about a page, so
// the hardware starts anew on each, and would fetch padding too late.
template <class T>
FASTPOOL_INLINE bool any_nonzero(const T* p, int64_t stride, int64_t n, const T* next) {
  constexpr int64_t line = 64 / sizeof(T);
  if (stride == 1 && next != nullptr)
    for (int64_t j = 0; j < n; j += line) __builtin_prefetch(next + j);
  T found = 0;
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) found |= p[j];
  else
    for (int64_t j = 0; j < n; ++j) found |= p[j * stride];
  return found != 0;
}
FASTPOOL_INLINE bool any_real(const PoolCall& call, int64_t b, int64_t i, int64_t n) {
  const PerToken& mask = call.mask;
  if (mask.data == nullptr) return true;
  const auto any = [&](auto element) {
    const auto* const p = static_cast<const decltype(element)*>(mask.data) + b * mask.batch_stride + i * mask.stride;
    return any_nonzero(p, mask.stride, n, b + 1 < call.batch ? p + mask.batch_stride : nullptr);
  };
  switch (mask.bytes) {
    case 1: return any(uint8_t{});
    case 2: return any(uint16_t{});
    case 4: return any(uint32_t{});
    default: return any(uint64_t{});
  }
}

// A segment's bounds, padding still inside. A CPU has checked them, a GPU cannot without waiting: they are clamped to
// [0, rows], so that nothing is read out of bounds.
FASTPOOL_INLINE Segment bounds_of(const PoolCall& call, int64_t b) {
  int64_t begin = call.starts.data ? call.starts[b] : 0;
  int64_t end = call.ends.data ? call.ends[b] : call.rows;
  begin = begin < 0 ? 0 : begin;
  end = end > call.rows ? call.rows : end;
  if (begin >= end) return {0, 0};
  return {begin, end};
}

// Without its padding, which one thread skips a leaf at a time, then token by token. A GPU's block does it together.
FASTPOOL_INLINE Segment segment_of(const PoolCall& call, int64_t b) {
  auto [begin, end] = bounds_of(call, b);
  while (end - begin >= kLeaf && !any_real(call, b, begin, kLeaf)) begin += kLeaf;
  while (begin < end && !is_real(call.mask, b, begin)) ++begin;
  while (end - begin >= kLeaf && !any_real(call, b, end - kLeaf, kLeaf)) end -= kLeaf;
  while (begin < end && !is_real(call.mask, b, end - 1)) --end;
  return {begin, end};
}

// Which of them a mode looks at: all, or one.
FASTPOOL_INLINE Segment select(Select which, Segment real) {
  if (which == Select::first && real.begin < real.end) real.end = real.begin + 1;
  if (which == Select::last && real.begin < real.end) real.begin = real.end - 1;
  return real;
}

}  // namespace fastpool
