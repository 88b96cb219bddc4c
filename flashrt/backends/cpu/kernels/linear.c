/* linear: y = x w^T, bf16 weights in panels of 32 rows, float32 activations.
 *
 * Order: output rows sit in vector lanes, so each output is a chain of scalar fma:
 * y = ((s0 + s1) + s2) + ..., one s per 256 ascending k; s = ((c0 + c1) + c2) + ..., each c a chain
 * over 64 ascending k from +0 (one chain over all 256 would round twice as much). Width, tile shape,
 * rows in the launch and threads decide only which chains run side by side.
 *
 * Tiles (tile.h) are swept in one of two ways:
 *   n <= DIRECT_ROWS  weights are streamed once.
 *   more              slices go outermost: a slice of x stays in L2 while the panels pass.
 * x is read where it lies, unless there are many long rows: those are first packed to
 * [slice][tile][k][token] by all threads. Scratch: n * K * 4 bytes; without it, nothing is packed.
 */
#include "tile.h"

enum {
  DIRECT_ROWS = 8,
  DIRECT_K = 2 * SLICE /* rows of x this short do not fall on the same few sets of the cache */
};

typedef struct {
  const uint16_t *w; /* the panel of the first group, at the slice's first k */
  int64_t panel_elements;
  const float *x; /* packed: [k][token]; direct: [token][x_stride] */
  int64_t x_stride;
  int n_k;
  float *y;                 /* column 0 of that panel */
  int64_t y_stride, n_cols; /* columns of y from there on that exist */
  int first_part;           /* which part of its panel the first group is */
  int is_first_slice;
} tile_job;

/* y = s, or y += s, for the columns that exist. */
INLINE void fold(float *y, int64_t n_cols, vf s, int is_first_slice) {
  if (n_cols >= VL) {
    v_store(y, is_first_slice ? s : v_load(y) + s);
    return;
  }
  for (int i = 0; i < n_cols; i++) y[i] = is_first_slice ? s[i] : y[i] + s[i];
}

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

INLINE void tile(const tile_job *job, const int n_groups, const int n_tokens, const int is_packed) {
  const int n_vectors = n_groups * GROUP_VECTORS;
  const int64_t t_step = is_packed ? 1 : job->x_stride, k_step = is_packed ? n_tokens : 1;
  const void *w[MAX_VECTORS];
  int64_t col[MAX_VECTORS];
  chains sum;
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    int group = job->first_part + v / GROUP_VECTORS, lane = first_lane(group, v);
    col[v] = group / PARTS * LANES + lane;
    w[v] = job->w + group / PARTS * job->panel_elements + lane_offset(lane, DTYPE_BF16);
    UNROLL
    for (int t = 0; t < n_tokens; t++) __builtin_prefetch(job->y + t * job->y_stride + col[v], 1);
  }
  /* One token streams best as it is. */
  const char *ahead = NULL;
  if (!is_packed && n_tokens > 1) {
    ahead = ahead_of(w[0], DTYPE_BF16, n_groups, job->first_part, job->n_k);
  }
  for (int k = 0; k < job->n_k; k += CHAIN) {
    chains c;
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      UNROLL
      for (int t = 0; t < n_tokens; t++) c.low[v][t] = c.high[v][t] = (vf){0};
    }
    const float *x = job->x + k * k_step;
    int n_k = (int)min_of(CHAIN, job->n_k - k);
    if (n_k == CHAIN) { /* a constant: the loop is unrolled without a rest */
      extend_chains(&c, DTYPE_BF16, n_vectors, n_tokens, w, x, t_step, k_step, CHAIN, ahead);
    } else {
      extend_chains(&c, DTYPE_BF16, n_vectors, n_tokens, w, x, t_step, k_step, n_k, ahead);
    }
    add_chains(&sum, &c, k == 0, n_vectors, n_tokens);
    UNROLL
    for (int v = 0; v < n_vectors; v++) w[v] = (const uint16_t *)w[v] + CHAIN * LANES;
    if (ahead) ahead += CHAIN * n_vectors * VL * 2 * (int)sizeof(uint16_t);
  }
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) {
      float *y = job->y + t * job->y_stride + col[v];
      fold(y, job->n_cols - col[v], sum.low[v][t], job->is_first_slice);
      fold(y + 16, job->n_cols - col[v] - 16, sum.high[v][t], job->is_first_slice);
    }
  }
}

#define TILE(groups, tokens)                                                                    \
  static void direct_##groups##x##tokens(const tile_job *job) { tile(job, groups, tokens, 0); } \
  static void packed_##groups##x##tokens(const tile_job *job) { tile(job, groups, tokens, 1); }
TILE(4, 1)
TILE(2, 1)
TILE(2, 2)
TILE(2, 3)
TILE(1, 1)
TILE(1, 2)
TILE(1, 3)
TILE(1, 4)
TILE(1, 5)
TILE(1, 6)
#if defined __AVX512F__
TILE(4, 2)
TILE(4, 3)
TILE(2, 4)
TILE(2, 5)
TILE(2, 6)
TILE(1, 7)
TILE(1, 8)
TILE(1, 9)
TILE(1, 10)
TILE(1, 11)
TILE(1, 12)
#endif

typedef void (*tile_function)(const tile_job *);
#define ROW_OF_6(way, g) \
  way##_##g##x1, way##_##g##x2, way##_##g##x3, way##_##g##x4, way##_##g##x5, way##_##g##x6
/* [groups][tokens]; fewer groups are always there, more only for as few tokens as leave registers
 * for them. */
#if defined __AVX512F__
#define TILES(way)                                                          \
  {                                                                         \
    [1] = {0,         ROW_OF_6(way, 1), way##_1x7,  way##_1x8,              \
           way##_1x9, way##_1x10,       way##_1x11, way##_1x12},            \
    [2] = {0, ROW_OF_6(way, 2)}, [4] = {0, way##_4x1, way##_4x2, way##_4x3} \
  }
#else
#define TILES(way)                                                                                \
  {                                                                                               \
    [1] = {0, ROW_OF_6(way, 1)}, [2] = {0, way##_2x1, way##_2x2, way##_2x3}, [4] = {0, way##_4x1} \
  }
#endif
static const tile_function direct_tiles[MAX_GROUPS + 1][TOKENS + 1] = TILES(direct);
static const tile_function packed_tiles[MAX_GROUPS + 1][TOKENS + 1] = TILES(packed);

/* ---- x in tiles of tokens ---- */

typedef struct {
  const linear_args *a;
  const float *packed; /* or NULL: direct */
  int n, n_tiles;
} token_tiles;

static inline int first_token(const token_tiles *x, int tile) {
  return (int)((int64_t)x->n * tile / x->n_tiles);
}
static inline int slice_length(const token_tiles *x, int64_t k0) {
  return (int)min_of(SLICE, x->a->K - k0);
}
static inline int64_t packed_offset(const token_tiles *x, int64_t k0, int tile) {
  return x->n * k0 + (int64_t)first_token(x, tile) * slice_length(x, k0);
}

/* All threads: rows [token] -> [slice][tile][k][token]. */
static void pack_tokens(const token_tiles *x, float *packed, int tid, int nt) {
  int64_t K = x->a->K;
  span mine = share(ceil_div(K, SLICE) * x->n_tiles, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int64_t k0 = unit / x->n_tiles * SLICE;
    int tile_index = (int)(unit % x->n_tiles), m0 = first_token(x, tile_index);
    int n_tokens = first_token(x, tile_index + 1) - m0, n_k = slice_length(x, k0);
    float *out = packed + packed_offset(x, k0, tile_index);
    for (int m = 0; m < n_tokens; m++) {
      const float *row = (const float *)x->a->x + (m0 + m) * K + k0;
      for (int k = 0; k < n_k; k++) out[k * n_tokens + m] = row[k];
    }
  }
}

/* ---- panels x slices x tiles ---- */

/* Panels [panel, panel + n_panels) x one slice x all tokens. */
static void panels_slice(const token_tiles *x, int64_t panel, int n_panels, int64_t k0) {
  const linear_args *a = x->a;
  int64_t K = a->K, N = a->N;
  tile_job job = {.w = (const uint16_t *)a->w + (panel * K + k0) * LANES,
                  .panel_elements = K * LANES,
                  .x_stride = K,
                  .n_k = slice_length(x, k0),
                  .y_stride = N,
                  .n_cols = N - panel * LANES,
                  .is_first_slice = k0 == 0};
  for (int t = 0; t < x->n_tiles; t++) {
    int m0 = first_token(x, t), n_tokens = first_token(x, t + 1) - m0;
    job.x = x->packed ? x->packed + packed_offset(x, k0, t) : (const float *)a->x + m0 * K + k0;
    job.y = a->y + m0 * N + panel * LANES;
    int n_groups = MAX_GROUPS;
    for (job.first_part = 0; job.first_part < n_panels * PARTS; job.first_part += n_groups) {
      const tile_function(*tiles)[TOKENS + 1] = x->packed ? packed_tiles : direct_tiles;
      while (job.first_part + n_groups > n_panels * PARTS || !tiles[n_groups][n_tokens])
        n_groups /= 2;
      tiles[n_groups][n_tokens](&job);
    }
  }
}

void op_linear(const linear_args *a, int tid, int nt) {
  int n_rows = rows_of(a->cursor, a->T);
  if (n_rows <= 0) return;
  token_tiles x = {a, NULL, n_rows, (int)ceil_div(n_rows, TOKENS)};
  int64_t K = a->K, band = n_rows > DIRECT_ROWS
                               ? SLICE
                               : K; /* k that all panels go through before the next */
  if (n_rows > DIRECT_ROWS && K > DIRECT_K) {
    float *packed = flashrt_scratch(n_rows * K * (int64_t)sizeof(float));
    if (packed) {
      pack_tokens(&x, packed, tid, nt);
      x.packed = packed;
      flashrt_barrier(nt);
    }
  }
  enum { PANELS = MAX_GROUPS > PARTS ? MAX_GROUPS / PARTS : 1 }; /* at once */
  span mine = share(ceil_div(a->N, LANES), tid, nt);
  for (int64_t begin = 0; begin < K; begin += band) {
    for (int64_t panel = mine.begin; panel < mine.end; panel += PANELS) {
      int n_panels = (int)min_of(PANELS, mine.end - panel);
      for (int64_t k0 = begin; k0 < min_of(begin + band, K); k0 += SLICE)
        panels_slice(&x, panel, n_panels, k0);
    }
  }
}
