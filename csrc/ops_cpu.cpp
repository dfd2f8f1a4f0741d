// Fills the CPU key of the ops that python/fastpool/ops.py defines. A call comes straight from torch's dispatcher:
// check, allocate, run. Only when this thread has asked for another backend does it turn to Python.
#include "cpu/pool_cpu.h"
#include "cpu/tokens_cpu.h"
#include "ops.h"
#include "threads.h"

namespace fastpool {
namespace {

template <class Arguments>
void answer_pool(const char* name, StableIValue* stack, Arguments& arguments) {
  answer(name, stack, arguments, [&] {
    PoolCall call = arguments.call();
    // The output first: a batch that no memory can hold fails here, not after walking over all of it.
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    require(cpu::valid_bounds(call), "bounds");
    require(cpu::valid_weights(call), "weights");
    require(cpu::valid_scores(call), "scores");
    require(cpu::valid_queries(call), "query");
    require(cpu::pool(call, parallel()), "mask");
    return out;
  });
}

template <int code>
void pool(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const Mode& mode = kModes[code];
  if (ran_in_python(mode.name, stack, native::kCpu, 0)) return;
  PoolArguments arguments(mode, stack);
  answer_pool(mode.name, stack, arguments);
}

void pool_several(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_pool_several";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  PoolSeveralArguments arguments(stack);
  answer_pool(name, stack, arguments);
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

void tokens(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "tokens";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  TokensArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    TokensCall call = arguments.call();
    require(cpu::valid_bounds(call.pool), "bounds");
    Tensor cu_seqlens = arguments.cu_seqlens(call);
    auto* const offsets = static_cast<int64_t*>(cu_seqlens.mutable_data());
    require(cpu::count_tokens(call.pool, offsets), "mask");
    const int64_t found = offsets[call.pool.batch];
    require(found <= arguments.total.value_or(found), "total");
    call.size = arguments.total.value_or(found);
    call.cu_seqlens = offsets;
    Tensor values = arguments.values(call);
    call.pool.out = values.mutable_data();
    cpu::tokens(call, parallel());
    return std::pair(std::move(values), std::move(cu_seqlens));
  });
}

void tokens_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "_tokens_backward";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  TokensBackwardArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    TokensBackwardCall call = arguments.call();
    Tensor out = arguments.output();
    call.out = out.mutable_data();
    require(cpu::valid_bounds(call.pool), "bounds");
    std::vector<int64_t> offsets(static_cast<size_t>(call.pool.batch) + 1);
    cpu::count_tokens(call.pool, offsets.data());  // tokens has looked at the mask's values
    require(offsets.back() <= call.size, "gradient");
    call.cu_seqlens = offsets.data();
    cpu::tokens_backward(call, parallel());
    return out;
  });
}

void quantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = "quantize";
  if (ran_in_python(name, stack, native::kCpu, 0)) return;
  QuantizeArguments arguments(stack);
  answer(name, stack, arguments, [&] {
    QuantizeCall call = arguments.call();
    Tensor out = arguments.output(call);
    call.out = out.mutable_data();
    require(cpu::valid_ranges(call), "ranges");
    cpu::quantize(call, parallel());
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpool, CPU, m) {
  register_modes(m, [](auto code) { return pool<code>; });
  m.impl("_pool_several", pool_several);
  m.impl("_pool_backward", pool_backward);
  m.impl("l2_normalize", l2_normalize);
  m.impl("_l2_normalize_backward", l2_normalize_backward);
  m.impl("tokens", tokens);
  m.impl("_tokens_backward", tokens_backward);
  m.impl("quantize", quantize);
}

}  // namespace fastpool
