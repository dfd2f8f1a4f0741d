// Arithmetic as IEEE has it, whatever a thread was told before: rounding to nearest, subnormals taken and given as they
// are. torch.set_flush_denormal tells one thread; those that share its work have not heard. `Ieee` is inlined, since
// files of every instruction set include it.
#pragma once
#include <cstdint>

#include "../compiler.h"

namespace fastpool::cpu {

class Ieee {
 public:
  __attribute__((always_inline)) Ieee() : before(read()) {
    if (!is_plain()) write(kPlain);
    keep_order();
  }
  __attribute__((always_inline)) ~Ieee() {
    keep_order();
    if (!is_plain()) write(before);
  }
  Ieee(const Ieee&) = delete;
  Ieee& operator=(const Ieee&) = delete;

 private:
#if defined(__SSE2__)  // MXCSR, and the flags in it that calculations leave
  using Control = uint32_t;
  static constexpr Control kFlags = 0x3f, kPlain = 0x1f80;
  FASTPOOL_INLINE Control read() { return __builtin_ia32_stmxcsr(); }
  FASTPOOL_INLINE void write(Control control) { __builtin_ia32_ldmxcsr(control); }
#elif defined(__aarch64__)  // FPCR
  using Control = uint64_t;
  static constexpr Control kFlags = 0, kPlain = 0;
  FASTPOOL_INLINE Control read() {
    Control control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  FASTPOOL_INLINE void write(Control control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
  using Control = int;
  static constexpr Control kFlags = 0, kPlain = 0;
  FASTPOOL_INLINE Control read() { return kPlain; }
  FASTPOOL_INLINE void write(Control) {}
#endif
  __attribute__((always_inline)) bool is_plain() const { return (before & ~kFlags) == kPlain; }
  // What is read and written in between stays there; a calculation follows what it reads.
  FASTPOOL_INLINE void keep_order() { asm volatile("" ::: "memory"); }

  const Control before;
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

}  // namespace fastpool::cpu
