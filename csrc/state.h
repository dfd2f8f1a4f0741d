// What is known of a segment after some of its tokens: a value per column, and totals. V is a scalar on a GPU and a
// vector of lanes on a CPU; each lane is one column, so the order of additions is the same.
#pragma once
#include "elementary.h"
#include "pool.h"

namespace fastpool {

// What a part of a segment carries besides its columns.
struct Totals {
  int64_t count = 0;  // real tokens
  double weight = 0;  // sum of weights, in the accumulator's precision
};

// Of a softmax, whose weights are e^score / 2^exponent: the largest exponent so far. Sums are scaled by powers of two
// where it grows, so that they have the bits that they would have if the largest were known from the start.
template <class A>
struct Softmax {
  A exponent = -static_cast<A>(__builtin_inff()), weight = 0;

  // `left` stands before `right`; what the columns of either are multiplied by before they are added.
  FASTPOOL_INLINE Softmax merge(const Softmax& left, const Softmax& right, A& of_left, A& of_right) {
    Softmax both;
    both.exponent = left.exponent < right.exponent ? right.exponent : left.exponent;
    of_left = power_between(left.exponent, both.exponent);
    of_right = power_between(right.exponent, both.exponent);
    both.weight = left.weight * of_left + right.weight * of_right;
    return both;
  }
};

// The maximum: the first of equals (and a NaN) stays, whatever the shape of the tree. Vectors of lanes may have a
// shorter way (cpu/vec.h).
template <class V>
struct Maximum {
  FASTPOOL_INLINE V of(V left, V right) { return ((left == left) & !(right <= left)) ? right : left; }
};

// ln(1 + max(x, 0)), and ln(1 + y) of that once more; 0 for -0, NaN for NaN.
template <class V>
FASTPOOL_INLINE V activate(V x, Activation activation) {
  const V y = log1p(x <= 0 ? V{} : x);
  return activation == Activation::log1p_relu ? log1p(y) : y;
}

template <Weight W, Reduce R, Activation of_tokens = Activation::none>
struct State {
  static constexpr bool weighted = W != Weight::one;
  static constexpr bool softmax = W == Weight::score || W == Weight::query;
  static constexpr bool queried = W == Weight::query;  // weights depend on states
  static constexpr int count = 1;                      // of states
  static constexpr bool several = false;
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
      return Maximum<V>::of(left, right);
    else
      return left + right;
  }
  // Weights multiply, then add: contraction is off in every build.
  template <class V, class A>
  FASTPOOL_INLINE V update(V state, V token, [[maybe_unused]] A weight) {
    if constexpr (weighted)
      return merge<V>(state, token * weight);
    else if constexpr (of_tokens != Activation::none)
      return merge<V>(state, activate(token, of_tokens));
    else
      return merge<V>(state, token);
  }
};

using SumState = State<Weight::one, Reduce::sum>;
using WeightedState = State<Weight::token, Reduce::sum>;
using SoftmaxState = State<Weight::score, Reduce::sum>;
using AttentionState = State<Weight::query, Reduce::sum>;
using MaxState = State<Weight::one, Reduce::max>;
// The gradient of a query: a sum of states whose weights depend on them.
struct QueryGradientState : WeightedState {
  static constexpr bool queried = true;
};

// States of several modes that are updated together.
template <class... S>
struct Together {
  static constexpr int count = sizeof...(S);
  static constexpr bool weighted = (S::weighted || ...), softmax = false, queried = false, several = true;
};

// Of logits that are activated before they are added.
template <Activation A>
using ActivatedState = State<Weight::one, Reduce::sum, A>;

// body(State) of a mode: kernels are compiled once for each kind of state.
template <class Body>
inline auto with_state(const Mode& mode, Body body) {
  if (mode.reduce == Reduce::max) return body(MaxState{});
  if (mode.weight == Weight::token) return body(WeightedState{});
  if (mode.weight == Weight::score) return body(SoftmaxState{});
  if (mode.weight == Weight::query) return body(AttentionState{});
  return body(SumState{});
}
// The same, of logits too, which gradients never see as such.
template <class Body>
inline auto with_any_state(const Mode& mode, Body body) {
  if (!mode.activates_tokens()) return with_state(mode, body);
  if (mode.activation == Activation::relu) return body(ActivatedState<Activation::relu>{});
  return body(ActivatedState<Activation::log1p_relu>{});
}

// Which states several modes have, which take no scores: they stand in this order, each once.
struct StatesOfSeveral {
  bool sum = false, weighted = false, max = false;

  explicit StatesOfSeveral(const Several& several) {
    for (int i = 0; i < several.count; ++i) {
      const Mode& mode = several.modes[i];
      if (mode.one_token()) continue;  // those have none
      (mode.reduce == Reduce::max ? max : mode.weighted() ? weighted : sum) = true;
    }
  }
  int count() const { return sum + weighted + max; }
  int place_of(const Mode& mode) const {
    return mode.reduce == Reduce::max ? sum + weighted : mode.weighted() ? sum : 0;
  }
  // body(Together) of them.
  template <class Body>
  auto with(Body body) const {
    if (sum && weighted && max) return body(Together<SumState, WeightedState, MaxState>{});
    if (sum && weighted) return body(Together<SumState, WeightedState>{});
    if (sum && max) return body(Together<SumState, MaxState>{});
    if (weighted && max) return body(Together<WeightedState, MaxState>{});
    if (weighted) return body(Together<WeightedState>{});
    if (max) return body(Together<MaxState>{});
    return body(Together<SumState>{});
  }
};

constexpr bool every_mode_has_a_state() {
  for (const Mode& mode : kModes)
    if (mode.reduce == Reduce::max && mode.weight != Weight::one) return false;
  return true;
}
static_assert(every_mode_has_a_state(), "with_state knows no maximum of weighted tokens");

}  // namespace fastpool
