// What the ops of every device share: a kernel for each mode, and the turn to Python where another backend was asked
// for.
#pragma once
#include <torch/csrc/stable/library.h>

#include <utility>

#include "arguments.h"
#include "native.h"

namespace fastpool {

// As python/fastpool/ops.py names it.
inline std::string backward_name(Mode mode, bool of_weights) {
  return std::string("_") + kModeNames[static_cast<int>(mode)] + "_backward" + (of_weights ? "_weights" : "");
}

// The same call through Python's dispatch; its error, if any, comes back with its own words.
inline bool redirected(const char* name, StableIValue* stack, int device, int64_t hidden_bytes) {
  if (!native::redirecting(device, hidden_bytes)) return false;
  const std::string op = std::string("fastpool::_python_") + name;
  if (torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION) != 0)
    throw std::runtime_error(native::take_error());
  return true;
}

// `forward(code)`, `backward(code, of_weights)`: a mode's boxed functions; both arguments are compile-time constants.
template <class Forward, class Backward, int... codes>
void fill(torch::stable::detail::StableLibrary& m, Forward forward, Backward backward,
          std::integer_sequence<int, codes...>) {
  const auto one = [&](auto code) {
    constexpr Mode mode = static_cast<Mode>(code());
    m.impl(kModeNames[code()], forward(code));
    m.impl(backward_name(mode, false).c_str(), backward(code, std::false_type()));
    if constexpr (takes_weights(mode)) m.impl(backward_name(mode, true).c_str(), backward(code, std::true_type()));
  };
  (one(std::integral_constant<int, codes>()), ...);
}
template <class Forward, class Backward>
void fill(torch::stable::detail::StableLibrary& m, Forward forward, Backward backward) {
  fill(m, forward, backward, std::make_integer_sequence<int, kModes>());
}

}  // namespace fastpool
