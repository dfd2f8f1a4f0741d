// What the ops of every device share: a kernel for each mode, and the turn to Python where another backend was asked
// for.
#pragma once
#include <torch/csrc/stable/library.h>

#include <utility>

#include "arguments.h"
#include "native.h"

namespace fastpool {

// The same call through Python's dispatch; its error, if any, comes back with its own words.
inline bool redirected(const char* name, StableIValue* stack, bool cuda, int64_t hidden_bytes) {
  if (!native::redirecting(cuda, hidden_bytes)) return false;
  const std::string op = std::string("fastpool::_python_") + name;
  if (torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION) != 0)
    throw std::runtime_error(native::take_error());
  return true;
}

// `kernel(code)`: a mode's boxed function, the code a compile-time constant.
template <class Kernel, int... codes>
void fill(torch::stable::detail::StableLibrary& m, Kernel kernel, std::integer_sequence<int, codes...>) {
  (m.impl(kModeNames[codes], kernel(std::integral_constant<int, codes>())), ...);
}
template <class Kernel>
void fill(torch::stable::detail::StableLibrary& m, Kernel kernel) {
  fill(m, kernel, std::make_integer_sequence<int, kModes>());
}

}  // namespace fastpool
