#include "native.h"

#include <atomic>
#include <utility>

namespace fastpool::native {
namespace {

std::atomic<bool> process_wish{false};
thread_local int thread_wish = -1;
thread_local std::string error;

}  // namespace

bool redirecting() { return thread_wish < 0 ? process_wish.load(std::memory_order_relaxed) : thread_wish != 0; }
void redirect_process(bool on) { process_wish.store(on, std::memory_order_relaxed); }
void redirect_thread(int wish) { thread_wish = wish; }
void set_error(const std::string& message) { error = message; }
std::string take_error() { return error.empty() ? "fastpool: the call failed in Python" : std::exchange(error, {}); }

}  // namespace fastpool::native
