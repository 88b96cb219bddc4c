/* linear_bfloat16: y = x w^T over panels of bfloat16, x rounded to bfloat16. It takes the place of
 * op_linear where the device says so.
 *
 * Definition. K is filled up with zeros to steps of 32 k. x is rounded to nearest, ties to even.
 * All in float32, each operation rounded once; and everywhere a subnormal counts as a zero of its
 * sign: of x before it is rounded, of w, of what is added, and of results, once they are rounded.
 *   e = a chain of 16 fma from +0 over the even k of a step, o = another over its odd k
 *   y = ((+0 + s0) + s1) + ..., where s = e + o, over ascending steps
 * This is what the instruction TDPBF16PS of AMX does with one step, for 16 rows of x and 16 of w at
 * once. So the bits do not depend on rows, threads, the width of vectors, or on whether a processor
 * has AMX. One exception: ARM finds subnormal results before it rounds them, so what would become
 * the smallest normal number by rounding is a zero there; and a processor that is neither x86 nor
 * ARM keeps subnormals.
 *
 * One row streams w, all its chains side by side, and is rounded where it is used. More rows are
 * packed by all threads; then threads claim panels, a slice of which is laid out for all rows:
 *   with tiles     x is [slice][16 rows][step][row][32 k] in bfloat16; w is laid out in pairs of k
 *                  in L1, while the first rows are multiplied, and 32 rows by 32 columns of y stay in
 *                  tiles for a slice; for few rows K is one slice
 *   without tiles  x is [slice][tile of tokens][k][token] in float32, values as rounded; w is read
 *                  as it is by few tiles of tokens, and widened to float32 in L1 for more
 *   with pairs     for more tiles of tokens, where there is VDPBF16PS: it does two steps of a chain,
 *                  the high halves' and then the low halves', in the mode that the definition asks
 *                  for. So a word of x and of w holds two neighbours of a chain, the first one high
 * Scratch: at most 4 bytes per row and k filled up; without it, rows go one by one.
 */
#include "amx.h"
#include "float_mode.h"
#include "gathered.h"
#include "tile.h"

enum {
  STEP = 32,              /* k of two chains */
  ROW_NBYTES = LANES * 2, /* of a panel: one k */
  STEP_NBYTES = STEP * ROW_NBYTES,
#if defined __AVX512F__
  ONE_ROW_GROUPS = 4, /* of one row at once */
#else
  ONE_ROW_GROUPS = 2,
#endif
  PANELS = ONE_ROW_GROUPS > PARTS ? ONE_ROW_GROUPS / PARTS : 1, /* streamed side by side */
  FEW_TILES = 4,          /* of tokens; for more, widening pays: measured for linear.c */
  CLAIM = 8,              /* panels at once */
  BLOCK_ROWS = 256,       /* with tiles: what x of a block takes stays in L2; measured */
  SUMS_NBYTES = 64 << 10, /* of a block, some panels at once; measured */
  FEW_ROWS = 32           /* with tiles: w is what takes time */
};

/* Rows of x times panels of w. */
typedef struct {
  const char *w; /* the first panel */
  int64_t K, N, panel_nbytes;
  const float *x;
  const float *const *rows; /* NULL: those of x, one after the other */
  float *y;                 /* of the first row and panel */
  int64_t stride;
  int n;
  int has_tiles;
  int64_t slice; /* k of x that lie together */
  void *packed;  /* NULL: one row, as it is */
} product;

static inline const float *row_of(const product *p, int row) {
  return p->rows ? p->rows[row] : p->x + row * p->K;
}
static inline int slice_length(const product *p, int64_t k0) {
  return (int)min_of(p->slice, p->K - k0);
}
static inline int n_steps_of(int n_k) { return (int)ceil_div(n_k, STEP); }

/* ---- x, rounded ---- */

/* In the high halves of words. */
INLINE vu v_rounded(vf x) {
  vu bits = (vu)x, nearest = bits + 0x7fff + (bits >> 16 & 1);
  vi size = (vi)(bits & 0x7fffffffu);
  vf y = v_select(size > 0x7f800000, (vf)(bits | 0x400000u), (vf)nearest);
  return (vu)v_select(size < 0x00800000, (vf)(bits & 0x80000000u), y) & 0xffff0000u;
}

/* A step of a row, n_k of it there, as float32. */
INLINE void round_step(const float *x, int n_k, float *out) {
  float filled[STEP];
  if (n_k < STEP) {
    for (int k = 0; k < STEP; k++) filled[k] = k < n_k ? x[k] : 0;
    x = filled;
  }
  UNROLL
  for (int k = 0; k < STEP; k += VL) v_store(out + k, (vf)v_rounded(v_load(x + k)));
}

/* ---- without tiles ---- */

/* Groups of lanes x some steps x a tile of tokens. */
typedef struct {
  const char *w; /* the first panel, at the first step; or one group, widened */
  int64_t panel_nbytes;
  const char *last;       /* NULL, or the last step, filled up: panels STEP_NBYTES apart */
  const float *x;         /* [k][token]; of one row that is not packed as it is */
  float *y;               /* column 0 of the first panel */
  int64_t stride, n_cols; /* columns of y from there on that exist */
  int n_k, is_first;
} tile_job;

INLINE vf load_some(const float *y, int64_t n_cols) {
  if (n_cols >= VL) return v_load(y);
  vf v = {0};
  for (int i = 0; i < n_cols; i++) v[i] = y[i];
  return v;
}

INLINE void store_some(float *y, int64_t n_cols, vf v) {
  if (n_cols >= VL) {
    v_store(y, v);
    return;
  }
  for (int i = 0; i < n_cols; i++) y[i] = v[i];
}

/* Chains over every second k of a step, from w and x on; or with `odd` over both in turn. */
INLINE void extend_half(chains *even, chains *odd, const int form, const int n_vectors,
                        const int n_tokens, const char *const *w, const float *x) {
  enum { AT_ONCE = 8 };
  const char *at[MAX_VECTORS];
  UNROLL
  for (int v = 0; v < n_vectors; v++) at[v] = w[v];
  for (int k = 0; k < STEP; k += AT_ONCE, x += AT_ONCE * n_tokens) {
    UNROLL
    for (int i = 0; i < AT_ONCE; i += 2) {
      extend_by_one(even, form, n_vectors, n_tokens, at, i * step_nbytes(form), x + i * n_tokens,
                    1);
      if (!odd) continue;
      extend_by_one(odd, form, n_vectors, n_tokens, at, (i + 1) * step_nbytes(form),
                    x + (i + 1) * n_tokens, 1);
    }
    UNROLL
    for (int v = 0; v < n_vectors; v++) at[v] += AT_ONCE * step_nbytes(form);
  }
}

/* y += e + o. */
INLINE void add_step(chains *y, const int form, const int n_vectors, const int n_tokens,
                     const char *const *w, const float *x) {
  const int are_joint = 2 * n_vectors * n_tokens <= GROUP_VECTORS * TOKENS; /* in registers */
  chains e, o, kept, *even = &kept;
  clear_chains(&e, n_vectors, n_tokens);
  if (are_joint) clear_chains(&o, n_vectors, n_tokens);
  extend_half(&e, are_joint ? &o : NULL, form, n_vectors, n_tokens, w, x);
  if (!are_joint) {
    const char *odd[MAX_VECTORS];
    __asm__("" : "+r"(even)); /* in memory: registers are the chains' */
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      odd[v] = w[v] + step_nbytes(form);
      UNROLL
      for (int t = 0; t < n_tokens; t++) {
        even->low[v][t] = e.low[v][t];
        even->high[v][t] = e.high[v][t];
      }
    }
    clear_chains(&o, n_vectors, n_tokens);
    extend_half(&o, NULL, form, n_vectors, n_tokens, odd, x + n_tokens);
  }
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      y->low[v][t] += (are_joint ? e.low[v][t] : even->low[v][t]) + o.low[v][t];
      y->high[v][t] += (are_joint ? e.high[v][t] : even->high[v][t]) + o.high[v][t];
    }
  }
}

/* n_groups from `group` on, counted through the panels. */
INLINE void add_steps(const tile_job *job, int group, const int form, const int n_groups,
                      const int n_tokens, const int is_packed) {
  const int n_vectors = n_groups * GROUP_VECTORS;
  chains sums, *y = &sums;
  __asm__("" : "+r"(y)); /* in memory, as above */
  int64_t column[MAX_VECTORS];
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    int of = group + v / GROUP_VECTORS;
    column[v] = of / PARTS * LANES + first_lane(of, v);
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      const float *at = job->y + t * job->stride + column[v];
      int64_t n_cols = job->n_cols - column[v];
      y->low[v][t] = job->is_first ? (vf){0} : load_some(at, n_cols);
      y->high[v][t] = job->is_first ? (vf){0} : load_some(at + 16, n_cols - 16);
    }
  }
  for (int k = 0; k < job->n_k; k += STEP) {
    const int is_filled = job->last && k + STEP > job->n_k;
    const char *w[MAX_VECTORS];
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      int of = group + v / GROUP_VECTORS;
      if (form == FORM_GROUP) w[v] = job->w + k * step_nbytes(form) + v * VL * 4;
      else if (is_filled) w[v] = job->last + of / PARTS * STEP_NBYTES + 4 * first_lane(of, v);
      else w[v] = job->w + of / PARTS * job->panel_nbytes + k * ROW_NBYTES + 4 * first_lane(of, v);
    }
    float rounded[STEP];
    const float *x = job->x + k * n_tokens;
    if (!is_packed) {
      round_step(x, (int)min_of(STEP, job->n_k - k), rounded);
      x = rounded;
    }
    add_step(y, form, n_vectors, n_tokens, w, x);
  }
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      float *at = job->y + t * job->stride + column[v];
      store_some(at, job->n_cols - column[v], y->low[v][t]);
      store_some(at + 16, job->n_cols - column[v] - 16, y->high[v][t]);
    }
  }
}

#if defined __AVX512BF16__
#define HAS_PAIRS 1
enum {
  CHAIN_PAIRS = STEP / 4,       /* of one chain, in a step */
  PAIRS_NBYTES = 2 * LANES * 2, /* of w: a pair, 16 lanes twice */
  PAIRS_STEP = CHAIN_PAIRS * 2  /* words of x of a token: those of the even k, then the odd */
};
_Static_assert(VL == 16 && PARTS == 1, "AVX512-BF16 has vectors of AVX-512");
#define DOT_INTO(c, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b))

/* One chain of a step; w and x as laid out. */
INLINE void extend_pairs(vf *low, vf *high, const int n_tokens, const char *w, const float *x) {
  UNROLL
  for (int t = 0; t < n_tokens; t++) low[t] = high[t] = (vf){0};
  UNROLL
  for (int j = 0; j < CHAIN_PAIRS; j++) {
    vf first = v_load((const float *)(w + j * PAIRS_NBYTES));
    vf second = v_load((const float *)(w + j * PAIRS_NBYTES + PAIRS_NBYTES / 2));
    KEEP(first);
    KEEP(second);
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      vf xt = v_set(x[j * n_tokens + t]);
      DOT_INTO(low[t], first, xt);
      DOT_INTO(high[t], second, xt);
      __asm__ volatile("" ::: "memory"); /* one x at a time, as in tile.h */
    }
  }
}

/* All lanes of a panel x a tile of tokens. */
INLINE void add_pairs(const tile_job *job, const int n_tokens) {
  vf sums[2][TOKENS], kept[2][TOKENS], (*y)[TOKENS] = sums, (*even)[TOKENS] = kept;
  __asm__("" : "+r"(y), "+r"(even)); /* in memory: registers are the chains' */
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    const float *at = job->y + t * job->stride;
    y[0][t] = job->is_first ? (vf){0} : load_some(at, job->n_cols);
    y[1][t] = job->is_first ? (vf){0} : load_some(at + 16, job->n_cols - 16);
  }
  const char *w = job->w;
  const float *x = job->x;
  for (int k = 0; k < job->n_k; k += STEP) {
    vf low[TOKENS], high[TOKENS];
    extend_pairs(low, high, n_tokens, w, x);
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      even[0][t] = low[t];
      even[1][t] = high[t];
    }
    extend_pairs(low, high, n_tokens, w + CHAIN_PAIRS * PAIRS_NBYTES, x + CHAIN_PAIRS * n_tokens);
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      y[0][t] += even[0][t] + low[t];
      y[1][t] += even[1][t] + high[t];
    }
    w += 2 * CHAIN_PAIRS * PAIRS_NBYTES;
    x += PAIRS_STEP * n_tokens;
  }
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    float *at = job->y + t * job->stride;
    store_some(at, job->n_cols, y[0][t]);
    store_some(at + 16, job->n_cols - 16, y[1][t]);
  }
}
#else
#define HAS_PAIRS 0
#endif

typedef void (*tile_function)(const tile_job *job, int group);

#define ROW(groups)                                          \
  static void row_##groups(const tile_job *job, int group) { \
    add_steps(job, group, FORM_BF16, groups, 1, 0);          \
  }
#define FEW(tokens)                                          \
  static void few_##tokens(const tile_job *job, int group) { \
    add_steps(job, group, FORM_BF16, 1, tokens, 1);          \
  }
#define MANY(tokens)                                          \
  static void many_##tokens(const tile_job *job, int group) { \
    add_steps(job, group, FORM_GROUP, 1, tokens, 1);          \
  }
ROW(1)
ROW(2)
FEW(2)
FEW(3)
FEW(4)
FEW(5)
FEW(6)
#define TWO_TO_6 few_2, few_3, few_4, few_5, few_6
/* [groups], and [tokens] of a tile: more than FEW_TILES are nearly full */
#if defined __AVX512F__
ROW(4)
FEW(7)
FEW(8)
FEW(9)
FEW(10)
FEW(11)
FEW(12)
MANY(9)
MANY(10)
MANY(11)
MANY(12)
static const tile_function rows[] = {0, row_1, row_2, 0, row_4};
static const tile_function few[TOKENS + 1] = {0,     0,      TWO_TO_6, few_7, few_8,
                                              few_9, few_10, few_11,   few_12};
static const tile_function many[TOKENS + 1] = {
    [9] = many_9, [10] = many_10, [11] = many_11, [12] = many_12};
#if HAS_PAIRS
#define PAIRS(tokens) \
  static void pairs_##tokens(const tile_job *job, int group) { add_pairs(job, tokens); }
PAIRS(9)
PAIRS(10)
PAIRS(11)
PAIRS(12)
static const tile_function pairs[TOKENS + 1] = {
    [9] = pairs_9, [10] = pairs_10, [11] = pairs_11, [12] = pairs_12};
#endif
#else
MANY(5)
MANY(6)
static const tile_function rows[] = {0, row_1, row_2};
static const tile_function few[TOKENS + 1] = {0, 0, TWO_TO_6};
static const tile_function many[TOKENS + 1] = {[5] = many_5, [6] = many_6};
#endif

/* Tokens of a tile are `least`, and one more in the first n_more tiles. */
typedef struct {
  int n, least, n_more;
} token_tiles;

static inline token_tiles tiles_of(int n_rows) {
  int n = (int)ceil_div(n_rows, TOKENS);
  return (token_tiles){n, n_rows / n, n_rows % n};
}
static inline int first_token(const token_tiles *tiles, int tile) {
  return tile * tiles->least + (int)min_of(tile, tiles->n_more);
}
static inline float *floats_at(const product *p, const token_tiles *tiles, int64_t k0, int tile) {
  int64_t filled = n_steps_of(slice_length(p, k0)) * STEP;
  return (float *)p->packed + p->n * k0 + first_token(tiles, tile) * filled;
}

/* With pairs: a word for two k. */
static inline int has_pairs(const product *p) {
  return HAS_PAIRS && !p->has_tiles && tiles_of(p->n).n > FEW_TILES;
}
static inline float *words_at(const product *p, const token_tiles *tiles, int64_t k0, int tile) {
  return (float *)p->packed + (floats_at(p, tiles, k0, tile) - (float *)p->packed) / 2;
}

/* Of a slice and a tile, [k][token]. */
static void pack_floats(const product *p, int64_t k0, int tile) {
  const token_tiles tiles = tiles_of(p->n);
  int first = first_token(&tiles, tile), n = first_token(&tiles, tile + 1) - first;
  int n_k = slice_length(p, k0);
  float *out = floats_at(p, &tiles, k0, tile);
  for (int k = 0; k < n_k; k += STEP, out += STEP * n) {
    for (int t = 0; t < n; t++) {
      _Alignas(64) float rounded[STEP];
      round_step(row_of(p, first + t) + k0 + k, (int)min_of(STEP, n_k - k), rounded);
      for (int i = 0; i < STEP; i++) out[i * n + t] = rounded[i];
    }
  }
}

#if HAS_PAIRS
/* The same as pairs: [step][even k, odd k][pair][token], a word each. */
static void pack_pairs(const product *p, int64_t k0, int tile) {
  const token_tiles tiles = tiles_of(p->n);
  int first = first_token(&tiles, tile), n = first_token(&tiles, tile + 1) - first;
  int n_k = slice_length(p, k0);
  float *out = words_at(p, &tiles, k0, tile);
  for (int k = 0; k < n_k; k += STEP, out += PAIRS_STEP * n) {
    for (int t = 0; t < n; t++) {
      _Alignas(64) float rounded[STEP];
      uint32_t bits[STEP];
      round_step(row_of(p, first + t) + k0 + k, (int)min_of(STEP, n_k - k), rounded);
      memcpy(bits, rounded, sizeof bits);
      for (int j = 0; j < CHAIN_PAIRS; j++) {
        uint32_t even = bits[4 * j] | bits[4 * j + 2] >> 16;
        uint32_t odd = bits[4 * j + 1] | bits[4 * j + 3] >> 16;
        memcpy(out + j * n + t, &even, sizeof even);
        memcpy(out + (CHAIN_PAIRS + j) * n + t, &odd, sizeof odd);
      }
    }
  }
}

INLINE void lay_out_neighbours(vu first, vu second, char *out) {
  vu low = (second & 0xffffu) | first << 16, high = second >> 16 | (first & 0xffff0000u);
  memcpy(out, &low, sizeof low);
  memcpy(out + PAIRS_NBYTES / 2, &high, sizeof high);
}

/* A panel's slice, filled up: [step][even k, odd k][pair][16 lanes twice]. */
static void lay_out_pairs(const char *w, int n_k, char *out) {
  for (int k = 0; k < n_k; k += STEP, out += 2 * CHAIN_PAIRS * PAIRS_NBYTES) {
    for (int j = 0; j < CHAIN_PAIRS; j++) {
      vu rows_of_w[4];
      for (int i = 0; i < 4; i++) {
        int at = k + 4 * j + i;
        rows_of_w[i] = at < n_k ? v_load_words(w + at * ROW_NBYTES) : (vu){0};
      }
      char *to = out + j * PAIRS_NBYTES;
      lay_out_neighbours(rows_of_w[0], rows_of_w[2], to);
      lay_out_neighbours(rows_of_w[1], rows_of_w[3], to + CHAIN_PAIRS * PAIRS_NBYTES);
    }
  }
}

static void multiply_pairs(const product *p, span panels) {
  _Alignas(64) char laid_out[SLICE * ROW_NBYTES];
  const token_tiles tiles = tiles_of(p->n);
  for (int64_t k0 = 0; k0 < p->K; k0 += p->slice) {
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
      tile_job job = {.w = laid_out,
                      .stride = p->stride,
                      .n_cols = p->N - panel * LANES,
                      .n_k = slice_length(p, k0),
                      .is_first = k0 == 0};
      lay_out_pairs(p->w + panel * p->panel_nbytes + k0 * ROW_NBYTES, job.n_k, laid_out);
      for (int tile = 0; tile < tiles.n; tile++) {
        int first = first_token(&tiles, tile), n = first_token(&tiles, tile + 1) - first;
        job.x = words_at(p, &tiles, k0, tile);
        job.y = p->y + first * p->stride + panel * LANES;
        pairs[n](&job, 0);
      }
    }
  }
}
#else
static void pack_pairs(const product *p, int64_t k0, int tile) {}
static void multiply_pairs(const product *p, span panels) {}
#endif

/* The last step of panels from w on, filled up; NULL where it is whole. */
static const char *fill_last(const char *w, int64_t panel_nbytes, int n_panels, int n_k,
                             char *room) {
  int there = n_k % STEP * ROW_NBYTES;
  if (!there) return NULL;
  for (int i = 0; i < n_panels; i++, room += STEP_NBYTES) {
    memcpy(room, w + i * panel_nbytes + n_k / STEP * STEP_NBYTES, (size_t)there);
    memset(room + there, 0, (size_t)(STEP_NBYTES - there));
  }
  return room - n_panels * STEP_NBYTES;
}

/* One row, over all of K at once. */
static void stream_row(const product *p, span panels) {
  _Alignas(64) char room[PANELS * STEP_NBYTES];
  for (int64_t panel = panels.begin; panel < panels.end; panel += PANELS) {
    int n_panels = (int)min_of(PANELS, panels.end - panel);
    const char *w = p->w + panel * p->panel_nbytes;
    tile_job job = {.w = w,
                    .panel_nbytes = p->panel_nbytes,
                    .last = fill_last(w, p->panel_nbytes, n_panels, (int)p->K, room),
                    .x = row_of(p, 0),
                    .y = p->y + panel * LANES,
                    .n_cols = p->N - panel * LANES,
                    .n_k = (int)p->K,
                    .is_first = 1};
    for (int group = 0, n = ONE_ROW_GROUPS; group < n_panels * PARTS; group += n) {
      while (group + n > n_panels * PARTS) n /= 2;
      rows[n](&job, group);
    }
  }
}

/* A group of a panel's slice in float32, filled up, as FORM_GROUP has it. */
static void widen_group(const char *w, int n_k, int group, float *wide) {
  for (int k = 0; k < n_k; k++, wide += 2 * GROUP_WORDS) {
    UNROLL
    for (int v = 0; v < GROUP_VECTORS; v++) {
      vu words = v_load_words(w + k * ROW_NBYTES + 4 * first_lane(group, v));
      v_store(wide + v * VL, v_low(words));
      v_store(wide + GROUP_WORDS + v * VL, v_high(words));
    }
  }
  memset(wide, 0, (size_t)(n_steps_of(n_k) * STEP - n_k) * 2 * GROUP_WORDS * sizeof *wide);
}

static void multiply_vectors(const product *p, span panels) {
  _Alignas(64) float wide[SLICE * 2 * GROUP_WORDS];
  _Alignas(64) char room[STEP_NBYTES];
  const token_tiles tiles = tiles_of(p->n);
  const int is_wide = tiles.n > FEW_TILES;
  for (int64_t k0 = 0; k0 < p->K; k0 += p->slice) {
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
      const char *w = p->w + panel * p->panel_nbytes + k0 * ROW_NBYTES;
      tile_job job = {.w = w,
                      .panel_nbytes = p->panel_nbytes,
                      .stride = p->stride,
                      .n_cols = p->N - panel * LANES,
                      .n_k = slice_length(p, k0),
                      .is_first = k0 == 0};
      if (!is_wide) job.last = fill_last(w, 0, 1, job.n_k, room);
      for (int group = 0; group < PARTS; group++) {
        if (is_wide) {
          widen_group(w, job.n_k, group, wide);
          job.w = (const char *)wide;
        }
        for (int tile = 0; tile < tiles.n; tile++) {
          int first = first_token(&tiles, tile), n = first_token(&tiles, tile + 1) - first;
          job.x = floats_at(p, &tiles, k0, tile);
          job.y = p->y + first * p->stride + panel * LANES;
          (is_wide ? many : few)[n](&job, group);
        }
      }
    }
  }
}

/* ---- with tiles ---- */

#if HAS_TILES
enum {
  PAIR_ROWS = 2 * TILE_ROWS,
  HALF_NBYTES = STEP_NBYTES / 2,
  TILE_NBYTES = 1024,
  SLICE_NBYTES = SLICE * ROW_NBYTES
};

/* Rows of a tile of x: the last one of several is filled up, with anything. */
static inline int64_t tile_rows_of(const product *p) { return min_of(p->n, TILE_ROWS); }

static inline char *tile_at(const product *p, int64_t k0, int64_t tile) {
  int64_t filled = n_steps_of(slice_length(p, k0)) * STEP, of_tile = tile_rows_of(p);
  return (char *)p->packed + 2 * of_tile * (ceil_div(p->n, TILE_ROWS) * k0 + tile * filled);
}

/* Of a slice and a tile: [step][row][32 k]. */
static void pack_tile(const product *p, int64_t k0, int tile) {
  int first = tile * TILE_ROWS, n = (int)min_of(TILE_ROWS, p->n - first);
  int n_k = slice_length(p, k0), n_steps = n_steps_of(n_k);
  int64_t of_step = tile_rows_of(p) * TILE_ROW_NBYTES;
  for (int row = 0; row < n; row++) {
    const float *x = row_of(p, first + row) + k0;
    char *out = tile_at(p, k0, tile) + row * TILE_ROW_NBYTES;
    for (int step = 0; step < n_steps; step++, x += STEP, out += of_step) {
      float filled[STEP];
      const float *from = x;
      if ((step + 1) * STEP > n_k) {
        for (int k = 0; k < STEP; k++) filled[k] = step * STEP + k < n_k ? x[k] : 0;
        from = filled;
      }
      __m512bh both = _mm512_cvtne2ps_pbh((__m512)v_load(from + 16), (__m512)v_load(from));
      memcpy(out, &both, sizeof both);
    }
  }
}

INLINE void lay_out_pair(vu even, vu odd, char *out) {
  vu low = (even & 0xffffu) | odd << 16, high = even >> 16 | (odd & 0xffff0000u);
  memcpy(out, &low, sizeof low);
  memcpy(out + HALF_NBYTES, &high, sizeof high);
}

/* A step of a panel, n_k of it there, filled up: [16 columns twice][pairs of k][column][k of the
 * pair]. */
INLINE void lay_out_step(const char *w, int n_k, char *out) {
  if (n_k >= STEP) {
    UNROLL_4
    for (int k = 0; k < STEP; k += 2)
      lay_out_pair(v_load_words(w + k * ROW_NBYTES), v_load_words(w + (k + 1) * ROW_NBYTES),
                   out + k / 2 * TILE_ROW_NBYTES);
    return;
  }
  for (int k = 0; k < STEP; k += 2) {
    vu even = {0}, odd = {0};
    if (k < n_k) even = v_load_words(w + k * ROW_NBYTES);
    if (k + 1 < n_k) odd = v_load_words(w + (k + 1) * ROW_NBYTES);
    lay_out_pair(even, odd, out + k / 2 * TILE_ROW_NBYTES);
  }
}

/* Tiles 0, 1 and 2, 3: 16 columns of y twice, for two tiles of x, which are 4 and 5; 6, 7: w. */
static void configure(int n_rows) {
  tile_shapes shapes = {.palette = 1};
  for (int i = 0; i < N_TILES; i++) {
    shapes.rows[i] = (uint8_t)(i < 6 ? n_rows : TILE_ROWS);
    shapes.row_nbytes[i] = TILE_ROW_NBYTES;
  }
  TILE_CONFIGURE(&shapes);
}

/* One tile of x or two times a panel's slice, which is laid out already, or on the way: then w is
 * read while tiles are multiplied. `sums`: of the slices before, a tile after the other; y:
 * where they go with the last slice, or NULL. */
typedef struct {
  const char *x, *x_more, *w;
  char *laid_out, *sums, *y;
  int64_t x_step, y_row; /* in bytes */
  int n_k, is_first;
} tiles_job;

INLINE void multiply_tiles(const tiles_job *job, const int are_two, const int is_on_the_way) {
  char *sums = job->sums;
  if (job->is_first) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (are_two) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
  } else {
    TILE_LOAD(0, sums, TILE_ROW_NBYTES);
    TILE_LOAD(1, sums + TILE_NBYTES, TILE_ROW_NBYTES);
    if (are_two) {
      TILE_LOAD(2, sums + 2 * TILE_NBYTES, TILE_ROW_NBYTES);
      TILE_LOAD(3, sums + 3 * TILE_NBYTES, TILE_ROW_NBYTES);
    }
  }
  const char *x = job->x, *x_more = job->x_more;
  for (int k = 0; k < job->n_k; k += STEP) {
    char *w = job->laid_out + k * ROW_NBYTES % SLICE_NBYTES;
    if (is_on_the_way) lay_out_step(job->w + k * ROW_NBYTES, job->n_k - k, w);
    TILE_LOAD(4, x, TILE_ROW_NBYTES);
    TILE_LOAD(6, w, TILE_ROW_NBYTES);
    TILE_LOAD(7, w + HALF_NBYTES, TILE_ROW_NBYTES);
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    x += job->x_step;
    if (are_two) {
      TILE_LOAD(5, x_more, TILE_ROW_NBYTES);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
      x_more += job->x_step;
    }
  }
  char *to = job->y ? job->y : sums;
  int64_t row = job->y ? job->y_row : TILE_ROW_NBYTES;
  int64_t column = job->y ? TILE_ROW_NBYTES : TILE_NBYTES;
  char *more = job->y ? to + TILE_ROWS * row : to + 2 * TILE_NBYTES;
  TILE_STORE(0, to, row);
  TILE_STORE(1, to + column, row);
  if (are_two) {
    TILE_STORE(2, more, row);
    TILE_STORE(3, more + column, row);
  }
}

/* Sums of a pair of tiles, to the rows and columns of y that exist. */
static void copy_out(const char *sums, int n_rows, int64_t n_cols, float *y, int64_t stride) {
  for (int row = 0; row < n_rows; row++) {
    for (int col = 0; col < n_cols; col += 16) {
      int tile = row / TILE_ROWS * 2 + col / 16;
      memcpy(y + row * stride + col, sums + tile * TILE_NBYTES + row % TILE_ROWS * TILE_ROW_NBYTES,
             (size_t)min_of(16, n_cols - col) * sizeof *y);
    }
  }
}

/* A block of rows times a panel's slice. */
static void multiply_slice(const product *p, int64_t panel, int64_t k0, span of_rows,
                           char *laid_out, char *sums) {
  int64_t n_cols = min_of(LANES, p->N - panel * LANES);
  int is_last = k0 + p->slice >= p->K;
  tiles_job job = {.w = p->w + panel * p->panel_nbytes + k0 * ROW_NBYTES,
                   .laid_out = laid_out,
                   .x_step = tile_rows_of(p) * TILE_ROW_NBYTES,
                   .y_row = p->stride * (int64_t)sizeof(float),
                   .n_k = slice_length(p, k0),
                   .is_first = k0 == 0};
  for (int64_t row = of_rows.begin; row < of_rows.end; row += PAIR_ROWS, sums += 4 * TILE_NBYTES) {
    int64_t n = min_of(PAIR_ROWS, of_rows.end - row), tile = row / TILE_ROWS;
    float *y = p->y + row * p->stride + panel * LANES;
    int is_on_the_way = row == of_rows.begin; /* the first ones lay out for all */
    int is_whole = n_cols == LANES && (n == PAIR_ROWS || n == tile_rows_of(p));
    job.x = tile_at(p, k0, tile);
    job.x_more = tile_at(p, k0, tile + 1);
    job.sums = sums;
    job.y = is_last && is_whole ? (char *)y : NULL;
    if (n > TILE_ROWS && is_on_the_way) multiply_tiles(&job, 1, 1);
    else if (n > TILE_ROWS) multiply_tiles(&job, 1, 0);
    else if (is_on_the_way) multiply_tiles(&job, 0, 1);
    else multiply_tiles(&job, 0, 0);
    if (is_last && !is_whole) copy_out(sums, (int)n, n_cols, y, p->stride);
  }
}

/* Some panels times a block of rows, slice by slice: x of a slice stays in L2, a panel's slice and
 * two tiles of x in L1. */
static void multiply_with_tiles(const product *p, span panels, span of_rows) {
  _Alignas(64) char laid_out[SLICE_NBYTES];
  _Alignas(64) char sums[SUMS_NBYTES];
  int64_t of_panel = ceil_div(of_rows.end - of_rows.begin, PAIR_ROWS) * 4 * TILE_NBYTES;
  int64_t at_once = p->slice > SLICE ? 1 : SUMS_NBYTES / of_panel;
  configure((int)tile_rows_of(p));
  for (; panels.begin < panels.end; panels.begin += at_once) {
    int64_t end = min_of(panels.end, panels.begin + at_once);
    for (int64_t k0 = 0; k0 < p->K; k0 += p->slice) {
      for (int64_t panel = panels.begin; panel < end; panel++)
        multiply_slice(p, panel, k0, of_rows, laid_out, sums + (panel - panels.begin) * of_panel);
    }
  }
  TILE_RELEASE();
}
#else
enum { TILE_ROWS = 1 };
static inline int may_use_tiles(void) { return 0; }
static void pack_tile(const product *p, int64_t k0, int tile) {}
static void multiply_with_tiles(const product *p, span panels, span of_rows) {}
#endif

/* ---- products ---- */

/* One row: as it is. Else all or some threads pack, each its share of slices x tiles. */
static void pack(const product *p, int tid, int nt) {
  int n_tiles = p->has_tiles ? (int)ceil_div(p->n, TILE_ROWS) : tiles_of(p->n).n;
  span mine = share(ceil_div(p->K, p->slice) * n_tiles, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int64_t k0 = unit / n_tiles * p->slice;
    if (p->has_tiles) pack_tile(p, k0, (int)(unit % n_tiles));
    else if (has_pairs(p)) pack_pairs(p, k0, (int)(unit % n_tiles));
    else pack_floats(p, k0, (int)(unit % n_tiles));
  }
}

/* Units are panels, of each block of rows anew. */
static int64_t n_blocks_of(const product *p) {
  return p->packed && p->has_tiles ? ceil_div(p->n, BLOCK_ROWS) : 1;
}

static void multiply(const product *p, span units) {
  if (p->packed && p->has_tiles) {
    int64_t n_panels = ceil_div(p->N, LANES);
    for (int64_t unit = units.begin; unit < units.end;) {
      int64_t block = unit / n_panels, first = unit % n_panels;
      span panels = {first, min_of(n_panels, first + units.end - unit)};
      multiply_with_tiles(p, panels,
                          (span){block * BLOCK_ROWS, min_of(p->n, (block + 1) * BLOCK_ROWS)});
      unit += panels.end - panels.begin;
    }
    return;
  }
  float_mode callers = enter_flushing_mode();
  if (p->packed && has_pairs(p)) multiply_pairs(p, units);
  else if (p->packed) multiply_vectors(p, units);
  else stream_row(p, units);
  leave_default_mode(callers);
}

/* Weights that stream for long enough go to threads in pieces, by claims; others in equal parts. */
static void share_units(const product *p, int tid, int nt) {
  enum { MOST = 1 << 20, LEAST = 128 << 10 /* bytes of a piece, as in linear.c */ };
  int64_t n_panels = ceil_div(p->N, LANES), at_once = p->packed ? 1 : PANELS;
  int64_t nbytes = p->panel_nbytes * at_once;
  int is_few = p->n <= FEW_ROWS;
  if (is_few && n_panels * p->panel_nbytes < (int64_t)nt * MOST) {
    multiply(p, share(n_panels, tid, nt));
    return;
  }
  claim c = {
      .n = ceil_div(n_panels * n_blocks_of(p), at_once), .most = CLAIM, .least = 1, .nt = nt};
  if (is_few) {
    c.most = max_of(1, MOST / nbytes);
    c.least = max_of(1, LEAST / nbytes);
  }
  while (flashrt_claim(&c)) {
    int64_t end = c.mine.end * at_once;
    multiply(p, (span){c.mine.begin * at_once, at_once > 1 ? min_of(end, n_panels) : end});
  }
}

/* Few rows with tiles go through all of K at once: what takes time is to read w. */
static int64_t slice_of(int n, int has_tiles, int64_t K) {
  return has_tiles && n <= FEW_ROWS ? K : SLICE;
}

void op_linear_bfloat16(const linear_args *a, int tid, int nt) {
  product p = {.w = a->w,
               .K = a->K,
               .N = a->N,
               .panel_nbytes = (int64_t)a->K * ROW_NBYTES,
               .x = a->x,
               .y = a->y,
               .stride = a->y_stride,
               .n = rows_of(a->cursor, a->T),
               .has_tiles = may_use_tiles()};
  if (p.n < 1) return;
  p.slice = slice_of(p.n, p.has_tiles, p.K);
  if (p.n > 1) p.packed = flashrt_scratch(p.n * packed_nbytes(p.K));
  if (p.packed) {
    pack(&p, tid, nt);
    flashrt_barrier(nt);
    share_units(&p, tid, nt);
    return;
  }
  for (int left = p.n; left > 0; left--, p.x += p.K, p.y += p.stride) { /* row after row */
    p.n = 1;
    share_units(&p, tid, nt);
    if (left > 1) flashrt_barrier(nt); /* claims start anew */
  }
}

/* ---- gathered rows ---- */

static product product_of(const gathered *x, float *y, int64_t stride) {
  const int has_tiles = may_use_tiles();
  return (product){.w = x->w.base,
                   .K = x->w.K,
                   .N = x->N,
                   .panel_nbytes = x->w.panel_nbytes,
                   .rows = x->rows,
                   .y = y, /* of the first panel */
                   .stride = stride,
                   .n = x->n,
                   .has_tiles = has_tiles,
                   .slice = slice_of(x->n, has_tiles, x->w.K),
                   .packed = x->packed};
}

void flashrt_pack_bfloat16(gathered *x, void *room) {
  x->packed = x->n > 1 ? room : NULL;
  const product p = product_of(x, NULL, 0);
  if (p.packed) pack(&p, 0, 1);
}

void flashrt_multiply_bfloat16(const gathered *x, span panels, float *y, int64_t stride) {
  const product p = product_of(x, y - panels.begin * LANES, stride);
  multiply(&p, panels);
}
