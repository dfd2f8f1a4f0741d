#include "native.h"

#include <atomic>
#include <cstdint>
#include <utility>

namespace fastpool::native {
namespace {

std::atomic<int> process_wish{automatic};
std::atomic<bool> validate{false};
std::atomic<int64_t> python_from{INT64_MAX};
thread_local int thread_wish = inherit;
thread_local bool direct = false;
thread_local std::string error;

}  // namespace

bool redirecting(bool cuda, int64_t hidden_bytes) {
  if (direct) return false;
  const int wish = thread_wish == inherit ? process_wish.load(std::memory_order_relaxed) : thread_wish;
  return wish == other ||
         (cuda && (validate.load(std::memory_order_relaxed) ||
                   (wish == automatic && hidden_bytes >= python_from.load(std::memory_order_relaxed))));
}
void redirect_process(int wish) { process_wish.store(wish, std::memory_order_relaxed); }
void redirect_thread(int wish) { thread_wish = wish; }
void set_direct(bool on) { direct = on; }
void set_cuda(bool check_values, int64_t python_from_bytes) {
  validate.store(check_values, std::memory_order_relaxed);
  python_from.store(python_from_bytes, std::memory_order_relaxed);
}
void set_error(const std::string& message) { error = message; }
std::string take_error() { return error.empty() ? "fastpool: the call failed in Python" : std::exchange(error, {}); }

}  // namespace fastpool::native
