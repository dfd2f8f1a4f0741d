// Fills the CPU key of the ops that python/fastpool/ops.py defines. A call comes straight from torch's dispatcher:
// check, allocate, run. Only when this thread has asked for another backend does it turn to Python.
#include <torch/csrc/stable/library.h>

#include <exception>
#include <mutex>
#include <utility>

#include "arguments.h"
#include "cpu/pool_cpu.h"
#include "native.h"

namespace fastpool {
namespace {

// at::parallel_for through the C shim, one index at a time; an exception travels to the caller.
void torch_parallel(int64_t n, const std::function<void(int64_t)>& body) {
  struct Context {
    const std::function<void(int64_t)>& body;
    std::exception_ptr error;
    std::mutex lock;
  } context{body, nullptr, {}};
  check_api(torch_parallel_for(
                0, n, 1,
                [](int64_t begin, int64_t end, void* raw) {
                  Context& context = *static_cast<Context*>(raw);
                  try {
                    for (int64_t i = begin; i < end; ++i) context.body(i);
                  } catch (...) {
                    const std::lock_guard<std::mutex> guard(context.lock);
                    context.error = std::current_exception();
                  }
                },
                &context),
            "a parallel loop");
  if (context.error) std::rethrow_exception(context.error);
}

cpu::Parallel parallel() {
  uint32_t threads = 1;
  check_api(torch_get_num_threads(&threads), "its number of threads");
  return {static_cast<int>(threads), torch_parallel};
}

// The same call through Python's dispatch; its error, if any, comes back with its own words.
bool redirected(const char* name, StableIValue* stack) {
  if (!native::redirecting()) return false;
  const std::string op = std::string("fastpool::_python_") + name;
  if (torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION) != 0)
    throw std::runtime_error(native::take_error());
  return true;
}

template <int code>
void pool(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = kModeNames[code];
  constexpr Mode mode = static_cast<Mode>(code);
  if (redirected(name, stack)) return;
  const PoolArguments arguments(stack, mode == Mode::weighted_mean);
  PoolCall call = arguments.call(mode, name);
  // The output first: a batch that no memory can hold fails here, not after walking over all of it.
  const int64_t sizes[] = {call.batch, call.dim};
  Tensor out = empty_cpu(2, sizes, torch_dtype(call.out_dtype));
  call.out = out.mutable_data();
  const std::string wrong = cpu::check_bounds(call, static_cast<bool>(arguments.cu_seqlens));
  check(wrong.empty(), [&] { return std::string("fastpool.") + name + ": " + wrong; });
  cpu::pool(call, parallel());
  stack[0] = torch::stable::detail::from(out.release());
}

void l2_normalize(StableIValue* stack, uint64_t, uint64_t) {
  if (redirected("l2_normalize", stack)) return;
  const NormalizeArguments arguments(stack);
  NormalizeCall call = arguments.call("l2_normalize");
  std::vector<int64_t> sizes(arguments.x.sizes(), arguments.x.sizes() + arguments.x.dim());
  sizes.back() = call.dim;
  Tensor out = empty_cpu(static_cast<int64_t>(sizes.size()), sizes.data(), torch_dtype(call.out_dtype));
  call.out = out.mutable_data();
  cpu::l2_normalize(call, parallel());
  stack[0] = torch::stable::detail::from(out.release());
}

template <int... codes>
void fill(torch::stable::detail::StableLibrary& m, std::integer_sequence<int, codes...>) {
  (m.impl(kModeNames[codes], pool<codes>), ...);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpool, CPU, m) {
  fill(m, std::make_integer_sequence<int, kModes>());
  m.impl("l2_normalize", l2_normalize);
}

}  // namespace fastpool
