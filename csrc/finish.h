// What follows a reduction, as far as a CPU and a GPU do it alike: the divisor, and the scale of a norm.
#pragma once
#include "state.h"

namespace fastpool {

// What a mode divides by: 0 where there is no real token, or weights add up to nothing. Then the quotient is 0.
// `square_root` is correctly rounded.
template <class A, class SquareRoot>
FASTPOOL_INLINE A divisor_of(Divisor divisor, const Totals& totals, SquareRoot square_root) {
  if (totals.count == 0) return 0;
  switch (divisor) {
    case Divisor::count: return static_cast<A>(totals.count);
    case Divisor::sqrt_count: return square_root(static_cast<A>(totals.count));
    case Divisor::weight: return static_cast<A>(totals.weight);
    default: return 1;
  }
}
// Whether the divisor depends on how many real tokens there are, or on their weights, so that a gradient has to look at
// all of them again.
FASTPOOL_HOST_DEVICE constexpr bool counts_tokens(Divisor divisor) {
  return divisor == Divisor::count || divisor == Divisor::sqrt_count;
}
FASTPOOL_HOST_DEVICE constexpr bool adds_up_weights(Divisor divisor) { return divisor == Divisor::weight; }

// What a vector is scaled by whose squares add up to this. One below eps stays as it is where eps * scale might
// overflow: nothing is divided by its norm.
template <class A>
FASTPOOL_INLINE A norm_scale(A squares, A eps) {
  constexpr A scale = sizeof(A) == 4 ? static_cast<A>(kNormScale32) : static_cast<A>(kNormScale64);
  if (squares == static_cast<A>(__builtin_inff())) return scale;
  return eps < scale && squares < scale * scale ? 1 / scale : 1;
}

}  // namespace fastpool
