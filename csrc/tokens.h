// Token outputs: the real tokens themselves, segment by segment.
#pragma once
#include "segment.h"

namespace fastpool {

// The real tokens of each segment, packed: pool.out is [size, dim], contiguous, and +0 behind the last token.
struct TokensCall {
  PoolCall pool;
  int64_t size = 0;
  const int64_t* cu_seqlens = nullptr;  // [batch + 1]: where each segment's tokens stand there
};

// The gradient of its hidden, whose values are not read: a token of several segments adds up in the order of these.
struct TokensBackwardCall {
  PoolCall pool;
  bool padded = true;
  int64_t size = 0;                // rows of the gradient
  const void* gradient = nullptr;  // [size, dim], contiguous, of the accumulator
  const int64_t* cu_seqlens = nullptr;
  void* out = nullptr;  // like hidden, contiguous
  FASTPOOL_HOST_DEVICE int64_t out_rows() const { return padded ? pool.batch * pool.rows : pool.rows; }
};

}  // namespace fastpool
