// What the ops of every device share: a kernel for each mode, and the turn to Python, where another backend was asked
// for or an argument is not what the op takes.
#pragma once
#include <torch/csrc/stable/library.h>

#include <new>
#include <utility>

#include "arguments.h"
#include "native.h"

namespace fastpool {

// The same call through Python's dispatch; its error, if any, comes back with its own words.
inline void run_in_python(const char* name, StableIValue* stack) {
  const std::string op = std::string("fastpool::_python_") + name;
  if (torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION) != 0)
    throw std::runtime_error(native::take_error());
}
inline bool ran_in_python(const char* name, StableIValue* stack, int device, int64_t hidden_bytes) {
  if (!native::goes_through_python(device, hidden_bytes)) return false;
  run_in_python(name, stack);
  return true;
}

// These words make it an OutOfMemoryError for callers in Python (errors.py).
inline std::runtime_error out_of_memory(const char* name, const std::string& why) {
  return std::runtime_error(std::string("fastpool.") + name + ": not enough memory: " + why);
}

// Results, as the stack takes them.
inline void put(StableIValue* stack, Tensor result) { stack[0] = torch::stable::detail::from(result.release()); }
inline void put(StableIValue* stack, std::pair<Tensor, Tensor> results) {
  stack[0] = torch::stable::detail::from(results.first.release());
  stack[1] = torch::stable::detail::from(results.second.release());
}

// Puts what `body` makes from the arguments on the stack. Where it refuses one of them, Python is asked,
// whose checks have words for what is wrong; a program without it gets the argument's name.
template <class Arguments, class Body>
void answer(const char* name, StableIValue* stack, Arguments& arguments, Body body) {
  try {
    put(stack, body());
  } catch (const Refused& refused) {
    if (!native::python_may_explain())
      throw std::runtime_error(std::string("fastpool.") + name + ": not a valid argument: " + refused.argument);
    arguments.put_back(stack);
    run_in_python(name, stack);
  } catch (const NoMemory& refused) {
    throw out_of_memory(name, refused.words() + " bytes were asked for");
  } catch (const std::bad_alloc&) {
    throw out_of_memory(name, "there is none to work in");
  }
}

// `pool(code)`: a mode's boxed function, its argument a compile-time constant.
template <class Pool, int... codes>
void register_modes(torch::stable::detail::StableLibrary& m, Pool pool, std::integer_sequence<int, codes...>) {
  (m.impl(kModes[codes].name, pool(std::integral_constant<int, codes>())), ...);
}
template <class Pool>
void register_modes(torch::stable::detail::StableLibrary& m, Pool pool) {
  register_modes(m, pool, std::make_integer_sequence<int, kModeCount>());
}

}  // namespace fastpool
