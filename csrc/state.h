// What is known of a segment after some of its tokens: a value per column, and totals. V is a scalar on a GPU and a
// vector of lanes on a CPU; each lane is one column, so the order of additions is the same.
#pragma once
#include "pool.h"

namespace fastpool {

// What a part of a segment carries besides its columns.
struct Totals {
  int64_t count = 0;  // real tokens
  double weight = 0;  // sum of weights, in the accumulator's precision
};

template <Weight W, Reduce R>
struct State {
  static constexpr bool weighted = W == Weight::token;
  static constexpr bool starts_from_zero = R == Reduce::sum;

  // The neutral value. Sums start from +0, so that no partial sum is ever -0 and adding an empty leaf changes no bit.
  template <class V, class A>
  FASTPOOL_INLINE V init(A) {
    return starts_from_zero ? V{} : V{} - static_cast<A>(__builtin_inff());
  }
  // `left` stands before `right` in the sequence.
  template <class V>
  FASTPOOL_INLINE V merge(V left, V right) {
    if constexpr (R == Reduce::max)
      // The first of equals (and the first NaN) stays, whatever the shape of the tree.
      return (left == left) & !(right <= left) ? right : left;
    else
      return left + right;
  }
  // Weights multiply, then add: contraction is off in every build.
  template <class V, class A>
  FASTPOOL_INLINE V update(V state, V token, [[maybe_unused]] A weight) {
    if constexpr (weighted)
      return merge<V>(state, token * weight);
    else
      return merge<V>(state, token);
  }
};

using SumState = State<Weight::one, Reduce::sum>;
using WeightedState = State<Weight::token, Reduce::sum>;
using MaxState = State<Weight::one, Reduce::max>;

// body(State) of a mode: kernels are compiled once for each kind of state.
template <class Body>
inline auto with_state(const Mode& mode, Body body) {
  if (mode.reduce == Reduce::max) return body(MaxState{});
  if (mode.weight == Weight::token) return body(WeightedState{});
  return body(SumState{});
}

constexpr bool every_mode_has_a_state() {
  for (const Mode& mode : kModes)
    if (mode.reduce == Reduce::max && mode.weight != Weight::one) return false;
  return true;
}
static_assert(every_mode_has_a_state(), "with_state knows no maximum of weighted tokens");

}  // namespace fastpool
