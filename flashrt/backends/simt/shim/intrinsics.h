// intrinsics.h - barriers, warp operations, atomics and arithmetic of CUDA that kernels use. Part
// of simt.h.
#pragma once

// ---- synchronisation

inline void __syncthreads(SIMT_AT) { simt::wait_barrier(0, simt::n_threads, 0, line, file); }
inline int __syncthreads_or(int p, SIMT_AT) {
  return simt::wait_barrier(0, simt::n_threads, p != 0, line, file);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_AT) {
  simt::collective(mask, nullptr, nullptr, line, file);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(SIMT_AT) {
  simt::fail("%s:%d: __trap in thread %u", file, line, simt::current->linear);
}

// ---- shuffles and votes

namespace simt {
struct Exchange {
  uint64_t in, out;
  int source;
};
inline Exchange* exchange_of(Fiber& f) { return (Exchange*)f.operands; }

inline void run_shuffle(Fiber* lanes, unsigned mask) {
  for (unsigned m = mask; m; m &= m - 1) {
    Exchange* e = exchange_of(lanes[__builtin_ctz(m)]);
    if (!(mask >> e->source & 1))
      fail("%s:%d: shuffle reads lane %d outside mask %08x", current->file, current->line,
           e->source, mask);
    e->out = exchange_of(lanes[e->source])->in;
  }
}

inline void run_ballot(Fiber* lanes, unsigned mask) {
  unsigned votes = 0;
  for (unsigned m = mask; m; m &= m - 1)
    votes |= unsigned(exchange_of(lanes[__builtin_ctz(m)])->in) << __builtin_ctz(m);
  for (unsigned m = mask; m; m &= m - 1) exchange_of(lanes[__builtin_ctz(m)])->out = votes;
}

template <class T>
inline T shuffle(unsigned mask, T value, int source, int line, const char* file) {
  static_assert(sizeof(T) <= 8);
  Exchange e{0, 0, source};
  memcpy(&e.in, &value, sizeof value);
  collective(mask, run_shuffle, &e, line, file);
  memcpy(&value, &e.out, sizeof value);
  return value;
}
inline int lane() { return current->linear & 31; }
}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_AT) {
  int l = simt::lane();
  return simt::shuffle(mask, v, (l & ~(width - 1)) | (source & (width - 1)), line, file);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, SIMT_AT) {
  int l = simt::lane(), source = l ^ x;
  return simt::shuffle(mask, v, source <= (l | (width - 1)) ? source : l, line, file);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, int d, int width = 32, SIMT_AT) {
  int l = simt::lane();
  return simt::shuffle(mask, v, (l & (width - 1)) + d < width ? l + d : l, line, file);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, int d, int width = 32, SIMT_AT) {
  int l = simt::lane();
  return simt::shuffle(mask, v, (l & (width - 1)) >= d ? l - d : l, line, file);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_AT) {
  simt::Exchange e{p != 0, 0, 0};
  simt::collective(mask, simt::run_ballot, &e, line, file);
  return unsigned(e.out);
}
inline int __any_sync(unsigned mask, int p, SIMT_AT) {
  return __ballot_sync(mask, p, line, file) != 0;
}
inline int __all_sync(unsigned mask, int p, SIMT_AT) {
  return __ballot_sync(mask, p, line, file) == mask;
}

// ---- atomics (integers only: floating-point atomics have no order, and no place in these kernels)

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
template <class T>
inline T atomicMax(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (old < v &&
         !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

// ---- arithmetic

inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int u) { return __uint_as_float(unsigned(u)); }
inline int __float2int_rn(float f) { return int(lrintf(f)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
// bytes of (y:x) chosen by the nibbles of s
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  uint64_t both = uint64_t(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= unsigned(both >> (8 * (s >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}
