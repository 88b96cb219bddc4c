/* What every CPU kernel shares: the calling convention, the split of work over threads, and where
 * an element is stored.
 *
 * IS: the ABI of `op_<name>` and the index functions of the storage layouts. IS NOT: arithmetic
 * (vec.h) or the threads themselves (pool.h). Included by: every file here.
 *
 * An op `f` is `void op_f(const f_args *a, int tid, int nt)`, called by all nt threads of the pool
 * at once; the replay puts a barrier after each launch. A kernel that needs one inside calls
 * flashrt_barrier(nt), on all threads alike.
 * Rows at or beyond rows_of(...) are neither read nor written.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ops.h" /* generated: <op>_args, words of cursors, dtypes; see core/header.py */
#include "vec.h"

enum {
  CHAIN = 64,        /* k per chain of fma of `linear` */
  SLICE = 4 * CHAIN, /* k per partial sum of `linear` */
  LANES = 32         /* matrix rows of a panel, positions of a granule, columns of a block */
};

/* ---- the launch ---- */

static inline int32_t position_of(const int32_t *cursor) { return cursor[CURSOR_POSITION]; }
static inline int rows_of(const int32_t *cursor, int T) {
  return cursor[CURSOR_ROWS] < T ? cursor[CURSOR_ROWS] : T;
}

/* Waits until all nt threads of the launch have come here; what they wrote before is then visible.
 * See pool.h. */
void flashrt_barrier(int nt);

/* Scratch shared by all threads of a launch, its bytes undefined at the start of each. NULL when
 * more is asked for than flashrt_workspace() has reserved. Needs of the kernels: linear, see
 * linear.c; the others none. */
void *flashrt_scratch(int64_t nbytes);

/* Units [begin, end) of n that fall to thread tid of nt. */
typedef struct {
  int64_t begin, end;
} span;

static inline span share(int64_t n, int tid, int nt) {
  return (span){n * tid / nt, n * (tid + 1) / nt};
}

/* Units [begin, end) of n, again and again until none is left, in pieces of at most `most` that
 * shrink to `least` towards the end, so that no thread waits long for one whose core is slow or
 * taken away.
 *   claim c = {.n = n, .most = 8, .least = 1, .nt = nt};
 *   while (flashrt_claim(&c)) ... c.mine ...
 * Which thread gets a unit depends on timing, so what is computed for it must not. One such loop
 * between two barriers, on all threads alike. */
typedef struct {
  int64_t n, most, least;
  int nt;
  span mine;
} claim;
int flashrt_claim(claim *c);

static inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- bfloat16 ---- */

static inline float from_bf16(uint16_t bits) { return s_from_bits((uint32_t)bits << 16); }

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bf16(float x) {
  uint32_t bits = s_bits(x);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void store_float(void *base, int64_t index, int dtype, float x) {
  if (dtype == DTYPE_BF16) ((uint16_t *)base)[index] = to_bf16(x);
  else ((float *)base)[index] = x;
}

/* ---- storage: where a logical element lies, counted in elements ---- */

/* Place of lane 0..31 in a group of 32. bfloat16 is interleaved: word r holds lane r low and lane
 * r + 16 high, so that a shift and a mask turn one load into two vectors of consecutive lanes. */
static inline int lane_slot(int lane, int dtype) {
  return dtype == DTYPE_BF16 ? (lane & 15) * 2 + (lane >> 4) : lane;
}

/* MATRIX [N, K]: see stored.h. */

/* COLUMN_BLOCKS [heads, dk, dv] f32: [heads][ceil(dv / 32)][dk][32 columns]. */
static inline int64_t state_index(int64_t head, int64_t i, int64_t j, int64_t dk, int64_t dv) {
  return ((head * ceil_div(dv, LANES) + j / LANES) * dk + i) * LANES + j % LANES;
}

/* ROWS_IN_LANES [planes, S, D]: [planes][ceil(S / 32)][D][32 positions]. */
static inline int64_t keys_index(int64_t plane, int64_t position, int64_t d, int64_t S, int64_t D,
                                 int dtype) {
  int64_t granule = plane * ceil_div(S, LANES) + position / LANES;
  return (granule * D + d) * LANES + lane_slot((int)(position % LANES), dtype);
}

/* COLS_IN_LANES [planes, S, D]: [planes][ceil(S / 32)][ceil(D / 32)][32 positions][32 columns].
 * What lies in the columns beyond D is never used. */
static inline int64_t values_index(int64_t plane, int64_t position, int64_t d, int64_t S, int64_t D,
                                   int dtype) {
  int64_t granule = plane * ceil_div(S, LANES) + position / LANES;
  int64_t block = granule * ceil_div(D, LANES) + d / LANES;
  return (block * LANES + position % LANES) * LANES + lane_slot((int)(d % LANES), dtype);
}
