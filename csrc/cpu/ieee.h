// Arithmetic as IEEE has it, whatever a thread was told before: rounding to nearest, subnormals taken and given as they
// are. torch.set_flush_denormal tells one thread; those that share its work have not heard. Included by
// backward_impl.h, into an instruction set's namespace.
#pragma once
#include <cstdint>

namespace fastpool::FASTPOOL_ISA {

class Ieee {
 public:
  __attribute__((always_inline)) Ieee() : before(read()) {
    if (before != kPlain) write(kPlain);
    keep_order();
  }
  __attribute__((always_inline)) ~Ieee() {
    keep_order();
    if (before != kPlain) write(before);
  }
  Ieee(const Ieee&) = delete;
  Ieee& operator=(const Ieee&) = delete;

 private:
  // What is read and written in between stays there; a calculation follows what it reads.
  static void keep_order() { asm volatile("" ::: "memory"); }
#if defined(__SSE2__)  // MXCSR, without the flags that calculations leave
  static constexpr uint32_t kFlags = 0x3f, kPlain = 0x1f80;
  static uint32_t read() { return __builtin_ia32_stmxcsr() & ~kFlags; }
  static void write(uint32_t control) { __builtin_ia32_ldmxcsr(control); }
  const uint32_t before;
#elif defined(__aarch64__)  // FPCR
  static constexpr uint64_t kPlain = 0;
  static uint64_t read() {
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void write(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
  const uint64_t before;
#else
  static constexpr int kPlain = 0;
  static int read() { return kPlain; }
  static void write(int) {}
  const int before;
#endif
};

// A function in that arithmetic.
template <auto function>
struct InIeee;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct InIeee<function> {
  static Result call(Arguments... arguments) {
    const Ieee ieee;
    return function(arguments...);
  }
};

}  // namespace fastpool::FASTPOOL_ISA
