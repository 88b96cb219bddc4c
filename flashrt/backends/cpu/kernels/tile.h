/* The one inner loop of linear and attention: a tile of fma chains held in registers.
 *
 * IS: chains over ascending k of (lanes of a stored group of 32) x (tokens), each chain that of
 * one output element.
 * IS NOT: where chains begin or end; callers say so, and own the order. Included by: linear.c,
 * attention.c.
 *
 * A group is the part of 32 lanes whose vectors, times TOKENS tokens, fill the register file.
 * Fewer tokens take more groups at once, since few chains leave the multipliers waiting for each
 * other. What is not a multiplication costs, too, where a core is shared with another thread: so
 * addresses are constants within a step, and whoever uses a group often widens it beforehand.
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

INLINE void clear_chains(chains *c, const int n_vectors, const int n_tokens) {
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) c->low[v][t] = c->high[v][t] = (vf){0};
  }
}

/* How lanes are stored: as in memory (common.h), or one group alone, in float32. */
enum { FORM_BF16 = DTYPE_BF16, FORM_F32 = DTYPE_F32, FORM_GROUP = 2 };

INLINE int step_nbytes(const int form) { /* from k to k + 1 */
  return form == FORM_BF16 ? LANES * 2 : form == FORM_F32 ? LANES * 4 : 2 * GROUP_WORDS * 4;
}
INLINE int used_nbytes(const int form) { /* of it, by one vector pair */
  return VL * 2 * (form == FORM_BF16 ? 2 : 4);
}

/* First lane of vector v of the group `part`, within its 32 lanes. */
INLINE int first_lane(int part, int v) {
  return part % PARTS * GROUP_WORDS + v % GROUP_VECTORS * VL;
}

/* Where that lane is stored, within its 32. */
INLINE int lane_offset(int lane, int dtype) { return dtype == DTYPE_BF16 ? 2 * lane : lane; }

/* KEEP(x): x is in a register from here on, however cheap loading it again may look.
 * FMA_INTO(c, a, b): c = fma(a, b, c), c staying where it is. Left the choice, GCC lets chains
 * wander from register to register until some spill.
 * FMA_FROM(a, p, c): a = fma(a, *p, c), p being read there and then. Left the choice, GCC keeps for
 * later, on the stack, what it has read once. */
#if defined __AVX512F__
#define KEEP(x) __asm__("" : "+v"(x))
#define FMA_INTO(c, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b))
#define FMA_FROM(a, p, c) \
  __asm__("vfmadd132ps %2, %1, %0" : "+v"(a) : "v"(c), "m"(*(const vf_anywhere *)(p)))
#elif defined __AVX2__ && defined __FMA__
#define KEEP(x) __asm__("" : "+x"(x))
#define FMA_INTO(c, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b))
#define FMA_FROM(a, p, c) \
  __asm__("vfmadd132ps %2, %1, %0" : "+x"(a) : "x"(c), "m"(*(const vf_anywhere *)(p)))
#else
#define KEEP(x) (void)(x)
#define FMA_INTO(c, a, b) ((c) = v_fma(a, b, c))
#define FMA_FROM(a, p, c) ((a) = v_fma(a, v_load(p), c))
#endif

INLINE void load_lanes(const void *w, const int form, vf *low, vf *high) {
  if (form == FORM_BF16) {
    vu words = v_load_words(w);
    KEEP(words);
    *low = v_low(words);
    *high = v_high(words);
  } else {
    *low = v_load(w);
    *high = v_load((const float *)w + (form == FORM_F32 ? 16 : GROUP_WORDS));
  }
}

/* chain = fma(w, x, chain), where vector v of w is `offset` bytes after w[v]. */
INLINE void extend_by_one(chains *c, const int form, const int n_vectors, const int n_tokens,
                          const char *const *w, const int offset, const float *x,
                          const int64_t t_step) {
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    vf low, high;
    load_lanes(w[v] + offset, form, &low, &high);
    if (n_tokens > 1) {
      KEEP(low);
      KEEP(high);
    }
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      vf xt = v_set(x[t * t_step]);
      FMA_INTO(c->low[v][t], low, xt);
      FMA_INTO(c->high[v][t], high, xt);
      /* Load one x at a time, and anew for each vector: more would push chains out of registers. */
      if (n_tokens > 1) __asm__ volatile("" ::: "memory");
    }
  }
}

/* chain = fma(w[k], x[k], chain) for k in [0, n_k); w[v] is vector v at k = 0, and x of token t is
 * x[t * t_step + k * k_step]. From `ahead` on, unless NULL, as many bytes are prefetched as are
 * read. form, n_vectors, n_tokens are constants where this is inlined. */
INLINE void extend_chains(chains *c, const int form, const int n_vectors, const int n_tokens,
                          const void *const *w, const float *x, const int64_t t_step,
                          const int64_t k_step, int n_k, const char *ahead) {
  enum { STEPS = 4 };
  const int read_nbytes = STEPS * n_vectors * used_nbytes(form);
  const char *at[MAX_VECTORS];
  UNROLL
  for (int v = 0; v < n_vectors; v++) at[v] = w[v];
  for (; n_k >= STEPS; n_k -= STEPS) {
    if (ahead) {
      UNROLL
      for (int b = 0; b < read_nbytes; b += 64) __builtin_prefetch(ahead + b);
      ahead += read_nbytes;
    }
    UNROLL
    for (int step = 0; step < STEPS; step++) {
      extend_by_one(c, form, n_vectors, n_tokens, at, step * step_nbytes(form), x + step * k_step,
                    t_step);
    }
    UNROLL
    for (int v = 0; v < n_vectors; v++) at[v] += STEPS * step_nbytes(form);
    x += STEPS * k_step;
  }
  for (; n_k > 0; n_k--) {
    extend_by_one(c, form, n_vectors, n_tokens, at, 0, x, t_step);
    UNROLL
    for (int v = 0; v < n_vectors; v++) at[v] += step_nbytes(form);
    x += k_step;
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
