/* linear: y = x w^T, weights in panels of 32 rows (bf16; others by linear_stored.c), float32
 * activations.
 *
 * Order: output rows sit in vector lanes, so each output is a chain of scalar fma:
 * y = ((s0 + s1) + s2) + ..., one s per 256 ascending k; s = ((c0 + c1) + c2) + ..., each c a chain
 * over 64 ascending k from +0 (one chain over all 256 would round twice as much). Width, tile
 * shape, rows in the launch and threads decide only which chains run side by side.
 *
 * Rows of x are packed by all threads, [slice][tile of tokens][k][token]. Scratch: n * K * 4 bytes;
 * without it, rows go one by one. Then threads claim panels, and either
 *   few rows   weights are streamed once, chain by chain: what a chain reads serves all rows while
 *              it is in L1, and memory is read at an even pace; or
 *   many rows  slices go outermost: a slice of x stays in L2 while the panels pass, and a band of
 *              lanes, one cache line of y, is widened to float32 in L1 before all rows use it.
 */
#include "gathered.h"
#include "linear_stored.h"

enum {
  FEW_ROWS = 4 * TOKENS,                                /* with more, widening pays; measured */
  PANELS = MAX_GROUPS > PARTS ? MAX_GROUPS / PARTS : 1, /* streamed side by side */
  AHEAD = 4 << 10,                                      /* bytes prefetched ahead; measured */
  CLAIM = 4                                             /* panels at once; measured */
};

/* Panels x a slice x a tile of tokens. */
typedef struct {
  const uint16_t *w; /* the first panel, at the slice's first k */
  const float *x;    /* [k][token] */
  float *y;          /* column 0 of that panel */
  int64_t panel_elements, y_stride;
  int64_t n_cols; /* columns of y from there on that exist */
  int n_groups;   /* of all panels */
  int n_k;
  int is_first_slice, is_whole; /* whole: 256 k, and all columns exist */
  const char *ahead;            /* many rows: weights to come, n_ahead cache lines with each tile */
  int n_ahead;
} tile_job;

/* ---- sums ---- */

/* sum = c, or sum += c. */
INLINE void add_chains(chains *sum, const chains *c, int is_first, const int n_vectors,
                       const int n_tokens) {
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      sum->low[v][t] = is_first ? c->low[v][t] : sum->low[v][t] + c->low[v][t];
      sum->high[v][t] = is_first ? c->high[v][t] : sum->high[v][t] + c->high[v][t];
    }
  }
}

/* y = s, or y += s, for the columns that exist. */
INLINE void fold(float *y, int64_t n_cols, vf s, int is_first_slice) {
  if (n_cols >= VL) {
    v_store(y, is_first_slice ? s : v_load(y) + s);
    return;
  }
  for (int i = 0; i < n_cols; i++) y[i] = is_first_slice ? s[i] : y[i] + s[i];
}

/* Column, from the first panel's on, of vector v of the groups from `group` on. */
INLINE int64_t column_of(int group, int v) {
  group += v / GROUP_VECTORS;
  return group / PARTS * LANES + first_lane(group, v);
}

INLINE void fold_chains(const tile_job *job, const chains *sum, int group, const int n_vectors,
                        const int n_tokens) {
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    int64_t col = column_of(group, v), n_cols = job->n_cols - col;
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      float *y = job->y + t * job->y_stride + col;
      fold(y, n_cols, sum->low[v][t], job->is_first_slice);
      fold(y + 16, n_cols - 16, sum->high[v][t], job->is_first_slice);
    }
  }
}

/* ---- few rows ---- */

/* One chain of n_groups groups from `group` on, added to `sum`. */
INLINE void stream_chain(const tile_job *job, int group, int k, chains *sum, const int n_groups,
                         const int n_tokens) {
  const int n_vectors = n_groups * GROUP_VECTORS;
  const void *w[MAX_VECTORS];
  chains c;
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    int of = group + v / GROUP_VECTORS;
    w[v] = job->w + of / PARTS * job->panel_elements + k * LANES +
           lane_offset(first_lane(of, v), DTYPE_BF16);
  }
  /* One token streams best as it is. Groups of a panel share its cache lines: each asks for its
   * part of those that come next. */
  const char *ahead = NULL;
  if (n_tokens > 1) {
    const uint16_t *panel = job->w + group / PARTS * job->panel_elements + k * LANES;
    ahead = (const char *)panel + AHEAD + group % PARTS * (CHAIN * LANES * 2 / PARTS);
  }
  const float *x = job->x + k * n_tokens;
  int n_k = (int)min_of(CHAIN, job->n_k - k);
  clear_chains(&c, n_vectors, n_tokens);
  if (n_k == CHAIN) { /* a constant: the loop is unrolled without a rest */
    extend_chains(&c, FORM_BF16, n_vectors, n_tokens, w, x, 1, n_tokens, CHAIN, ahead);
  } else {
    extend_chains(&c, FORM_BF16, n_vectors, n_tokens, w, x, 1, n_tokens, n_k, NULL);
  }
  add_chains(sum, &c, k == 0, n_vectors, n_tokens);
}

INLINE void stream(const tile_job *job, const int n_groups, const int n_tokens) {
  chains sum[PANELS * PARTS];
  for (int k = 0; k < job->n_k; k += CHAIN) {
    for (int i = 0; i * n_groups < job->n_groups; i++) {
      stream_chain(job, i * n_groups, k, &sum[i], n_groups, n_tokens);
    }
  }
  for (int i = 0; i * n_groups < job->n_groups; i++) {
    fold_chains(job, &sum[i], i * n_groups, n_groups * GROUP_VECTORS, n_tokens);
  }
}

/* ---- many rows ---- */

/* A band of a panel over the slice, in FORM_GROUP. */
static void widen_band(const tile_job *job, int band, float *wide) {
  for (int k = 0; k < job->n_k; k++) {
    UNROLL
    for (int lane = 0; lane < BAND; lane += VL) {
      int of = band * BAND + lane;
      vu words = v_load_words(job->w + k * LANES + of % (LANES / 2) * 2);
      v_store(wide + k * BAND + lane, of < LANES / 2 ? v_low(words) : v_high(words));
    }
  }
}

/* y, or y + the sums, for a band and a tile of tokens. is_whole: of the job, as a constant. */
INLINE void wide_tile(const tile_job *job, int band, const float *wide, const int n_tokens,
                      const int is_whole) {
  const int length = is_whole ? SLICE : job->n_k, is_first_slice = job->is_first_slice;
  const int64_t stride = job->y_stride, n_cols = is_whole ? BAND : job->n_cols - band * BAND;
  float *y = job->y + band * BAND;
  _Alignas(64) float sums[TOKENS * BAND], *sum = sums;
  __asm__("" : "+r"(sum)); /* in memory, for GCC: registers are the chains' */
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    for (int col = 0; col < BAND; col += 16) __builtin_prefetch(y + t * stride + col, 1);
  }
  for (int k = 0; k < length; k += CHAIN) {
    const int n_k = is_whole ? CHAIN : (int)min_of(CHAIN, length - k);
    const void *w[MAX_VECTORS];
    chains c;
    UNROLL
    for (int v = 0; v < GROUP_VECTORS; v++) w[v] = wide + k * BAND + v * VL;
    clear_chains(&c, GROUP_VECTORS, n_tokens);
    extend_chains(&c, FORM_GROUP, GROUP_VECTORS, n_tokens, w, job->x + k * n_tokens, 1, n_tokens,
                  n_k, NULL);
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      UNROLL
      for (int v = 0; v < GROUP_VECTORS; v++) {
        fold(sum + t * BAND + v * VL, VL, c.low[v][t], k == 0);
        fold(sum + t * BAND + GROUP_WORDS + v * VL, VL, c.high[v][t], k == 0);
      }
    }
  }
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    UNROLL
    for (int lane = 0; lane < BAND; lane += VL) {
      vf s = v_load(sum + t * BAND + lane);
      fold(y + t * stride + lane, n_cols - lane, s, is_first_slice);
    }
  }
}

/* On to the tile after one of n_tokens. */
INLINE void pass_tile(tile_job *job, const int n_tokens) {
  job->x += job->n_k * n_tokens;
  job->y += job->y_stride * n_tokens;
  for (int i = 0; i < job->n_ahead; i++) __builtin_prefetch(job->ahead + i * 64, 0, 2);
  job->ahead += job->n_ahead * 64;
}

/* ---- tiles by size ---- */

typedef void (*stream_function)(const tile_job *job);
typedef void (*wide_function)(tile_job *job, int band, const float *wide, int n);

#define STREAM(groups, tokens) \
  static void stream_##groups##x##tokens(const tile_job *job) { stream(job, groups, tokens); }
#define WIDE(tokens)                                                             \
  static void wide_##tokens(tile_job *job, int band, const float *wide, int n) { \
    for (; n > 0; n--, pass_tile(job, tokens)) {                                 \
      if (job->is_whole) wide_tile(job, band, wide, tokens, 1);                  \
      else wide_tile(job, band, wide, tokens, 0);                                \
    }                                                                            \
  }
STREAM(4, 1)
STREAM(2, 1)
STREAM(2, 2)
STREAM(2, 3)
STREAM(1, 1)
STREAM(1, 2)
STREAM(1, 3)
STREAM(1, 4)
STREAM(1, 5)
STREAM(1, 6)
WIDE(1)
WIDE(2)
WIDE(3)
WIDE(4)
WIDE(5)
WIDE(6)
#define ONE_TO_6(name) name##1, name##2, name##3, name##4, name##5, name##6
#if defined __AVX512F__
STREAM(4, 2)
STREAM(4, 3)
STREAM(2, 4)
STREAM(2, 5)
STREAM(2, 6)
STREAM(1, 7)
STREAM(1, 8)
STREAM(1, 9)
STREAM(1, 10)
STREAM(1, 11)
STREAM(1, 12)
WIDE(7)
WIDE(8)
WIDE(9)
WIDE(10)
WIDE(11)
WIDE(12)
#define SEVEN_TO_12(name) name##7, name##8, name##9, name##10, name##11, name##12
/* [groups][tokens]; one group is always there, more only for as few tokens as leave registers. */
static const stream_function streams[MAX_GROUPS + 1][TOKENS + 1] = {
    [1] = {0, ONE_TO_6(stream_1x), SEVEN_TO_12(stream_1x)},
    [2] = {0, ONE_TO_6(stream_2x)},
    [4] = {0, stream_4x1, stream_4x2, stream_4x3}};
static const wide_function wides[TOKENS + 1] = {0, ONE_TO_6(wide_), SEVEN_TO_12(wide_)};
#else
static const stream_function streams[MAX_GROUPS + 1][TOKENS + 1] = {
    [1] = {0, ONE_TO_6(stream_1x)},
    [2] = {0, stream_2x1, stream_2x2, stream_2x3},
    [4] = {0, stream_4x1}};
static const wide_function wides[TOKENS + 1] = {0, ONE_TO_6(wide_)};
#endif

/* ---- x in tiles of tokens ---- */

typedef struct {
  const linear_args *a;
  const stored_matrix *w;
  const float *packed; /* one row is packed as it is */
  int64_t first;       /* row of a->x and a->y */
  int n, n_tiles;
  int least, n_more; /* tokens of a tile; the first n_more have one more */
} token_tiles;

static token_tiles tiles_of(const linear_args *a, const stored_matrix *w, const float *packed,
                            int first, int n) {
  int is_stored = w->dtype != DTYPE_BF16 && n <= FEW_STORED;
  int n_tiles = (int)ceil_div(n, is_stored ? STORED_TOKENS : TOKENS);
  return (token_tiles){a, w, packed, first, n, n_tiles, n / n_tiles, n % n_tiles};
}
static inline int first_token(const token_tiles *x, int tile) {
  return tile * x->least + (int)min_of(tile, x->n_more);
}
static inline int slice_length(const token_tiles *x, int64_t k0) {
  return (int)min_of(SLICE, x->a->K - k0);
}
static inline int64_t packed_offset(const token_tiles *x, int64_t k0, int tile) {
  return x->n * k0 + (int64_t)first_token(x, tile) * slice_length(x, k0);
}

INLINE void pack_rows(const float *const *rows, int64_t k0, int n_k, const int n_tokens,
                      float *out) {
  for (int k = 0; k < n_k; k++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) out[k * n_tokens + t] = rows[t][k0 + k];
  }
}

/* Rows [token] of a tile and a slice -> [k][token]. */
static void pack_tile(const token_tiles *x, const float *const *rows, int64_t k0, int tile,
                      float *packed) {
  int n_tokens = first_token(x, tile + 1) - first_token(x, tile), n_k = slice_length(x, k0);
  float *out = packed + packed_offset(x, k0, tile);
  if (n_tokens == TOKENS) pack_rows(rows, k0, n_k, TOKENS, out);
  else pack_rows(rows, k0, n_k, n_tokens, out);
}

/* All threads: rows [token] -> [slice][tile][k][token]. */
static void pack_tokens(const token_tiles *x, float *packed, int tid, int nt) {
  int64_t K = x->a->K;
  span mine = share(ceil_div(K, SLICE) * x->n_tiles, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int tile = (int)(unit % x->n_tiles), m0 = first_token(x, tile);
    const float *rows[TOKENS];
    for (int t = 0; m0 + t < first_token(x, tile + 1); t++)
      rows[t] = (const float *)x->a->x + (m0 + t) * K;
    pack_tile(x, rows, unit / x->n_tiles * SLICE, tile, packed);
  }
}

/* ---- panels x slices x tiles ---- */

static tile_job job_of(const token_tiles *x, int64_t panel, int n_panels, int64_t k0) {
  int64_t K = x->a->K, N = x->a->N;
  return (tile_job){.w = (const uint16_t *)x->a->w + (panel * K + k0) * LANES,
                    .y_stride = x->a->y_stride,
                    .panel_elements = K * LANES,
                    .n_cols = N - panel * LANES,
                    .n_groups = n_panels * PARTS,
                    .n_k = slice_length(x, k0),
                    .is_first_slice = k0 == 0,
                    .is_whole = slice_length(x, k0) == SLICE && N >= (panel + n_panels) * LANES};
}

/* Points the job to a tile; returns its tokens. */
static int take_tile(tile_job *job, const token_tiles *x, int64_t panel, int64_t k0, int tile) {
  int m0 = first_token(x, tile);
  job->x = x->packed + packed_offset(x, k0, tile);
  job->y = x->a->y + (x->first + m0) * x->a->y_stride + panel * LANES;
  return first_token(x, tile + 1) - m0;
}

static void few_rows(const token_tiles *x, span panels) {
  if (x->w->dtype != DTYPE_BF16) {
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
      float *y = x->a->y + x->first * x->a->y_stride + panel * LANES;
      flashrt_stream_stored(x->w, panel, x->packed, x->n, x->n_tiles, y, x->a->y_stride,
                            x->a->N - panel * LANES);
    }
    return;
  }
  for (int64_t panel = panels.begin; panel < panels.end; panel += PANELS) {
    int n_panels = (int)min_of(PANELS, panels.end - panel);
    for (int64_t k0 = 0; k0 < x->a->K; k0 += SLICE) {
      tile_job job = job_of(x, panel, n_panels, k0);
      for (int tile = 0; tile < x->n_tiles; tile++) {
        int n_tokens = take_tile(&job, x, panel, k0, tile), n_groups = MAX_GROUPS;
        while (job.n_groups % n_groups || !streams[n_groups][n_tokens]) n_groups /= 2;
        streams[n_groups][n_tokens](&job);
      }
    }
  }
}

/* Bands are counted through all panels. */
static void many_rows(const token_tiles *x, span bands) {
  _Alignas(64) float wide[SLICE * BAND];
  open_slice slice;
  int is_bf16 = x->w->dtype == DTYPE_BF16;
  int64_t K = x->a->K, first = bands.begin / BANDS, last = (bands.end - 1) / BANDS;
  for (int64_t k0 = 0; k0 < K; k0 += SLICE) {
    int64_t nbytes = slice_nbytes_of(x->w, filled_length(x->w, k0));
    for (int64_t i = bands.begin; i < bands.end; i++) {
      int64_t panel = i / BANDS;
      int band = (int)(i % BANDS);
      tile_job job = job_of(x, panel, 1, k0);
      take_tile(&job, x, panel, k0, 0);
      if (is_bf16) {
        widen_band(&job, band, wide);
      } else {
        if (band == 0 || i == bands.begin) flashrt_open_slice(&slice, x->w, panel, k0);
        flashrt_widen_band(&slice, band, wide);
      }
      job.n_ahead = (int)ceil_div(nbytes, 64 * BANDS * x->n_tiles);
      job.ahead = panel < last ? slice_at(x->w, panel + 1, k0) /* or the first one's next slice */
                               : slice_at(x->w, first, k0 + SLICE);
      job.ahead += band * x->n_tiles * job.n_ahead * 64;
      if (x->n_more) wides[x->least + 1](&job, band, wide, x->n_more);
      wides[x->least](&job, band, wide, x->n_tiles - x->n_more);
    }
  }
}

/* Weights that stream for long enough go to threads in pieces, by claims; others in equal parts. */
static void share_few_rows(const token_tiles *x, int tid, int nt) {
  enum { MOST = 1 << 20, LEAST = 128 << 10 /* bytes of a piece; measured */ };
  int64_t n_panels = ceil_div(x->a->N, LANES), unit = PANELS * x->w->panel_nbytes;
  if (n_panels * x->w->panel_nbytes < (int64_t)nt * MOST) {
    few_rows(x, share(n_panels, tid, nt));
    return;
  }
  claim c = {.n = ceil_div(n_panels, PANELS), .nt = nt};
  c.most = max_of(1, MOST / unit);
  c.least = max_of(1, LEAST / unit);
  while (flashrt_claim(&c)) {
    few_rows(x, (span){c.mine.begin * PANELS, min_of(c.mine.end * PANELS, n_panels)});
  }
}

/* How many rows are few. */
static inline int few_of(const stored_matrix *w) {
  return w->dtype == DTYPE_BF16 ? FEW_ROWS : FEW_STORED;
}

/* Without room to pack them: row after row. */
static void one_by_one(const linear_args *a, const stored_matrix *w, int n_rows, int tid, int nt) {
  for (int row = 0; row < n_rows; row++) {
    token_tiles x = tiles_of(a, w, (const float *)a->x + (int64_t)row * a->K, row, 1);
    if (row) flashrt_barrier(nt); /* claims start anew */
    share_few_rows(&x, tid, nt);
  }
}

void op_linear(const linear_args *a, int tid, int nt) {
  const stored_matrix w = STORED(a, w, a->K);
  int n_rows = rows_of(a->cursor, a->T);
  float *packed = NULL;
  if (n_rows > 1) packed = flashrt_scratch(n_rows * (int64_t)a->K * (int64_t)sizeof(float));
  if (!packed) {
    one_by_one(a, &w, n_rows, tid, nt);
    return;
  }
  token_tiles x = tiles_of(a, &w, packed, 0, n_rows);
  pack_tokens(&x, packed, tid, nt);
  flashrt_barrier(nt);
  if (n_rows <= few_of(&w)) {
    share_few_rows(&x, tid, nt);
    return;
  }
  claim c = {.n = ceil_div(a->N, BAND), .most = CLAIM * BANDS, .least = 1, .nt = nt};
  while (flashrt_claim(&c)) many_rows(&x, c.mine);
}

/* ---- gathered rows ---- */

/* `y`: of column 0 */
static linear_args args_of(const gathered *x, float *y, int64_t stride) {
  return (linear_args){.w = x->w.base,
                       .y = y,
                       .T = x->n,
                       .K = (int32_t)x->w.K,
                       .N = (int32_t)x->N,
                       .y_stride = (int32_t)stride};
}

void flashrt_pack_floats(gathered *x, void *room) {
  x->packed = room && x->n > 1 ? room : (void *)x->rows[0];
  if (x->n == 1) return;
  const linear_args a = args_of(x, NULL, 0);
  token_tiles tiles = tiles_of(&a, &x->w, room, 0, x->n);
  for (int64_t k0 = 0; k0 < x->w.K; k0 += SLICE) {
    for (int tile = 0; tile < tiles.n_tiles; tile++)
      pack_tile(&tiles, x->rows + first_token(&tiles, tile), k0, tile, room);
  }
}

void flashrt_multiply_floats(const gathered *x, span panels, float *y, int64_t stride) {
  const linear_args a = args_of(x, y - panels.begin * LANES, stride);
  token_tiles tiles = tiles_of(&a, &x->w, x->packed, 0, x->n);
  if (x->n <= few_of(&x->w)) few_rows(&tiles, panels);
  else many_rows(&tiles, (span){panels.begin * BANDS, panels.end * BANDS});
}
