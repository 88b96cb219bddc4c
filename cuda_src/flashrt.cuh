// flashrt.cuh - what every kernel shares: types, bfloat16, elementary functions, reductions, tensor
// cores, copies.
//
// IS: the only file with inline PTX; each primitive has a host body, so that the SIMT shim runs the
// same sources.
// IS NOT: kernels. Included by: every .cu file, first.
//
// Bits. All of a kernel's arithmetic is written out: no contraction (--fmad=false), fused
// multiply-adds only where fmaf says so, one implementation of each elementary function, reductions
// of one fixed shape. So the bits of a result depend on its operands alone, never on the rows of a
// launch, the geometry, or the compiler's choices.
#pragma once

#ifdef SIMT_HOST
#define DYNAMIC_SHARED(T, name) T* name = (T*)simt::dynamic_shared
// For the shim's messages: where a primitive was called.
#define CALLER , int line = __builtin_LINE(), const char *file = __builtin_FILE()
#define PASS_CALLER , line, file
#else
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char shared_[]; \
  T* name = (T*)shared_
#define CALLER
#define PASS_CALLER
#endif

#define DEVICE __device__ __forceinline__
#define RUN_FUNCTION DEVICE
#include "args.h"  // generated: argument structs and what moves them to a run, words, dtypes

// threads[, blocks at a time]
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define ARGS const __grid_constant__

constexpr unsigned FULL_WARP = 0xffffffffu;
#define INF (__int_as_float(0x7f800000))

DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// x; what follows from it is computed where it is used: out of a loop, it would wait in registers.
DEVICE int made_here(int x) {
#ifndef SIMT_HOST
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- programmatic dependent launch

// Wait until the previous kernel of the stream is complete. Every thread calls it before it touches
// anything but weights, also in blocks that have nothing to do: else this kernel could finish
// before its predecessor has.
DEVICE void wait_for_predecessor() {
#if !defined(SIMT_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the stream may be scheduled from here on.
DEVICE void release_successor() {
#if !defined(SIMT_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE void begin() {
  release_successor();
  wait_for_predecessor();
}

// The first statement of a kernel whose parameter is `ARGS f_args launch`: `a` is the launch as the
// run blockIdx.z finds it; where the replay has no such run, the block ends here. The host writes the
// table of runs before the replay, so nothing needs to be waited for. Pointers that move are copied,
// all else the compiler finds in the constant bank.
#define OPEN_RUN(f)                     \
  f##_args a = launch;                  \
  if (!f##_enter_run(&a, blockIdx.z)) { \
    wait_for_predecessor();             \
    return;                             \
  }

// ---- bfloat16, two per register, the first in the low half

DEVICE float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

DEVICE uint32_t bf16_pack(float low, float high) {  // round to nearest even
#ifndef SIMT_HOST
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  auto round = [](float f) -> uint32_t {
    uint32_t u = __float_as_uint(f);
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}
DEVICE uint16_t bf16_round(float x) { return (uint16_t)bf16_pack(x, 0.0f); }

// x ~ hi + lo with both in bfloat16: 16 bits of mantissa
DEVICE void bf16_split(float x0, float x1, uint32_t& hi, uint32_t& lo) {
  hi = bf16_pack(x0, x1);
  lo = bf16_pack(x0 - bf16_low(hi), x1 - bf16_high(hi));
}

// x ~ hi + mid + lo: all 24 bits of mantissa
DEVICE void bf16_split(float x0, float x1, uint32_t& hi, uint32_t& mid, uint32_t& lo) {
  hi = bf16_pack(x0, x1);
  bf16_split(x0 - bf16_low(hi), x1 - bf16_high(hi), mid, lo);
}

// a b + c of each half, rounded once
DEVICE uint32_t bf16_fma(uint32_t a, uint32_t b, uint32_t c) {
#ifndef SIMT_HOST
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return bf16_pack(fmaf(bf16_low(a), bf16_low(b), bf16_low(c)),
                   fmaf(bf16_high(a), bf16_high(b), bf16_high(c)));
#endif
}

// ---- float16, two per register, the first in the low half

DEVICE float f16_to_float(uint16_t bits) {
#ifndef SIMT_HOST
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#else
  // as float32 with float16's exponent, then times 2^112: exact, subnormal numbers included
  uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | magnitude | 0x7f800000u);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
#endif
}
DEVICE float f16_low(uint32_t pair) { return f16_to_float((uint16_t)pair); }
DEVICE float f16_high(uint32_t pair) { return f16_to_float((uint16_t)(pair >> 16)); }

// Activations as tensor cores take them, in ACT_PARTS parts: 1 bfloat16; 2 a pair hi + lo (hi in
// the low half); 3 the bits of a float, which `linear` splits in three where it reads them.
#ifdef ACT_PARTS
#if ACT_PARTS == 3
typedef uint32_t act_t;
DEVICE act_t to_act(float x) { return __float_as_uint(x); }
DEVICE float from_act(act_t x) { return __uint_as_float(x); }
#elif ACT_PARTS == 2
typedef uint32_t act_t;
DEVICE act_t to_act(float x) {
  uint32_t hi = bf16_round(x);
  return hi | bf16_pack(0.0f, x - bf16_to_float((uint16_t)hi));
}
DEVICE float from_act(act_t x) { return bf16_low(x) + bf16_high(x); }
#else
typedef uint16_t act_t;
DEVICE act_t to_act(float x) { return bf16_round(x); }
DEVICE float from_act(act_t x) { return bf16_to_float(x); }
#endif
// p: aligned to four elements
DEVICE void store_act4(act_t* p, float x, float y, float z, float w) {
#if ACT_PARTS > 1
  *reinterpret_cast<uint4*>(p) = make_uint4(to_act(x), to_act(y), to_act(z), to_act(w));
#else
  *reinterpret_cast<uint2*>(p) = make_uint2(bf16_pack(x, y), bf16_pack(z, w));
#endif
}
#endif

// ---- elementary functions: polynomials after Cephes; exp within 1 ulp, sine and cosine 2, log 3

// exp(0) is exactly 1; 0 below -87, infinite above 88.3.
DEVICE float exp_f32(float x) {
  float n = fmaf(x, 1.44269504f, 12582912.0f) - 12582912.0f;  // nearest integer of x / log 2
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  float y = p * __int_as_float(((int)n + 127) << 23);
  return x < -87.0f ? 0.0f : x > 88.3f ? INF : y;
}

// log of a positive normal number
DEVICE float log_f32(float x) {
  int bits = __float_as_int(x), e = (bits >> 23) - 126;
  float m = __int_as_float((bits & 0x7fffff) | 0x3f000000);  // [0.5, 1)
  if (m < 0.707106781f) {
    e -= 1;
    m = m + m;
  }
  float z = m - 1.0f, z2 = z * z, n = (float)e;
  float p = 7.0376836292e-2f;
  p = fmaf(p, z, -1.1514610310e-1f);
  p = fmaf(p, z, 1.1676998740e-1f);
  p = fmaf(p, z, -1.2420140846e-1f);
  p = fmaf(p, z, 1.4249322787e-1f);
  p = fmaf(p, z, -1.6668057665e-1f);
  p = fmaf(p, z, 2.0000714765e-1f);
  p = fmaf(p, z, -2.4999993993e-1f);
  p = fmaf(p, z, 3.3333331174e-1f);
  float y = p * z * z2;
  y = fmaf(n, -2.12194440e-4f, y);
  y = fmaf(-0.5f, z2, y);
  return fmaf(n, 0.693359375f, z + y);
}

DEVICE float rsqrt_f32(float x) { return 1.0f / sqrtf(x); }
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }
// log(1 + exp(x)); the second term is what rounding took from 1 + exp(x)
DEVICE float softplus(float x) {
  float e = exp_f32(x), u = 1.0f + e;
  return x > 20.0f ? x : log_f32(u) + (e - (u - 1.0f)) / u;
}

// |x| up to about 1e6
DEVICE void sincos_f32(float x, float& sine, float& cosine) {
  float n = fmaf(x, 0.636619772f, 12582912.0f) - 12582912.0f;  // quarter turns
  float r = fmaf(n, -1.57079637e+0f, x);
  r = fmaf(n, 4.37113883e-8f, r);
  r = fmaf(n, 1.71512489e-15f, r);
  float r2 = r * r;
  float s = fmaf(-1.9515295891e-4f, r2, 8.3321608736e-3f);
  s = fmaf(s, r2, -1.6666654611e-1f);
  s = fmaf(s * r2, r, r);
  float c = fmaf(2.443315711809948e-5f, r2, -1.388731625493765e-3f);
  c = fmaf(c, r2, 4.166664568298827e-2f);
  c = fmaf(c * r2, r2, fmaf(-0.5f, r2, 1.0f));
  int quarter = (int)n & 3;
  float a = quarter & 1 ? c : s, b = quarter & 1 ? s : c;
  sine = quarter & 2 ? -a : a;
  cosine = (quarter + 1) & 2 ? -b : b;
}

// ---- reductions of fixed shape

DEVICE float warp_sum(float v) {  // the same bits in every lane: x + y == y + x
#pragma unroll
  for (int o = 16; o; o >>= 1) v = v + __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}

DEVICE unsigned warp_add(unsigned v) {  // in every lane, modulo 2^32
#ifndef SIMT_HOST
  return __reduce_add_sync(FULL_WARP, v);
#else
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
#endif
}

DEVICE unsigned warp_max(unsigned v) {  // in every lane
#ifndef SIMT_HOST
  return __reduce_max_sync(FULL_WARP, v);
#else
  for (int o = 16; o; o >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, o));
  return v;
#endif
}

DEVICE unsigned warp_min(unsigned v) { return ~warp_max(~v); }

// Warp sums, then added in the order of the warps. All threads of the block call it; once per
// kernel.
template <int N_WARPS>
DEVICE float block_sum(float v) {
  __shared__ float part[N_WARPS];
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = part[0];
#pragma unroll
  for (int w = 1; w < N_WARPS; w++) sum = sum + part[w];
  return sum;
}

// ---- registers

// x, of which the compiler knows nothing: what is computed from it stays where it is written, and
// is not kept in registers through a loop around that.
DEVICE int opaque(int x) {
#ifndef SIMT_HOST
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- memory

// 16 bytes that are read once: past the first-level cache.
DEVICE uint4 load_stream(const void* p) {
#ifndef SIMT_HOST
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}

DEVICE uint2 load_stream8(const void* p) {
#ifndef SIMT_HOST
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
#else
  return *static_cast<const uint2*>(p);
#endif
}

// Copies 16 bytes from global to shared memory, or fills them with zeros without reading.
DEVICE void copy_async16(void* shared, const void* global, bool is_read = true CALLER) {
#ifndef SIMT_HOST
  uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(is_read ? 16 : 0)
               : "memory");
#else
  simt::issue_copy(shared, global, 16, is_read ? 16 : 0 PASS_CALLER);
#endif
}
DEVICE void copy_async8(void* shared, const void* global, bool is_read = true CALLER) {
#ifndef SIMT_HOST
  uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global),
               "r"(is_read ? 8 : 0)
               : "memory");
#else
  simt::issue_copy(shared, global, 8, is_read ? 8 : 0 PASS_CALLER);
#endif
}
DEVICE void copy_async4(void* shared, const void* global, bool is_read = true CALLER) {
#ifndef SIMT_HOST
  uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global),
               "r"(is_read ? 4 : 0)
               : "memory");
#else
  simt::issue_copy(shared, global, 4, is_read ? 4 : 0 PASS_CALLER);
#endif
}
DEVICE void copy_async_commit() {
#ifndef SIMT_HOST
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}
template <int PENDING>
DEVICE void copy_async_wait() {  // for all but the newest PENDING groups of this thread
#ifndef SIMT_HOST
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  simt::wait_copies(PENDING);
#endif
}

// ---- tensor cores

// c[16 x 8] += a[16 x 16] b[16 x 8], bfloat16 in, float out. Lane 4g + t holds
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)    b: k = 2t.., 2t+8.. of column g
//   c: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1) The one tensor-core instruction of all kernels: a
// column's bits do not depend on the other columns, so tokens are always the columns, alone or in
// company.
DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1 CALLER) {
#ifndef SIMT_HOST
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  simt::mma(c, a, b PASS_CALLER);
#endif
}

// c = a b, as `mma` to a c of zeros
DEVICE void mma_first(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                      uint32_t b0, uint32_t b1 CALLER) {
#ifndef SIMT_HOST
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
#else
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  mma(c, a0, a1, a2, a3, b0, b1 PASS_CALLER);
#endif
}
