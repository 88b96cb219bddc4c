/* The floating-point mode of a thread: how results are rounded, and what becomes of subnormals.
 *
 * IS: the default mode (to nearest, nothing flushed to zero, no traps) for as long as kernels run,
 * and the caller's own mode afterwards; and for linear_bf16.c the mode in which subnormals count as
 * zero, as operands and as results. IS NOT: arithmetic. It exists because other code of the process
 * changes the mode of a thread: fesetround, or a library that was linked with -ffast-math. Without
 * it the same replay would give other bits. Included by: pool.c, linear_bf16.c.
 */
#pragma once
#include <stdint.h>

#if defined __SSE2__ && defined __x86_64__

/* MXCSR: bits 0-5 flags, 6 subnormals are zeros, 7-12 masks, 13-14 rounding, 15 flush to zero. */
typedef uint32_t float_mode;
static inline float_mode enter_mode(uint32_t mode) {
  uint32_t callers = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(mode);
  return callers;
}
static inline float_mode enter_default_mode(void) { return enter_mode(0x1f80); }
static inline float_mode enter_flushing_mode(void) { return enter_mode(0x1f80 | 0x8040); }
static inline void leave_default_mode(float_mode mode) { __builtin_ia32_ldmxcsr(mode); }

#elif defined __aarch64__

/* FPCR: 0 is the default in all its fields; bit 24 flushes to zero. */
typedef uint64_t float_mode;
static inline float_mode enter_mode(uint64_t mode) {
  uint64_t callers;
  __asm__ volatile("mrs %0, fpcr\n\tmsr fpcr, %1" : "=&r"(callers) : "r"(mode) : "memory");
  return callers;
}
static inline float_mode enter_default_mode(void) { return enter_mode(0); }
static inline float_mode enter_flushing_mode(void) { return enter_mode(UINT64_C(1) << 24); }
static inline void leave_default_mode(float_mode mode) {
  __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}

#else
#include <fenv.h>

typedef fenv_t float_mode;
static inline float_mode enter_default_mode(void) {
  fenv_t mode;
  fegetenv(&mode);
  fesetenv(FE_DFL_ENV);
  return mode;
}
/* No way is known: subnormals stay what they are. */
static inline float_mode enter_flushing_mode(void) { return enter_default_mode(); }
static inline void leave_default_mode(float_mode mode) { fesetenv(&mode); }

#endif
