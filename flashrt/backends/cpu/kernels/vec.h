/* Vectors of VL floats with the same bits at every width: AVX-512, AVX2, NEON, or plain C.
 *
 * IS: loads, stores, one fused multiply-add, exp. Everything else is the operators of GCC's vector
 * extensions (+ - * / and comparisons), which round each lane as scalar code does. Every v_f has a
 * scalar twin s_f of the same operations in the same order, so a tail done by s_f equals the lane
 * that v_f would have filled.
 * IS NOT: a maths library (see fmath.h), nor horizontal sums: a sum over lanes has an order, and
 * kernels spell it out.
 * Included by: every kernel. Built with -ffp-contract=off: a fused operation is written v_fma or
 * s_fma, never implied.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined __AVX512F__
#include <immintrin.h>
enum { VL = 16 };
#elif defined __AVX2__ && defined __FMA__
#include <immintrin.h>
enum { VL = 8 };
#else
#if defined __ARM_NEON && defined __aarch64__
#include <arm_neon.h>
#endif
enum { VL = 4 };
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef vf vf_anywhere __attribute__((aligned(4), may_alias));
typedef vu vu_anywhere __attribute__((aligned(2), may_alias));

INLINE vf v_load(const float *p) { return *(const vf_anywhere *)p; }
INLINE void v_store(float *p, vf x) { *(vf_anywhere *)p = x; }
INLINE vf v_set(float x) { return x - (vf){0}; }
INLINE vu v_load_words(const void *p) { return *(const vu_anywhere *)p; }

/* The bfloat16 in the low or the high half of each word, as float. */
INLINE vf v_low(vu words) { return (vf)(words << 16); }
INLINE vf v_high(vu words) { return (vf)(words & 0xffff0000u); }

/* a * b + c, rounded once. */
INLINE float s_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE vf v_fma(vf a, vf b, vf c) {
#if defined __AVX512F__
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined __AVX2__ && defined __FMA__
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined __ARM_NEON && defined __aarch64__
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  vf y;
  for (int i = 0; i < VL; i++) y[i] = s_fma(a[i], b[i], c[i]);
  return y;
#endif
}

/* mask ? a : b, the mask being the result of a comparison. */
INLINE vf v_select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* a > b ? a : b; when either is NaN, b. */
INLINE float s_max(float a, float b) { return a > b ? a : b; }
INLINE vf v_max(vf a, vf b) {
#if defined __AVX512F__
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined __AVX2__ && defined __FMA__
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return v_select(a > b, a, b);
#endif
}

/* exp, about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite), a polynomial in r, then
 * two exact steps of scaling, so that results below the smallest normal number round once instead
 * of vanishing. exp(-inf) = 0, overflow is inf, NaN stays NaN. n comes from adding 1.5 * 2^23,
 * whose last bits then hold it: no conversion instruction differs. */
#define EXP_LOW -104.0f /* exp(-104) rounds to 0 */
#define EXP_HIGH 100.0f /* exp(100) is inf */
#define EXP_ROUND 12582912.0f
#define EXP_ROUND_BITS 0x4b400000
#define EXP_LOG2E 1.44269504088896341f
#define EXP_LN2_HIGH 0.693359375f
#define EXP_LN2_LOW -2.12194440e-4f
#define EXP_C7 1.9875691500e-4f
#define EXP_C6 1.3981999507e-3f
#define EXP_C5 8.3334519073e-3f
#define EXP_C4 4.1665795894e-2f
#define EXP_C3 1.6666665459e-1f
#define EXP_C2 5.0000001201e-1f

INLINE vf v_exp(vf x) {
  x = v_max(v_set(EXP_LOW), x);
  x = v_select(x > EXP_HIGH, v_set(EXP_HIGH), x);
  vf shifted = v_fma(x, v_set(EXP_LOG2E), v_set(EXP_ROUND));
  vf n = shifted - EXP_ROUND;
  vf r = v_fma(n, v_set(-EXP_LN2_HIGH), x);
  r = v_fma(n, v_set(-EXP_LN2_LOW), r);
  vf p = v_fma(v_set(EXP_C7), r, v_set(EXP_C6));
  p = v_fma(p, r, v_set(EXP_C5));
  p = v_fma(p, r, v_set(EXP_C4));
  p = v_fma(p, r, v_set(EXP_C3));
  p = v_fma(p, r, v_set(EXP_C2));
  p = v_fma(p, r * r, r) + 1.0f;
  vi exponent = (vi)shifted - EXP_ROUND_BITS;
  vi half = exponent >> 1;
  return p * (vf)((vu)(half + 127) << 23) * (vf)((vu)(exponent - half + 127) << 23);
}

INLINE float s_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE uint32_t s_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float s_exp(float x) {
  x = s_max(EXP_LOW, x);
  x = x > EXP_HIGH ? EXP_HIGH : x;
  float shifted = s_fma(x, EXP_LOG2E, EXP_ROUND);
  float n = shifted - EXP_ROUND;
  float r = s_fma(n, -EXP_LN2_HIGH, x);
  r = s_fma(n, -EXP_LN2_LOW, r);
  float p = s_fma(EXP_C7, r, EXP_C6);
  p = s_fma(p, r, EXP_C5);
  p = s_fma(p, r, EXP_C4);
  p = s_fma(p, r, EXP_C3);
  p = s_fma(p, r, EXP_C2);
  p = s_fma(p, r * r, r) + 1.0f;
  int32_t exponent = (int32_t)(s_bits(shifted) - EXP_ROUND_BITS);
  int32_t half = exponent >> 1;
  return p * s_from_bits((uint32_t)(half + 127) << 23) *
         s_from_bits((uint32_t)(exponent - half + 127) << 23);
}

/* 1 / (1 + exp(-x)) */
INLINE vf v_sigmoid(vf x) { return 1.0f / (1.0f + v_exp(-x)); }
INLINE float s_sigmoid(float x) { return 1.0f / (1.0f + s_exp(-x)); }
