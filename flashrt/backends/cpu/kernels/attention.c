/* attention: softmax(q K^T / sqrt(D)) V of what is `seen`, where `gated` times sigmoid(gate), in absolute
 *            blocks of 256 keys.
 *
 * Order, per query and head. In a block, over the keys of it that the query sees, which are those
 * of rows [shift, keys_seen):
 *   s = chain over d of fma(k[d], q[d] * scale) from +0      m_b = max s      p = exp(s - m_b)
 *   l_b = p summed over 16 lanes (key i in lane i % 16), then over a tree of halves: i with i + 8,
 *         i + 4, i + 2, i + 1
 *   o_b = chain over keys of fma(v, p) from +0
 * Blocks are merged in ascending order, from m = -inf, l = o = 0:
 *   M = max(m, m_b)      f = exp(m - M)      g = exp(m_b - M)
 *   o = fma(o_b, g, o * f)      l = fma(l_b, g, l * f)
 * and y = o / l + 0, or (o / l + 0) * sigmoid(gate). A block's partial depends on nothing outside the block: one
 * query may have its blocks spread over threads, many queries may walk through them one by one, and
 * the bits are the same.
 *
 * Keys and values of one byte become values a granule at a time, code times scale, and are then as
 * float32 ones. Keys that a query does not see are not visited by its chains; they are read at most as lanes
 * whose result is selected away, so they may hold anything. A query that sees no key at all gives
 * 0.
 *
 * The queries of one key/value head, [token][head of the group], are worked on in sets of up to
 * MAX_QUERIES, so that 32 keys or values go to L1 once for all of them. All buffers are on the
 * stack, about 200 KB; D is at most QUERY_FLOATS.
 */
#include "codes.h"
#include "tile.h"

enum { MAX_QUERIES = 48, QUERY_FLOATS = MAX_QUERIES * 256, SUM_LANES = 16 };

/* Queries [first, first + n) of one key/value head; query j is token j / group, head
 * kv_head * group + j % group. */
typedef struct {
  const attention_args *a;
  int64_t kv_head, first;
  int n, group;
  int64_t width; /* D, rounded up to whole column blocks: the row pitch of o */
  float m[MAX_QUERIES], l[MAX_QUERIES], block_m[MAX_QUERIES], block_l[MAX_QUERIES];
  float q[QUERY_FLOATS];                  /* [tile of queries][d][query of the tile], scaled */
  float p[MAX_QUERIES * ATTENTION_BLOCK]; /* [query][key]: scores, then probabilities */
  float block_o[QUERY_FLOATS];            /* [query][width] */
  float o[QUERY_FLOATS];
  float decoded[LANES * QUERY_FLOATS / MAX_QUERIES]; /* a granule of codes, as values */
} query_set;

static inline int64_t token_of(const query_set *s, int j) { return (s->first + j) / s->group; }
static inline int64_t head_of(const query_set *s, int j) {
  return s->kv_head * s->group + (s->first + j) % s->group;
}

/* Query j sees rows of keys below this. */
static inline int64_t keys_seen(const attention_args *a, int64_t token) {
  int64_t position = position_of(a->cursor);
  if (a->seen == SEEN_BEFORE) return position;
  return position + (a->seen == SEEN_LAUNCH ? rows_of(a->cursor, a->T) : token + 1);
}

/* Query j sees keys [hidden_in_block, seen_in_block) of a block [256 b, 256 b + 256). */
static inline int seen_in_block(const query_set *s, int j, int64_t block) {
  int64_t seen = keys_seen(s->a, token_of(s, j)) - block * ATTENTION_BLOCK;
  return (int)max_of(0, min_of(seen, ATTENTION_BLOCK));
}
static inline int hidden_in_block(const query_set *s, int64_t block) {
  return (int)max_of(0, min_of(s->a->shift - block * ATTENTION_BLOCK, ATTENTION_BLOCK));
}
static inline int sees_block(const query_set *s, int j, int64_t block) {
  return seen_in_block(s, j, block) > hidden_in_block(s, block);
}

/* ---- tiles ---- */

/* The first tile to come to a granule also fetches what follows it.
 * scores[t][32 keys] of n_tokens queries; q is [D][t], keys is a granule [D][32]. */
INLINE void score_tile(const int dtype, const int n_tokens, const void *keys, const float *q, int D,
                       float *scores, int is_first) {
  const int n_groups = n_tokens * 2 <= TOKENS && PARTS > 1 ? 2 : 1,
            n_vectors = n_groups * GROUP_VECTORS;
  for (int part = 0; part < PARTS; part += n_groups) {
    const void *w[MAX_VECTORS];
    chains c;
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      int64_t offset = lane_offset(first_lane(part + v / GROUP_VECTORS, v), dtype);
      w[v] = (const char *)keys + offset * (dtype == DTYPE_BF16 ? 2 : 4);
    }
    clear_chains(&c, n_vectors, n_tokens);
    const char *ahead = is_first ? ahead_of(keys, dtype, n_groups, part, D) : NULL;
    extend_chains(&c, dtype, n_vectors, n_tokens, w, q, 1, n_tokens, D, ahead);
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      float *out = scores + first_lane(part + v / GROUP_VECTORS, v);
      UNROLL
      for (int t = 0; t < n_tokens; t++) {
        v_store(out + t * ATTENTION_BLOCK, c.low[v][t]);
        v_store(out + t * ATTENTION_BLOCK + 16, c.high[v][t]);
      }
    }
  }
}

/* o[t][32 columns] continued by n_keys values with weights p[t][key]; values is one column block
 * [32 keys][32]. */
INLINE void value_tile(const int dtype, const int n_tokens, const void *values, const float *p,
                       int n_keys, float *o, int64_t width, int is_first) {
  const int n_groups = n_tokens * 2 <= TOKENS && PARTS > 1 ? 2 : 1,
            n_vectors = n_groups * GROUP_VECTORS;
  for (int part = 0; part < PARTS; part += n_groups) {
    const void *w[MAX_VECTORS];
    chains c;
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      int lane = first_lane(part + v / GROUP_VECTORS, v);
      w[v] = (const char *)values + lane_offset(lane, dtype) * (dtype == DTYPE_BF16 ? 2 : 4);
      UNROLL
      for (int t = 0; t < n_tokens; t++) {
        c.low[v][t] = v_load(o + t * width + lane);
        c.high[v][t] = v_load(o + t * width + lane + 16);
      }
    }
    const char *ahead = is_first ? ahead_of(values, dtype, n_groups, part, n_keys) : NULL;
    extend_chains(&c, dtype, n_vectors, n_tokens, w, p, ATTENTION_BLOCK, 1, n_keys, ahead);
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      float *out = o + first_lane(part + v / GROUP_VECTORS, v);
      UNROLL
      for (int t = 0; t < n_tokens; t++) {
        v_store(out + t * width, c.low[v][t]);
        v_store(out + t * width + 16, c.high[v][t]);
      }
    }
  }
}

typedef void (*score_function)(const void *keys, const float *q, int D, float *scores,
                               int is_first);
typedef void (*value_function)(const void *values, const float *p, int n_keys, float *o,
                               int64_t width, int is_first);

#define TILE_OF(name, dtype, n)                                                            \
  static void score_##name##_##n(const void *keys, const float *q, int D, float *scores,   \
                                 int is_first) {                                           \
    score_tile(dtype, n, keys, q, D, scores, is_first);                                    \
  }                                                                                        \
  static void value_##name##_##n(const void *values, const float *p, int n_keys, float *o, \
                                 int64_t width, int is_first) {                            \
    value_tile(dtype, n, values, p, n_keys, o, width, is_first);                           \
  }
#define TILE(n) TILE_OF(f32, DTYPE_F32, n) TILE_OF(bf16, DTYPE_BF16, n)
TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)
#define UP_TO_6(kind) 0, kind##_1, kind##_2, kind##_3, kind##_4, kind##_5, kind##_6
#if defined __AVX512F__
TILE(7)
TILE(8)
TILE(9)
TILE(10)
TILE(11)
TILE(12)
#define TILES(kind) {UP_TO_6(kind), kind##_7, kind##_8, kind##_9, kind##_10, kind##_11, kind##_12}
#else
#define TILES(kind) {UP_TO_6(kind)}
#endif
static const score_function score_tiles[2][TOKENS + 1] = {
    [DTYPE_F32] = TILES(score_f32), [DTYPE_BF16] = TILES(score_bf16)};
static const value_function value_tiles[2][TOKENS + 1] = {
    [DTYPE_F32] = TILES(value_f32), [DTYPE_BF16] = TILES(value_bf16)};

/* ---- one block ---- */

static inline const void *element_at(const void *base, int64_t index, int dtype) {
  return (const char *)base + index * (is_code(dtype) ? 1 : dtype == DTYPE_BF16 ? 2 : 4);
}

/* 32 rows of codes as values: of keys [D][32 rows], of values [column block][32 rows][32]. */
static const void *decode_keys(query_set *s, const uint8_t *codes, int64_t first) {
  const attention_args *a = s->a;
  const float *scales =
      (const float *)a->key_scales + keys_index(s->kv_head, first, 0, a->S, 1, DTYPE_F32);
  for (int64_t i = 0; i < (int64_t)a->D * LANES; i++)
    s->decoded[i] = from_code(codes[i], a->keys_dtype) * scales[i % LANES];
  return s->decoded;
}
static const void *decode_values(query_set *s, const uint8_t *codes, int64_t first) {
  const attention_args *a = s->a;
  const float *scales =
      (const float *)a->value_scales + keys_index(s->kv_head, first, 0, a->S, 1, DTYPE_F32);
  for (int64_t i = 0; i < s->width * LANES; i++)
    s->decoded[i] = from_code(codes[i], a->values_dtype) * scales[i / LANES % LANES];
  return s->decoded;
}

static void block_scores(query_set *s, int64_t block, int n_keys) {
  const attention_args *a = s->a;
  for (int key = 0; key < n_keys; key += LANES) {
    int64_t index =
        keys_index(s->kv_head, block * ATTENTION_BLOCK + key, 0, a->S, a->D, a->keys_dtype);
    const void *granule = element_at(a->keys, index, a->keys_dtype);
    int dtype = a->keys_dtype;
    if (is_code(dtype)) {
      granule = decode_keys(s, granule, block * ATTENTION_BLOCK + key);
      dtype = DTYPE_F32;
    }
    for (int j = 0; j < s->n; j += TOKENS) {
      int n = (int)min_of(TOKENS, s->n - j);
      score_tiles[dtype][n](granule, s->q + (int64_t)j * a->D, a->D,
                            s->p + j * ATTENTION_BLOCK + key, j == 0);
    }
  }
}

/* Scores of one query -> probabilities; sets m_b and l_b. Lanes below n_hidden, and at or beyond
 * n_seen, may hold anything, and become 0. */
static void block_softmax(float *p, int n_hidden, int n_seen, float *block_m, float *block_l) {
  enum { VECTORS = SUM_LANES / VL };
  int end = (int)ceil_div(n_seen, SUM_LANES) * SUM_LANES;
  for (int i = 0; i < n_hidden; i++) p[i] = -INFINITY;
  for (int i = n_seen; i < end; i++) p[i] = -INFINITY;
  vf max[VECTORS], sum[VECTORS];
  float lanes[SUM_LANES];
  for (int v = 0; v < VECTORS; v++) max[v] = v_set(-INFINITY), sum[v] = (vf){0};
  for (int i = 0; i < end; i += SUM_LANES) {
    for (int v = 0; v < VECTORS; v++) max[v] = v_max(max[v], v_load(p + i + v * VL));
  }
  for (int v = 0; v < VECTORS; v++) v_store(lanes + v * VL, max[v]);
  float m = lanes[0];
  for (int i = 1; i < SUM_LANES; i++) m = s_max(m, lanes[i]);
  for (int i = 0; i < end; i += SUM_LANES) {
    for (int v = 0; v < VECTORS; v++) {
      vf e = v_exp(v_load(p + i + v * VL) - m);
      v_store(p + i + v * VL, e);
      sum[v] = sum[v] + e;
    }
  }
  for (int v = 0; v < VECTORS; v++) v_store(lanes + v * VL, sum[v]);
  for (int half = SUM_LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] + lanes[i + half];
  }
  *block_m = m;
  *block_l = lanes[0];
}

/* The queries of a tile see different numbers of keys: those beyond what all see are added one by
 * one. */
static void add_values_seen_by_some(query_set *s, int64_t block, int j0, int n, const void *values,
                                    int dtype, int key, int end) {
  for (; key < end; key++) {
    int lane = key % LANES;
    for (int j = j0; j < j0 + n; j++) {
      if (key >= seen_in_block(s, j, block)) continue;
      vf p = v_set(s->p[j * ATTENTION_BLOCK + key]);
      for (int64_t col = 0; col < s->width; col += VL) {
        vf low, high;
        int64_t first = (col / LANES * LANES + lane) * LANES; /* that key of the column block */
        if (col % LANES >= LANES / 2) continue;
        load_lanes(element_at(values, first + lane_offset((int)(col % LANES), dtype), dtype), dtype,
                   &low, &high);
        float *o = s->block_o + j * s->width + col;
        v_store(o, v_fma(low, p, v_load(o)));
        v_store(o + 16, v_fma(high, p, v_load(o + 16)));
      }
    }
  }
}

static void block_values(query_set *s, int64_t block, int n_keys) {
  const attention_args *a = s->a;
  memset(s->block_o, 0, (size_t)(s->n * s->width) * sizeof(float));
  for (int key = 0; key < n_keys; key += LANES) {
    int64_t index =
        values_index(s->kv_head, block * ATTENTION_BLOCK + key, 0, a->S, a->D, a->values_dtype);
    const void *granule = element_at(a->values, index, a->values_dtype);
    int dtype = a->values_dtype;
    if (is_code(dtype)) {
      granule = decode_values(s, granule, block * ATTENTION_BLOCK + key);
      dtype = DTYPE_F32;
    }
    for (int j = 0; j < s->n; j += TOKENS) {
      int n = (int)min_of(TOKENS, s->n - j); /* the first sees the least, the last the most */
      int skip = (int)max_of(0, min_of(LANES, hidden_in_block(s, block) - key));
      int common = (int)max_of(skip, min_of(LANES, seen_in_block(s, j, block) - key));
      int end = (int)min_of(key + LANES, seen_in_block(s, j + n - 1, block));
      float *o = s->block_o + j * s->width;
      if (common > skip) {
        for (int64_t col = 0; col < s->width; col += LANES) {
          int64_t index = (col + skip) * LANES;
          value_tiles[dtype][n](element_at(granule, index, dtype),
                                s->p + j * ATTENTION_BLOCK + key + skip, common - skip, o + col,
                                s->width, j == 0);
        }
      }
      add_values_seen_by_some(s, block, j, n, granule, dtype, key + common, end);
    }
  }
}

/* Partials of one block for all queries of the set. A query that sees nothing of it has l_b = 0
 * and is left alone. */
static void attend_block(query_set *s, int64_t block) {
  int n_keys = seen_in_block(s, s->n - 1, block);
  block_scores(s, block, n_keys);
  for (int j = 0; j < s->n; j++) {
    s->block_l[j] = 0;
    if (!sees_block(s, j, block)) continue;
    block_softmax(s->p + j * ATTENTION_BLOCK, hidden_in_block(s, block), seen_in_block(s, j, block),
                  &s->block_m[j], &s->block_l[j]);
  }
  block_values(s, block, n_keys);
}

/* ---- merge and finish ---- */

static void merge(float *m, float *l, float *o, float block_m, float block_l, const float *block_o,
                  int D) {
  float max = s_max(*m, block_m), f = s_exp(*m - max), g = s_exp(block_m - max);
  int d = 0;
  for (; d + VL <= D; d += VL)
    v_store(o + d, v_fma(v_load(block_o + d), v_set(g), v_load(o + d) * f));
  for (; d < D; d++) o[d] = s_fma(block_o[d], g, o[d] * f);
  *l = s_fma(block_l, g, *l * f);
  *m = max;
}

/* l is 0, and o zeros, if the query sees nothing. */
static void finish(const attention_args *a, int64_t token, int64_t head, float l, const float *o) {
  if (l == 0) l = 1;
  int64_t D = a->D, d = 0;
  float *y = (float *)a->y + (token * a->Nq + head) * D;
  if (!a->gated) {
    for (; d < D; d++) y[d] = o[d] / l + 0.0f;
    return;
  }
  const float *gate = a->u + token * a->U + head * 2 * D + D;
  for (; d + VL <= D; d += VL)
    v_store(y + d, (v_load(o + d) / l + 0.0f) * v_sigmoid(v_load(gate + d)));
  for (; d < D; d++) y[d] = (o[d] / l + 0.0f) * s_sigmoid(gate[d]);
}

/* ---- work ---- */

static void begin_queries(query_set *s, const attention_args *a, int64_t kv_head, int64_t first,
                          int n) {
  s->a = a;
  s->kv_head = kv_head;
  s->first = first;
  s->n = n;
  s->group = a->Nq / a->Nk;
  s->width = ceil_div(a->D, LANES) * LANES;
  float scale = 1.0f / sqrtf((float)a->D);
  for (int j = 0; j < n; j++) {
    const float *q = a->q + (token_of(s, j) * a->Nq + head_of(s, j)) * a->D;
    int first_of_tile = j / TOKENS * TOKENS, tile_size = (int)min_of(TOKENS, n - first_of_tile);
    float *packed = s->q + (int64_t)first_of_tile * a->D + j % TOKENS;
    for (int d = 0; d < a->D; d++) packed[d * tile_size] = q[d] * scale;
  }
}

/* Many queries: each set walks through its blocks. */
static void attend_by_sets(const attention_args *a, int n_rows, int64_t set_size, int nt) {
  query_set s;
  int64_t group = a->Nq / a->Nk, n_queries = n_rows * group;
  int64_t n_sets = ceil_div(n_queries, set_size);
  claim c = {.n = a->Nk * n_sets, .most = 1, .least = 1, .nt = nt};
  while (flashrt_claim(&c)) {
    int64_t first = (n_sets - 1 - c.mine.begin % n_sets) * set_size; /* longest first */
    int n = (int)min_of(set_size, n_queries - first);
    begin_queries(&s, a, c.mine.begin / n_sets, first, n);
    memset(s.o, 0, (size_t)(n * s.width) * sizeof(float));
    for (int j = 0; j < n; j++) s.m[j] = -INFINITY, s.l[j] = 0;
    int64_t n_seen = keys_seen(a, token_of(&s, n - 1));
    for (int64_t block = a->shift / ATTENTION_BLOCK; block * ATTENTION_BLOCK < n_seen; block++) {
      attend_block(&s, block);
      for (int j = 0; j < n; j++) {
        if (!sees_block(&s, j, block)) continue;
        merge(&s.m[j], &s.l[j], s.o + j * s.width, s.block_m[j], s.block_l[j],
              s.block_o + j * s.width, a->D);
      }
    }
    for (int j = 0; j < n; j++)
      finish(a, token_of(&s, j), head_of(&s, j), s.l[j], s.o + j * s.width);
  }
}

/* Few queries: (key/value head, block, set) units over threads, partials [token][head][block][m,
 * l, o] through memory. */
static void attend_by_blocks(const attention_args *a, int n_rows, int64_t set_size, int tid,
                             int nt) {
  query_set s;
  int64_t group = a->Nq / a->Nk, n_queries = n_rows * group, position = position_of(a->cursor);
  int64_t n_blocks = ceil_div(position + n_rows, ATTENTION_BLOCK),
          n_sets = ceil_div(n_queries, set_size), D = a->D;
  claim c = {.n = a->Nk * n_blocks * n_sets, .most = 1, .least = 1, .nt = nt};
  while (flashrt_claim(&c)) {
    int64_t unit = c.mine.begin, first = unit % n_sets * set_size, block = unit / n_sets % n_blocks;
    begin_queries(&s, a, unit / n_sets / n_blocks, first, (int)min_of(set_size, n_queries - first));
    attend_block(&s, block);
    for (int j = 0; j < s.n; j++) {
      float *partial =
          a->partials + ((token_of(&s, j) * a->Nq + head_of(&s, j)) * a->B + block) * (D + 2);
      partial[0] = s.block_m[j];
      partial[1] = s.block_l[j];
      memcpy(partial + 2, s.block_o + j * s.width, (size_t)D * sizeof(float));
    }
  }
  flashrt_barrier(nt);
  span mine = share((int64_t)n_rows * a->Nq, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int64_t token = unit / a->Nq, seen = keys_seen(a, token);
    float m = -INFINITY, l = 0, *o = s.o;
    memset(o, 0, (size_t)D * sizeof(float));
    for (int64_t block = a->shift / ATTENTION_BLOCK; block * ATTENTION_BLOCK < seen; block++) {
      const float *partial = a->partials + (unit * a->B + block) * (D + 2);
      if (partial[1] != 0) merge(&m, &l, o, partial[0], partial[1], partial + 2, (int)D);
    }
    finish(a, token, unit % a->Nq, l, o);
  }
}

void op_attention(const attention_args *a, int tid, int nt) {
  int n_rows = rows_of(a->cursor, a->T);
  if (n_rows <= 0) return;
  int64_t width = ceil_div(a->D, LANES) * LANES;
  int64_t set_size = max_of(1, min_of(MAX_QUERIES, QUERY_FLOATS / width));
  if (n_rows <= a->TP && nt > 1) attend_by_blocks(a, n_rows, set_size, tid, nt);
  else attend_by_sets(a, n_rows, set_size, nt);
}
