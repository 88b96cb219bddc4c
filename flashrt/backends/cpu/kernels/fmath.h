/* Elementary functions on top of vec.h: sums with one order, silu, log, softplus, sine and cosine,
 * random numbers.
 *
 * IS: every function here gives the same bits for an element wherever it stands, at every vector
 * width, with every C library (nothing is taken from libm but the correctly rounded square root).
 * IS NOT: general: each function states the domain it was made for.
 * Included by: the kernels of one row at a time (norm, conv, gates, rope, elementwise, sample).
 */
#pragma once
#include "vec.h"

/* ---- sums ---- */

enum { SUM_LANES = 16 };

/* Sum of x[i]^2, i in [0, n): element i goes to lane i % 16, each lane is one fma chain in
 * ascending i, the lanes are added as a tree. n alone fixes the order. */
INLINE float sum_of_squares(const float *x, int n) {
  vf acc[SUM_LANES / VL] = {};
  float lanes[SUM_LANES] = {0};
  int i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
    UNROLL for (int v = 0; v < SUM_LANES / VL; v++) {
      vf e = v_load(x + i + v * VL);
      acc[v] = v_fma(e, e, acc[v]);
    }
  }
  UNROLL for (int v = 0; v < SUM_LANES / VL; v++) v_store(lanes + v * VL, acc[v]);
  for (int lane = 0; i + lane < n; lane++)
    lanes[lane] = s_fma(x[i + lane], x[i + lane], lanes[lane]);
  UNROLL for (int half = SUM_LANES / 2; half > 0; half /= 2) {
    UNROLL for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

INLINE float s_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

/* 1 / root mean square, what rmsnorm multiplies by. */
INLINE float inverse_rms(const float *x, int n, float eps) {
  return s_rsqrt(sum_of_squares(x, n) / (float)n + eps);
}

/* ---- silu ---- */

INLINE float s_silu(float x) { return x / (1.0f + s_exp(-x)); }
INLINE vf v_silu(vf x) { return x / (1.0f + v_exp(-x)); }

/* ---- relu ---- */

/* NaN stays NaN. */
INLINE vf v_relu(vf x) { return v_select(x < 0.0f, v_set(0.0f), x); }

/* ---- log and softplus ---- */

/* log of a positive normal number, about 1 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and the
 * polynomial of Cephes (logf) in m - 1. */
#define LOG_SQRT_HALF 0x3f3504f3u
#define LOG_COEFFICIENTS                                                                         \
  {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f, \
   -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f}

INLINE float s_log(float x) {
  static const float c[9] = LOG_COEFFICIENTS;
  uint32_t shifted = s_bits(x) - LOG_SQRT_HALF;
  float e = (float)((int32_t)shifted >> 23);
  float m = s_from_bits((shifted & 0x7fffff) + LOG_SQRT_HALF) - 1.0f;
  float p = c[0], square = m * m;
  UNROLL for (int i = 1; i < 9; i++) p = s_fma(p, m, c[i]);
  p = s_fma(p * m, square, e * EXP_LN2_LOW);
  p = s_fma(-0.5f, square, p);
  return s_fma(e, EXP_LN2_HIGH, m + p);
}
INLINE vf v_log(vf x) {
  static const float c[9] = LOG_COEFFICIENTS;
  vu shifted = (vu)x - LOG_SQRT_HALF;
  vf e = __builtin_convertvector((vi)shifted >> 23, vf);
  vf m = (vf)((shifted & 0x7fffff) + LOG_SQRT_HALF) - 1.0f;
  vf p = v_set(c[0]), square = m * m;
  UNROLL for (int i = 1; i < 9; i++) p = v_fma(p, m, v_set(c[i]));
  p = v_fma(p * m, square, e * EXP_LN2_LOW);
  p = v_fma(v_set(-0.5f), square, p);
  return v_fma(e, v_set(EXP_LN2_HIGH), m + p);
}

/* log(1 + x) for x > -1: the log of the rounded sum, plus what the rounding lost. */
INLINE float s_log1p(float x) {
  float u = 1.0f + x;
  float lost = x > 1.0f ? 1.0f - (u - x) : x - (u - 1.0f);
  return s_log(u) + lost / u;
}
INLINE vf v_log1p(vf x) {
  vf u = 1.0f + x;
  vf lost = v_select(x > 1.0f, 1.0f - (u - x), x - (u - 1.0f));
  return v_log(u) + lost / u;
}

/* log(1 + exp(x)); x itself above 20, as torch does. */
INLINE float s_softplus(float x) { return x > 20.0f ? x : s_log1p(s_exp(x)); }
INLINE vf v_softplus(vf x) {
  vf y = v_select(x > 20.0f, v_set(20.0f), x); /* keeps exp finite where its result is not used */
  return v_select(x > 20.0f, x, v_log1p(v_exp(y)));
}

/* ---- sine and cosine ---- */

/* Correct to about 1 ulp of float32 for |x| below 2^30: quadrants are taken off in float64 with pi
 * / 2 in two parts, and the Taylor polynomials on [-pi/4, pi/4] are cut where they reach 2e-9. */
typedef struct {
  float sine, cosine;
} sine_cosine;

#define PI_HALF_HIGH 1.57079632679489655800e+00
#define PI_HALF_LOW 6.12323399573676603587e-17
#define D_ROUND 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to an integer */

INLINE sine_cosine s_sincos(float x) {
  double shifted = __builtin_fma((double)x, 0.63661977236758134308, D_ROUND);
  double n = shifted - D_ROUND;
  int64_t quadrant;
  memcpy(&quadrant, &shifted, sizeof quadrant);
  double r = __builtin_fma(n, -PI_HALF_HIGH, (double)x);
  r = __builtin_fma(n, -PI_HALF_LOW, r);
  double z = r * r;
  double s = __builtin_fma(z, 1.0 / 362880, -1.0 / 5040);
  s = __builtin_fma(s, z, 1.0 / 120);
  s = __builtin_fma(s, z, -1.0 / 6);
  s = __builtin_fma(s * z, r, r);
  double c = __builtin_fma(z, -1.0 / 3628800, 1.0 / 40320);
  c = __builtin_fma(c, z, -1.0 / 720);
  c = __builtin_fma(c, z, 1.0 / 24);
  c = __builtin_fma(c, z, -0.5);
  c = __builtin_fma(c, z, 1.0);
  double sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
  return (sine_cosine){(float)(quadrant & 2 ? -sine : sine),
                       (float)((quadrant + 1) & 2 ? -cosine : cosine)};
}

/* ---- random numbers ---- */

typedef uint64_t vq __attribute__((vector_size(VL * 4)));

/* x * m of the low half of each 64-bit lane. */
INLINE vq v_mul_wide(vq x, uint32_t m) {
#if defined __AVX512F__
  return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif defined __AVX2__ && defined __FMA__
  return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#else
  return (x & 0xffffffffu) * (uint64_t)m;
#endif
}

typedef struct {
  vu high, low;
} vu_product;

/* Both halves of the products with m. */
INLINE vu_product v_mul(vu x, uint32_t m) {
  const vq upper = (vq){} + 0xffffffff00000000u;
  vq even = v_mul_wide((vq)x, m), odd = v_mul_wide((vq)x >> 32, m);
  return (vu_product){(vu)((even >> 32) | (odd & upper)), (vu)((even & ~upper) | (odd << 32))};
}

/* Philox4x32-10 (Salmon et al., SC'11) on VL counters at once; the counters are replaced by the
 * random words. */
INLINE void v_philox(vu counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    vu_product a = v_mul(counter[0], 0xD2511F53u), b = v_mul(counter[2], 0xCD9E8D57u);
    counter[0] = b.high ^ counter[1] ^ key0;
    counter[1] = b.low;
    counter[2] = a.high ^ counter[3] ^ key1;
    counter[3] = a.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

/* Random words as numbers in (0, 1): (word + 1/2) / 2^32 in float32, at most 1 - 2^-24. */
INLINE vf v_uniform(vu words) {
  vf v = v_fma(__builtin_convertvector(words, vf), v_set(0x1p-32f), v_set(0x1p-33f));
  vf top = v_set(0x1.fffffep-1f);
  return v_select(v > top, top, v);
}

/* Standard Gumbel noise from uniform v. The noise that can win comes from small v, where float32
 * is finest. */
INLINE vf v_gumbel(vf v) { return -v_log(-v_log1p(-v)); }

/* Whether any lane of a comparison holds. */
INLINE int v_any(vi mask) {
#if defined __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined __AVX2__ && defined __FMA__
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int any = 0;
  for (int lane = 0; lane < VL; lane++) any |= mask[lane];
  return any != 0;
#endif
}
