// The threads that a call on a CPU has: torch's; in the child of a process that has used them, the caller's alone.
#pragma once
#include "cpu/pool_cpu.h"

namespace fastpool {

cpu::Parallel parallel();

// With how many threads the thread had pooled that forked this process, or one before it; 0 if not with several.
FASTPOOL_API int threads_before_fork();

}  // namespace fastpool
