// Exceptions of Python's that have C++ to cross, which hands on their texts alone: each is kept for its thread as it
// leaves Python, so that whoever called from Python can raise it again.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "native.h"

namespace fastpool::kept {

namespace py = pybind11;

// What a thread has at its end leaks: it may end without Python's lock.
inline thread_local PyObject* exception = nullptr;
inline thread_local std::string text;

inline void forget() {
  while (exception != nullptr) Py_DECREF(std::exchange(exception, nullptr));
}

// As a RuntimeError can hold it. An exception may have a text of its own making, or none that it can tell.
inline std::string text_of(py::handle error) {
  const auto words = py::reinterpret_steal<py::object>(PyObject_Str(error.ptr()));
  const auto bytes = py::reinterpret_steal<py::object>(
      words ? PyUnicode_AsEncodedString(words.ptr(), "utf-8", "backslashreplace") : nullptr);
  PyErr_Clear();
  const std::string found = bytes ? PyBytes_AsString(bytes.ptr()) : "";  // to the first NUL, as C++ hands it on
  return found.empty() ? Py_TYPE(error.ptr())->tp_name : found;
}

// A function that calls `kernel` and keeps what it raises. It is no Python function, because a signal's handler may
// raise as one begins, before anything there could catch.
inline py::object keeping(const py::object& kernel) {
  return py::cpp_function([kernel](const py::args& args, const py::kwargs& kwargs) -> py::object {
    forget();  // nobody has asked for it
    try {
      return kernel(*args, **kwargs);
    } catch (py::error_already_set& error) {
      if (error.trace()) PyException_SetTraceback(error.value().ptr(), error.trace().ptr());
      // What makes its text, and what an older one does in its end, may be calls of their own: they come first.
      std::string words = text_of(error.value());
      forget();
      exception = py::object(error.value()).release().ptr();
      text = std::move(words);
      native::set_error(text.c_str());
      throw;
    }
  });
}

// The exception that became a RuntimeError of this text, or None. It is forgotten.
inline py::object take(const std::string& words) {
  auto found = py::reinterpret_steal<py::object>(std::exchange(exception, nullptr));
  return found && words == text ? found : py::none();
}

}  // namespace fastpool::kept
