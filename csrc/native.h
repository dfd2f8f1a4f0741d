// What the Python side can ask and set: exported by the op library, used by the pybind11 module (info.cpp).
#pragma once
#include <string>

#include "pool.h"

namespace fastpool::native {

// Whether calls in this thread go through Python's dispatch, because another backend was asked for: the thread's own
// wish if it has one, else the process's.
FASTPOOL_API bool redirecting();
FASTPOOL_API void redirect_process(bool on);
FASTPOOL_API void redirect_thread(int wish);  // 1 or 0; -1: as the process
// The message of the error that Python's dispatch has just raised in this thread.
FASTPOOL_API void set_error(const std::string& message);
std::string take_error();

}  // namespace fastpool::native
