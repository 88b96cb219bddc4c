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
 *   with tiles     x is [slice][16 rows][step][row][32 k] in bfloat16; w goes to pairs of k in L1,
 *                  and 32 rows by 32 columns of y stay in tiles for a slice
 *   without tiles  x is [slice][tile of tokens][k][token] in float32, values as rounded; w is read
 *                  as it is by one tile of tokens, and widened to float32 in L1 for more
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
  CLAIM = 8,                                                    /* panels at once; measured */
  BLOCK_ROWS = 512, /* of many rows: a slice of them stays in L2; measured */
  FEW_ROWS = 32     /* with tiles: w is what takes time */
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
  void *packed; /* NULL: one row, as it is */
} product;

static inline const float *row_of(const product *p, int row) {
  return p->rows ? p->rows[row] : p->x + row * p->K;
}
static inline int slice_length(const product *p, int64_t k0) {
  return (int)min_of(SLICE, p->K - k0);
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
/* [tokens]: of few rows, which are one tile; and of more, in tiles of half of TOKENS at least */
#define FEW_TO_6 FEW(2) FEW(3) FEW(4) FEW(5) FEW(6)
#define NAMES_TO_6 few_2, few_3, few_4, few_5, few_6
ROW(1)
ROW(2)
#if defined __AVX512F__
ROW(4)
FEW_TO_6
FEW(7)
FEW(8) FEW(9) FEW(10) FEW(11) FEW(12) MANY(6) MANY(7) MANY(8) MANY(9) MANY(10) MANY(11)
    MANY(12) static const tile_function rows[] = {0, row_1, row_2, 0, row_4};
static const tile_function few[] = {0, 0, NAMES_TO_6, few_7, few_8, few_9, few_10, few_11, few_12};
static const tile_function many[] = {0,      0,      0,      0,       0,       0,      many_6,
                                     many_7, many_8, many_9, many_10, many_11, many_12};
#else
FEW_TO_6
MANY(3) MANY(4) MANY(5) MANY(6) static const tile_function rows[] = {0, row_1, row_2};
static const tile_function few[] = {0, 0, NAMES_TO_6};
static const tile_function many[] = {0, 0, 0, many_3, many_4, many_5, many_6};
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
  for (int64_t k0 = 0; k0 < p->K; k0 += SLICE) {
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
      const char *w = p->w + panel * p->panel_nbytes + k0 * ROW_NBYTES;
      tile_job job = {.w = w,
                      .panel_nbytes = p->panel_nbytes,
                      .stride = p->stride,
                      .n_cols = p->N - panel * LANES,
                      .n_k = slice_length(p, k0),
                      .is_first = k0 == 0};
      if (tiles.n == 1) job.last = fill_last(w, 0, 1, job.n_k, room);
      for (int group = 0; group < PARTS; group++) {
        if (tiles.n > 1) widen_group(w, job.n_k, group, wide), job.w = (const char *)wide;
        for (int tile = 0; tile < tiles.n; tile++) {
          int first = first_token(&tiles, tile), n = first_token(&tiles, tile + 1) - first;
          job.x = floats_at(p, &tiles, k0, tile);
          job.y = p->y + first * p->stride + panel * LANES;
          (tiles.n > 1 ? many : few)[n](&job, group);
        }
      }
    }
  }
}

/* ---- with tiles ---- */

#if HAS_TILES
enum { PAIR_ROWS = 2 * TILE_ROWS, HALF_NBYTES = STEP_NBYTES / 2 };

static inline char *tile_at(const product *p, int64_t k0, int tile) {
  int64_t filled = n_steps_of(slice_length(p, k0)) * STEP;
  return (char *)p->packed + 2 * (p->n * k0 + tile * TILE_ROWS * filled);
}

/* Of a slice and 16 rows, or those that are left: [step][row][32 k]. */
static void pack_tile(const product *p, int64_t k0, int tile) {
  int first = tile * TILE_ROWS, n = (int)min_of(TILE_ROWS, p->n - first);
  int n_k = slice_length(p, k0), n_steps = n_steps_of(n_k);
  char *out = tile_at(p, k0, tile);
  for (int row = 0; row < n; row++) {
    const float *x = row_of(p, first + row) + k0;
    for (int step = 0; step < n_steps; step++, x += STEP) {
      float filled[STEP];
      const float *from = x;
      if ((step + 1) * STEP > n_k) {
        for (int k = 0; k < STEP; k++) filled[k] = step * STEP + k < n_k ? x[k] : 0;
        from = filled;
      }
      __m512bh both = _mm512_cvtne2ps_pbh((__m512)v_load(from + 16), (__m512)v_load(from));
      memcpy(out + (step * n + row) * TILE_ROW_NBYTES, &both, sizeof both);
    }
  }
}

/* A panel's slice, filled up: [step][16 columns twice][pairs of k][column][k of the pair]. */
static void lay_out(const char *w, int n_k, char *out) {
  int filled = n_steps_of(n_k) * STEP;
  for (int k = 0; k < filled; k += 2, w += 2 * ROW_NBYTES) {
    vu even = {0}, odd = {0};
    if (k < n_k) even = v_load_words(w);
    if (k + 1 < n_k) odd = v_load_words(w + ROW_NBYTES);
    vu low = (even & 0xffffu) | odd << 16, high = even >> 16 | (odd & 0xffff0000u);
    char *to = out + k / STEP * STEP_NBYTES + k % STEP / 2 * TILE_ROW_NBYTES;
    memcpy(to, &low, sizeof low);
    memcpy(to + HALF_NBYTES, &high, sizeof high);
  }
}

/* Tiles 0, 1 and 2, 3: 16 columns of y twice, of n and of n_more rows; 4, 5: x; 6, 7: w. */
static void configure(int n, int n_more) {
  const int rows[N_TILES] = {n, n, n_more, n_more, n, n_more, TILE_ROWS, TILE_ROWS};
  tile_shapes shapes = {.palette = 1};
  for (int i = 0; i < N_TILES; i++) {
    shapes.rows[i] = (uint8_t)rows[i];
    shapes.row_nbytes[i] = rows[i] ? TILE_ROW_NBYTES : 0;
  }
  TILE_CONFIGURE(&shapes);
}

/* y += 32 columns of a slice for n rows, and those of the next tile if there are more; the stride
 * is in bytes. */
INLINE void multiply_tiles(const char *x, const char *w, int n, int n_steps, float *y,
                           int64_t stride, int is_first, const int are_two, const char *x_more,
                           int n_more) {
  char *more = (char *)y + TILE_ROWS * stride;
  if (is_first) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (are_two) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
  } else {
    TILE_LOAD(0, y, stride);
    TILE_LOAD(1, y + 16, stride);
    if (are_two) {
      TILE_LOAD(2, more, stride);
      TILE_LOAD(3, more + 64, stride);
    }
  }
  for (int step = 0; step < n_steps; step++, w += STEP_NBYTES) {
    TILE_LOAD(4, x, TILE_ROW_NBYTES);
    TILE_LOAD(6, w, TILE_ROW_NBYTES);
    TILE_LOAD(7, w + HALF_NBYTES, TILE_ROW_NBYTES);
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    x += n * TILE_ROW_NBYTES;
    if (are_two) {
      TILE_LOAD(5, x_more, TILE_ROW_NBYTES);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
      x_more += n_more * TILE_ROW_NBYTES;
    }
  }
  TILE_STORE(0, y, stride);
  TILE_STORE(1, y + 16, stride);
  if (are_two) {
    TILE_STORE(2, more, stride);
    TILE_STORE(3, more + 64, stride);
  }
}

/* `ahead`: weights to come; each pair of tiles asks for n_ahead cache lines of them. */
static void multiply_slice(const product *p, int64_t panel, int64_t k0, span of_rows, const char *w,
                           const char *ahead) {
  _Alignas(64) float own[PAIR_ROWS * LANES]; /* where not all columns exist */
  int n_steps = n_steps_of(slice_length(p, k0)), is_first = k0 == 0;
  int64_t n_cols = p->N - panel * LANES, stride = p->stride;
  int n_pairs = (int)ceil_div(of_rows.end - of_rows.begin, PAIR_ROWS);
  int n_ahead = (int)ceil_div(slice_length(p, k0), n_pairs);
  for (int64_t row = of_rows.begin; row < of_rows.end; row += PAIR_ROWS) {
    int n = (int)min_of(TILE_ROWS, of_rows.end - row);
    int n_more = (int)min_of(TILE_ROWS, of_rows.end - row - n);
    int tile = (int)(row / TILE_ROWS);
    int is_odd = n_pairs > 1 && (n < TILE_ROWS || n_more % TILE_ROWS);
    if (is_odd) configure(n, n_more);
    float *y = p->y + row * stride + panel * LANES, *to = y;
    if (n_cols < LANES) {
      to = own;
      for (int i = 0; i < n + n_more && !is_first; i++)
        memcpy(own + i * LANES, y + i * stride, (size_t)n_cols * sizeof *y);
    }
    int64_t to_nbytes = (n_cols < LANES ? LANES : stride) * (int64_t)sizeof *y;
    const char *x = tile_at(p, k0, tile);
    if (n_more) {
      multiply_tiles(x, w, n, n_steps, to, to_nbytes, is_first, 1, tile_at(p, k0, tile + 1),
                     n_more);
    } else {
      multiply_tiles(x, w, n, n_steps, to, to_nbytes, is_first, 0, NULL, 0);
    }
    for (int i = 0; i < n + n_more && n_cols < LANES; i++)
      memcpy(y + i * stride, own + i * LANES, (size_t)n_cols * sizeof *y);
    if (is_odd) configure(TILE_ROWS, TILE_ROWS);
    for (int i = 0; i < n_ahead; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  }
}

/* Panels times a block of rows, slice by slice. */
static void multiply_block(const product *p, span panels, span of_rows) {
  _Alignas(64) char slice[SLICE / STEP * STEP_NBYTES];
  for (int64_t k0 = 0; k0 < p->K; k0 += SLICE) {
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
      const char *w = p->w + panel * p->panel_nbytes + k0 * ROW_NBYTES;
      lay_out(w, slice_length(p, k0), slice);
      const char *next = panel + 1 < panels.end
                             ? w + p->panel_nbytes
                             : p->w + panels.begin * p->panel_nbytes + (k0 + SLICE) * ROW_NBYTES;
      multiply_slice(p, panel, k0, of_rows, slice, next);
    }
  }
}

static void multiply_with_tiles(const product *p, span panels, span of_rows) {
  int n = (int)(of_rows.end - of_rows.begin);
  configure((int)min_of(n, TILE_ROWS), (int)(n < TILE_ROWS ? 0 : min_of(n - TILE_ROWS, TILE_ROWS)));
  if (n > FEW_ROWS) multiply_block(p, panels, of_rows);
  for (int64_t panel = panels.begin; n <= FEW_ROWS && panel < panels.end; panel++)
    multiply_block(p, (span){panel, panel + 1}, of_rows);
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
  span mine = share(ceil_div(p->K, SLICE) * n_tiles, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int64_t k0 = unit / n_tiles * SLICE;
    if (p->has_tiles) pack_tile(p, k0, (int)(unit % n_tiles));
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
  if (p->packed) multiply_vectors(p, units);
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
  return (product){.w = x->w.base,
                   .K = x->w.K,
                   .N = x->N,
                   .panel_nbytes = x->w.panel_nbytes,
                   .rows = x->rows,
                   .y = y, /* of the first panel */
                   .stride = stride,
                   .n = x->n,
                   .has_tiles = may_use_tiles(),
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
