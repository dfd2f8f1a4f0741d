// The table of pooling modes, for host and device code: what each does with the real tokens of a segment. Kernels look
// at a mode's traits and never at which mode it is. A test holds the table to python/fastpool/modes.py.
#pragma once
#include <cstdint>

#include "compiler.h"

namespace fastpool {

enum class Select : uint8_t { all, first, last };                 // which real tokens
enum class Weight : uint8_t { one, token, score, query };         // what each is multiplied by
enum class Reduce : uint8_t { sum, max };                         // how they become one vector
enum class Divisor : uint8_t { one, count, sqrt_count, weight };  // and what that is divided by
enum class Activation : uint8_t { none, relu, log1p_relu };       // of tokens that are added up, or of their maximum

struct Mode {
  const char* name = "";
  Select select = Select::all;
  Weight weight = Weight::one;
  Reduce reduce = Reduce::sum;
  Divisor divisor = Divisor::one;
  Activation activation = Activation::none;

  FASTPOOL_HOST_DEVICE constexpr bool one_token() const { return select != Select::all; }
  FASTPOOL_HOST_DEVICE constexpr bool takes_weights() const { return weight == Weight::token; }
  FASTPOOL_HOST_DEVICE constexpr bool takes_scores() const { return weight == Weight::score; }
  FASTPOOL_HOST_DEVICE constexpr bool takes_query() const { return weight == Weight::query; }
  FASTPOOL_HOST_DEVICE constexpr bool weighted() const { return weight != Weight::one; }
  FASTPOOL_HOST_DEVICE constexpr bool softmax() const { return takes_scores() || takes_query(); }
  // For logits of a vocabulary. Gradients of these go through the mode that reduces alike
  // (python/fastpool/autograd.py).
  FASTPOOL_HOST_DEVICE constexpr bool of_logits() const { return activation != Activation::none; }
  // Before tokens are added up; of a maximum afterwards, which is the same.
  FASTPOOL_HOST_DEVICE constexpr bool activates_tokens() const { return of_logits() && reduce == Reduce::sum; }
  FASTPOOL_HOST_DEVICE constexpr bool activates_result() const { return of_logits() && reduce == Reduce::max; }
  // The gradient of a maximum of several tokens goes to one of them.
  FASTPOOL_HOST_DEVICE constexpr bool gradient_finds_maximum() const { return reduce == Reduce::max && !one_token(); }
};

constexpr Mode kModes[] = {
    {"mean", Select::all, Weight::one, Reduce::sum, Divisor::count},
    {"mean_sqrt_len", Select::all, Weight::one, Reduce::sum, Divisor::sqrt_count},
    {"sum", Select::all, Weight::one, Reduce::sum, Divisor::one},
    {"max", Select::all, Weight::one, Reduce::max, Divisor::one},
    {"cls", Select::first, Weight::one, Reduce::max, Divisor::one},
    {"last", Select::last, Weight::one, Reduce::max, Divisor::one},
    {"weighted_mean", Select::all, Weight::token, Reduce::sum, Divisor::weight},
    {"softmax_mean", Select::all, Weight::score, Reduce::sum, Divisor::weight},
    {"attention", Select::all, Weight::query, Reduce::sum, Divisor::weight},
    {"splade_max_relu", Select::all, Weight::one, Reduce::max, Divisor::one, Activation::relu},
    {"splade_max_log1p_relu", Select::all, Weight::one, Reduce::max, Divisor::one, Activation::log1p_relu},
    {"splade_sum_relu", Select::all, Weight::one, Reduce::sum, Divisor::one, Activation::relu},
    {"splade_sum_log1p_relu", Select::all, Weight::one, Reduce::sum, Divisor::one, Activation::log1p_relu},
};
// Tokens times weights that no argument holds: the gradient of a query.
constexpr Mode kWeightedSum = {"", Select::all, Weight::token, Reduce::sum, Divisor::one};
constexpr int kModeCount = sizeof(kModes) / sizeof(kModes[0]);

}  // namespace fastpool
