#include "native.h"

#include <array>
#include <atomic>
#include <utility>

namespace fastpool::native {
namespace {

std::atomic<int> process_requested{automatic};
std::atomic<bool> python_first{false};
std::atomic<bool> python{false};
std::array<std::atomic<int64_t>, kDevices> python_from{};
thread_local int thread_requested = inherit;
thread_local bool direct = false;
thread_local std::string error;

}  // namespace

bool goes_through_python(int device, int64_t hidden_bytes) {
  if (direct) return false;
  const int requested =
      thread_requested == inherit ? process_requested.load(std::memory_order_relaxed) : thread_requested;
  if (requested == other || python_first.load(std::memory_order_relaxed)) return true;
  return device != kCpu && requested == automatic && python.load(std::memory_order_relaxed) &&
         hidden_bytes >= python_from.at(device).load(std::memory_order_relaxed);
}
void override_process(int requested) { process_requested.store(requested, std::memory_order_relaxed); }
void override_thread(int requested) { thread_requested = requested; }
void set_direct(bool on) { direct = on; }
void set_python_first(bool on) { python_first.store(on, std::memory_order_relaxed); }
void set_python(bool there) { python.store(there, std::memory_order_relaxed); }
bool python_may_explain() { return python.load(std::memory_order_relaxed) && !direct; }
void set_python_from(int device, int64_t bytes) { python_from.at(device).store(bytes, std::memory_order_relaxed); }
void set_error(const char* message) { error = message; }
std::string take_error() { return error.empty() ? "fastpool: the call failed in Python" : std::exchange(error, {}); }

}  // namespace fastpool::native
