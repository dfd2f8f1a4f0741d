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
  constexpr const Mode& mode = kModes[code];
  if (ran_in_python(mode.name, stack, native::kCpu, 0)) return;
  PoolArguments arguments(mode, stack);
  answer(mode.name, stack, arguments, [&] {
    PoolCall call = arguments.call();
    // The output first: a batch that no memory can hold fails here, not after walking over all of it.
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    require(cpu::valid_bounds(call), "bounds");
    require(cpu::pool(call, parallel()), "mask");
    return out;
  });
}

void pool_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_pool_backward";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  PoolBackwardArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    PoolBackwardCall call = arguments.call();
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    require(cpu::valid_bounds(call.pool), "bounds");
    cpu::pool_backward(call, parallel());
    return out;
  });
}

void l2_normalize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "l2_normalize";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  NormalizeArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    NormalizeCall call = arguments.call();
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    require(cpu::valid_dims(call), "truncate_dims");
    cpu::l2_normalize(call, parallel());
    return out;
  });
}

void l2_normalize_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_l2_normalize_backward";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  NormalizeBackwardArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    NormalizeBackwardCall call = arguments.call();
    Tensor out = arguments.output();
    call.out = out.mutable_data();
    require(cpu::valid_dims(call.normalize), "truncate_dims");
    cpu::l2_normalize_backward(call, parallel());
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpool, CPU, m) {
  register_modes(m, [](auto code) { return pool<code>; });
  m.impl("_pool_backward", pool_backward);
  m.impl("l2_normalize", l2_normalize);
  m.impl("_l2_normalize_backward", l2_normalize_backward);
}

}  // namespace fastpool
