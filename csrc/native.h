// What the Python side can ask and set: exported by the op library, used by the pybind11 module (info.cpp).
#pragma once
#include <string>

#include "pool.h"

namespace fastpool::native {

// The backend that a thread, or else the process, asks for: this library, another one, or whichever is fastest.
enum Requested : int { inherit = -1, native = 0, other = 1, automatic = 2 };

constexpr int kCpu = -1;       // in place of a CUDA device's index
constexpr int kDevices = 128;  // torch keeps an index in a byte with a sign

// Whether a call in this thread goes through Python's dispatch: where another backend was asked for, where Python wants
// to see every call, and on a GPU where another backend is the faster one for hidden of this size. Never while Python
// runs a call that it has already dispatched to this library.
FASTPOOL_API bool goes_through_python(int device, int64_t hidden_bytes);
FASTPOOL_API void override_process(int requested);
FASTPOOL_API void override_thread(int requested);
FASTPOOL_API void set_direct(bool on);        // this thread's calls come from Python's dispatch
FASTPOOL_API void set_python_first(bool on);  // all calls, to be validated or because there is something to say
// From which size on another backend is the faster one on a CUDA device. Until that is known, every call asks Python,
// if it is there: programs without it have no other backend.
FASTPOOL_API void set_python_from(int device, int64_t bytes);
FASTPOOL_API void set_python(bool there);
// Whether Python can say what is wrong with this thread's call, and has not just found nothing wrong with it.
FASTPOOL_API bool python_may_explain();
// The message of the error that Python's dispatch has just raised in this thread.
FASTPOOL_API void set_error(const char* message);
FASTPOOL_API std::string take_error();

}  // namespace fastpool::native
