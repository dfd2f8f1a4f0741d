// The types that token states and results are stored in, and the one that each is added in.
#pragma once
#include <cstdint>

namespace fastpool {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

}  // namespace fastpool
