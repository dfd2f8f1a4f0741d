// The threads that a call on a CPU has: torch's; in the child of a process that has used them, the caller's alone.
#pragma once
#include "cpu/pool_cpu.h"

namespace fastpool {

cpu::Parallel parallel();

// How many threads the thread had at hand that forked this process, or one before it, if it had pooled; 0 if not
// several.
FASTPOOL_API int threads_before_fork();
FASTPOOL_API void set_threads_before_fork(int threads);  // what Python's backends had

}  // namespace fastpool
