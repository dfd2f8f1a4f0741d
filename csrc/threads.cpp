#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "tensor.h"

namespace fastpool {
namespace {

// A fork copies the pool and none of its threads: the child's next loop over it would wait for them for ever. OpenMP
// keeps a pool with the thread that began it, and a fork copies one thread, so what that one has done is what counts.
// It counts from its first call here on, however small: what it pools comes from a model, whose loops nobody can ask
// for.
thread_local int used = 0;
std::atomic<int> before_fork{0};

void in_child() {
  if (used != 0) before_fork.store(used, std::memory_order_relaxed);
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, in_child);

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

}  // namespace

int threads_before_fork() { return before_fork.load(std::memory_order_relaxed); }
void set_threads_before_fork(int threads) { before_fork.store(threads, std::memory_order_relaxed); }

cpu::Parallel parallel() {
  uint32_t threads = 1;
  if (threads_before_fork() == 0) {
    check_api(torch_get_num_threads(&threads), "its number of threads");
    if (threads > 1) used = static_cast<int>(threads);
  }
  return {static_cast<int>(threads), torch_parallel};
}

}  // namespace fastpool
