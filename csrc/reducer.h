// The second idea: how real tokens become one vector. A mode is init / update / merge / finish, and differs nowhere
// else. V is a scalar on a GPU and a vector of lanes on a CPU; each lane is one column, so the order of additions is
// the same.
#pragma once
#include "segments.h"

namespace fastpool {

// Modes that reduce in the same way share a family and differ in their divisor.
enum class Family { sum, weighted, max, gather };

constexpr Family family_of(Mode mode) {
  return mode == Mode::max                         ? Family::max
         : mode == Mode::weighted_mean             ? Family::weighted
         : mode == Mode::cls || mode == Mode::last ? Family::gather
                                                   : Family::sum;
}

// State that a part of a segment carries besides its [dim] sums.
struct Totals {
  int64_t count = 0;  // real tokens
  double weight = 0;  // sum of weights, in the accumulator's precision
};

template <Family F>
struct Reducer {
  // The neutral value. Sums start from +0, so that no partial sum is ever -0 and adding an empty leaf changes no bit.
  template <class V, class A>
  FASTPOOL_INLINE V init(A) {
    return F == Family::max ? V{} - static_cast<A>(__builtin_inff()) : V{};
  }
  // `left` stands before `right` in the sequence.
  template <class V>
  FASTPOOL_INLINE V merge(V left, V right) {
    if constexpr (F == Family::max)
      // The first of equals (and the first NaN) stays, whatever the shape of the tree.
      return (left == left) & !(right <= left) ? right : left;
    else
      return left + right;
  }
  // Weights multiply, then add: contraction is off in every build.
  template <class V, class A>
  FASTPOOL_INLINE V update(V acc, V token, [[maybe_unused]] A weight) {
    if constexpr (F == Family::weighted)
      return merge<V>(acc, token * weight);
    else
      return merge<V>(acc, token);
  }
};

}  // namespace fastpool
