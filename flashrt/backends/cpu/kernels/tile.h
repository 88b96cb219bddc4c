/* The one inner loop of linear and attention: a tile of fma chains held in registers.
 *
 * IS: chains over ascending k of (lanes of a stored group of 32) x (tokens), each chain that of
 * one output element.
 * IS NOT: where chains begin or end; callers say so, and own the order. Included by: linear.c,
 * attention.c.
 *
 * A group is the part of 32 lanes whose vectors, times TOKENS tokens, fill the register file.
 * Fewer tokens take more groups at once, since few chains leave the multipliers waiting for each
 * other. bf16 stays bf16 up to the registers: widening costs a shift and a mask, which run beside
 * the multipliers.
 */
#pragma once
#include "common.h"

#if defined __AVX512F__
enum { TOKENS = 12, GROUP_VECTORS = 1 }; /* 24 of 32 registers accumulate */
#elif defined __AVX2__
enum { TOKENS = 6, GROUP_VECTORS = 1 }; /* 12 of 16 */
#else
enum { TOKENS = 6, GROUP_VECTORS = 2 }; /* 24 of 32 narrow ones */
#endif
enum {
  GROUP_WORDS = GROUP_VECTORS * VL, /* the first group has lanes [0, n) and [16, 16 + n) */
  PARTS = LANES / 2 / GROUP_WORDS,  /* groups in 32 lanes */
  MAX_GROUPS = 4,                   /* at once */
  MAX_VECTORS = MAX_GROUPS * GROUP_VECTORS
};

/* Chains of n_vectors pairs of vectors and n_tokens tokens: low[v] holds VL lanes, high[v] those
 * 16 further on. */
typedef struct {
  vf low[MAX_VECTORS][TOKENS], high[MAX_VECTORS][TOKENS];
} chains;

/* First lane of vector v of the group `part`, within its 32 lanes. */
INLINE int first_lane(int part, int v) {
  return part % PARTS * GROUP_WORDS + v % GROUP_VECTORS * VL;
}

/* Where that lane is stored, within its 32. */
INLINE int lane_offset(int lane, int dtype) { return dtype == DTYPE_BF16 ? 2 * lane : lane; }

INLINE void load_lanes(const void *w, int64_t index, const int dtype, vf *low, vf *high) {
  if (dtype == DTYPE_BF16) {
    vu words = v_load_words((const uint16_t *)w + index);
    *low = v_low(words);
    *high = v_high(words);
  } else {
    *low = v_load((const float *)w + index);
    *high = v_load((const float *)w + index + 16);
  }
}

/* What to prefetch while n_k steps of `part` are read from w on. A tile that takes all parts of
 * its lanes at once reads memory at an even pace: a little ahead. One that takes them in turn
 * would wait for memory in its first pass only: there each pass asks for its part of what comes
 * next. */
INLINE const char *ahead_of(const void *w, const int dtype, const int n_groups, int part, int n_k) {
  enum { NEAR = 1 << 10, FAR = 16 << 10 /* bytes; measured */ };
  int64_t part_nbytes = (int64_t)n_k * (LANES * (dtype == DTYPE_BF16 ? 2 : 4) / PARTS);
  return (const char *)w + (n_groups < PARTS ? FAR + part % PARTS * part_nbytes : NEAR);
}

/* chain = fma(w[k], x[k], chain) for k in [0, n_k); w[v] is vector v at k = 0, and x of token t is
 * x[t * t_step + k * k_step]. From `ahead` on, unless NULL, as many bytes are prefetched as are
 * read. dtype, n_vectors, n_tokens are constants where this is inlined. */
INLINE void extend_chains(chains *c, const int dtype, const int n_vectors, const int n_tokens,
                          const void *const *w, const float *x, const int64_t t_step,
                          const int64_t k_step, int n_k, const char *ahead) {
  const int bytes_per_k = n_vectors * VL * 2 * (dtype == DTYPE_BF16 ? 2 : 4);
  UNROLL_4
  for (int64_t k = 0; k < n_k; k++) {
    if (ahead) {
      UNROLL
      for (int b = 0; b < bytes_per_k; b += 64) __builtin_prefetch(ahead + k * bytes_per_k + b);
    }
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      vf low, high;
      load_lanes(w[v], k * LANES, dtype, &low, &high);
      UNROLL
      for (int t = 0; t < n_tokens; t++) {
        vf xt = v_set(x[t * t_step + k * k_step]);
        c->low[v][t] = v_fma(low, xt, c->low[v][t]);
        c->high[v][t] = v_fma(high, xt, c->high[v][t]);
      }
      /* Load x anew for each vector: kept in registers, it would push chains out. */
      if (n_tokens > 1) __asm__ volatile("" ::: "memory");
    }
  }
}
