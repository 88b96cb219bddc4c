// race.h - the race detector: with SIMT_RACE defined and -fsanitize=thread, linked without its
// library, the compiler calls these hooks at every memory access of a kernel. Part of simt.h.
//
// Two accesses of the same two bytes of shared memory by different threads, one of them a write,
// are a race unless a block barrier lies between them, or the threads share a warp and a warp
// operation does.
#pragma once
#ifndef SIMT_RACE

namespace simt {
inline void note_write(void*, size_t, int, const char*) {}
}  // namespace simt

#else
#include <dlfcn.h>
#define SIMT_UNWATCHED __attribute__((no_sanitize_thread))

namespace simt {
struct Seen {                  // the last access of a kind
  uint16_t thread, is_shared;  // is_shared: by several threads
  uint32_t block_epoch, warp_epoch;
};
struct Shadow {
  Seen write, read;
};
SIMT_STATE Shadow* shadow;

SIMT_UNWATCHED inline bool clashes(const Seen& s, unsigned t) {
  if (s.block_epoch != block_epoch || (!s.is_shared && s.thread == t)) return false;
  bool is_ordered_in_warp =
      !s.is_shared && s.thread / 32 == t / 32 && s.warp_epoch != warp_epoch[t / 32];
  return !is_ordered_in_warp;
}

// The place is a source line, or the address of an instruction, from which the driver finds the
// line.
SIMT_UNWATCHED __attribute__((noinline)) inline void touch(void* address, size_t nbytes,
                                                           bool is_write, void* pc, int line = 0,
                                                           const char* file = nullptr) {
  uintptr_t a = (uintptr_t)address, base;
  size_t n_static = _end - __bss_start;
  if (a - (uintptr_t)__bss_start < n_static) base = a - (uintptr_t)__bss_start;
  else if (a - (uintptr_t)dynamic_shared < (uintptr_t)DYNAMIC_BYTES)
    base = a - (uintptr_t)dynamic_shared + ((n_static + 1) & ~size_t(1));
  else return;
  if (!current) return;  // the launcher looks at its canary
  if (!shadow) shadow = (Shadow*)calloc((n_static + DYNAMIC_BYTES) / 2 + 2, sizeof(Shadow));
  unsigned t = current->linear, warp = t / 32;
  for (size_t i = base / 2; i <= (base + nbytes - 1) / 2; i++) {
    Shadow& s = shadow[i];
    bool after_write = clashes(s.write, t);
    if (after_write || (is_write && clashes(s.read, t))) {
      char place[256];
      Dl_info info;
      if (file) snprintf(place, sizeof place, "%s:%d", file, line);
      else if (dladdr(pc, &info))
        snprintf(place, sizeof place, "+0x%lx", (uintptr_t)pc - 1 - (uintptr_t)info.dli_fbase);
      fail("race: thread %u %s shared memory that thread %u %s since the last barrier, at %s", t,
           is_write ? "writes" : "reads", after_write ? s.write.thread : s.read.thread,
           after_write ? "wrote" : "read", place);
    }
    Seen& e = is_write ? s.write : s.read;
    bool is_concurrent =
        e.block_epoch == block_epoch && (e.is_shared || e.thread / 32 != warp ||
                                         (e.thread != t && e.warp_epoch == warp_epoch[warp]));
    e = {uint16_t(t), uint16_t(!is_write && is_concurrent), block_epoch, warp_epoch[warp]};
  }
}

// What the hooks do not see: writes by cp.async.
SIMT_UNWATCHED inline void note_write(void* address, size_t nbytes, int line, const char* file) {
  touch(address, nbytes, true, nullptr, line, file);
}
}  // namespace simt

#define SIMT_HOOK extern "C" __attribute__((no_sanitize_thread, used)) void
#define SIMT_WATCH(name, is_write, n) \
  SIMT_HOOK __tsan_##name##n(void* p) { simt::touch(p, n, is_write, __builtin_return_address(0)); }
#define SIMT_WATCH_SIZE(n)             \
  SIMT_WATCH(read, false, n)           \
  SIMT_WATCH(write, true, n)           \
  SIMT_WATCH(unaligned_read, false, n) \
  SIMT_WATCH(unaligned_write, true, n)
SIMT_WATCH_SIZE(1)
SIMT_WATCH_SIZE(2)
SIMT_WATCH_SIZE(4)
SIMT_WATCH_SIZE(8)
SIMT_WATCH_SIZE(16)
SIMT_HOOK __tsan_read_range(void* p, size_t n) {
  simt::touch(p, n, false, __builtin_return_address(0));
}
SIMT_HOOK __tsan_write_range(void* p, size_t n) {
  simt::touch(p, n, true, __builtin_return_address(0));
}
SIMT_HOOK __tsan_init() {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}

// Atomics are no races; fibers do not run at the same time.
#define SIMT_ATOMIC_HOOKS(bits, T)                                                          \
  extern "C" SIMT_UNWATCHED T __tsan_atomic##bits##_fetch_add(volatile void* p, T v, int) { \
    T old = *(volatile T*)p;                                                                \
    *(volatile T*)p = old + v;                                                              \
    return old;                                                                             \
  }                                                                                         \
  extern "C" SIMT_UNWATCHED T __tsan_atomic##bits##_load(const volatile void* p, int) {     \
    return *(const volatile T*)p;                                                           \
  }                                                                                         \
  extern "C" SIMT_UNWATCHED int __tsan_atomic##bits##_compare_exchange_strong(              \
      volatile void* p, void* seen, T v, int, int) {                                        \
    T old = *(volatile T*)p;                                                                \
    if (old != *(T*)seen) {                                                                 \
      *(T*)seen = old;                                                                      \
      return 0;                                                                             \
    }                                                                                       \
    *(volatile T*)p = v;                                                                    \
    return 1;                                                                               \
  }
SIMT_ATOMIC_HOOKS(32, uint32_t)
SIMT_ATOMIC_HOOKS(64, uint64_t)
#endif
