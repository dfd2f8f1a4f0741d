// fastpool._native: a small module without torch: how the library was built, the instruction set in use and a way to
// force a lower one, the constants that C++, Triton and Python must share, the exceptions that cross the library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/pool_cpu.h"
#include "kept.h"
#include "native.h"
#include "threads.h"

namespace py = pybind11;
using namespace fastpool;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information, instruction sets and shared constants of fastpool's native library.";
  m.attr("compiler") = FASTPOOL_COMPILER;
  m.attr("torch_version") = FASTPOOL_TORCH_VERSION;
  m.attr("cuda_architectures") = FASTPOOL_CUDA_ARCHITECTURES;
  m.attr("LEAF") = kLeaf;
  m.attr("MOST_MODES") = Several::kMost;
  m.attr("NORM_EPS") = kNormEps;
  m.attr("NORM_SCALES") = py::make_tuple(kNormScale32, kNormScale64);
  // Of each mode: its name, and its traits as their places in the enumerations of modes.py.
  py::list modes;
  for (const Mode& mode : kModes)
    modes.append(py::make_tuple(mode.name, static_cast<int>(mode.select), static_cast<int>(mode.weight),
                                static_cast<int>(mode.reduce), static_cast<int>(mode.divisor),
                                static_cast<int>(mode.activation)));
  m.attr("MODES") = modes;

  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("isas", &cpu::isas, "The instruction sets this CPU can run, best first.");
  m.def(
      "use_isa",
      [](const std::string& name) {
        if (!cpu::use_isa(name)) throw py::value_error("this CPU cannot run the instruction set '" + name + "'");
      },
      py::arg("name") = "", "Use this instruction set; the best one without a name. The bits stay the same.");

  m.def("threads_before_fork", &threads_before_fork,
        "How many threads the thread had at hand that forked this process, if it had pooled; 0 if not several.");
  m.def("set_threads_before_fork", &set_threads_before_fork, py::arg("threads"));
  native::set_python(true);  // whose dispatch defines the ops that calls may turn to
  m.def("override_process", &native::override_process);
  m.def("override_thread", &native::override_thread);
  m.def("set_direct", &native::set_direct);
  m.def("set_python_first", &native::set_python_first, py::arg("on"));
  m.def("set_python_from", &native::set_python_from, py::arg("device_index"), py::arg("bytes"));
  m.def("keeping", &kept::keeping, py::arg("kernel"), "The kernel; what it raises is kept for this thread.");
  m.def("take_kept", &kept::take, py::arg("text"), "The exception that became a RuntimeError of this text, or None.");
}
