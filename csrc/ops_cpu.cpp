// Fills the CPU key of the ops that python/fastpool/ops.py defines. A call comes straight from torch's dispatcher:
// check, allocate, run. Only when this thread has asked for another backend does it turn to Python.
#include <exception>
#include <mutex>

#include "cpu/pool_cpu.h"
#include "ops.h"

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

template <int code>
void pool(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = kModeNames[code];
  constexpr Mode mode = static_cast<Mode>(code);
  if (redirected(name, stack, native::kCpu, 0)) return;
  const PoolArguments arguments(stack, takes_weights(mode));
  PoolCall call = arguments.call(mode, name);
  // The output first: a batch that no memory can hold fails here, not after walking over all of it.
  Tensor out = arguments.output(call);
  call.out = out.mutable_data();
  const std::string wrong = cpu::check_bounds(call, static_cast<bool>(arguments.cu_seqlens));
  check(wrong.empty(), [&] { return std::string("fastpool.") + name + ": " + wrong; });
  cpu::pool(call, parallel());
  stack[0] = torch::stable::detail::from(out.release());
}

void check_dims(const NormalizeCall& call) {
  const std::string wrong = cpu::check_dims(call);
  check(wrong.empty(), [&] { return "fastpool.l2_normalize: " + wrong; });
}

void l2_normalize(StableIValue* stack, uint64_t, uint64_t) {
  if (redirected("l2_normalize", stack, native::kCpu, 0)) return;
  const NormalizeArguments arguments(stack);
  NormalizeCall call = arguments.call("l2_normalize");
  Tensor out = arguments.output(call);
  call.out = out.mutable_data();
  check_dims(call);
  cpu::l2_normalize(call, parallel());
  stack[0] = torch::stable::detail::from(out.release());
}

template <int code, bool of_weights>
void pool_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Mode mode = static_cast<Mode>(code);
  static const std::string name = backward_name(mode, of_weights);
  if (redirected(name.c_str(), stack, native::kCpu, 0)) return;
  const PoolBackwardArguments arguments(stack);
  PoolBackwardCall call = arguments.call(mode, of_weights, kModeNames[code]);
  Tensor out = arguments.output(of_weights);
  call.out = out.mutable_data();
  const std::string wrong = cpu::check_bounds(call.pool, static_cast<bool>(arguments.pool.cu_seqlens));
  check(wrong.empty(), [&] { return std::string("fastpool.") + kModeNames[code] + ": " + wrong; });
  cpu::pool_backward(call, parallel());
  stack[0] = torch::stable::detail::from(out.release());
}

void l2_normalize_backward(StableIValue* stack, uint64_t, uint64_t) {
  if (redirected("_l2_normalize_backward", stack, native::kCpu, 0)) return;
  const NormalizeBackwardArguments arguments(stack);
  NormalizeBackwardCall call = arguments.call("l2_normalize");
  Tensor out = arguments.output();
  call.out = out.mutable_data();
  check_dims(call.normalize);
  cpu::l2_normalize_backward(call, parallel());
  stack[0] = torch::stable::detail::from(out.release());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpool, CPU, m) {
  fill(
      m, [](auto code) { return pool<code>; },
      [](auto code, auto of_weights) { return pool_backward<code, of_weights>; });
  m.impl("l2_normalize", l2_normalize);
  m.impl("_l2_normalize_backward", l2_normalize_backward);
}

}  // namespace fastpool
