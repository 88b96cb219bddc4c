/* attend, attend_patches: attention of rows over all keys, in float32; no cache, no order. See
 * attention.c for keys of a cache.
 *
 * Order: keys in blocks of KEYS, ascending. A score is one chain of fma over a head's columns. Weights
 * are relative to the largest score so far, and what was summed up before is scaled to a new one. A
 * block's weights are added in lanes of 16, the lanes as a tree; a column of y is one chain of fma over
 * ascending keys. Fixed by the keys and D alone: which queries are company decides nothing.
 *
 * Work: a unit is up to QUERIES rows of a head. They share a block of keys, turned so that keys sit in
 * vector lanes, and its values.
 */
#include "common.h"
#include "fmath.h"
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

enum {
  KEYS = 64,                /* of a block */
  PARTS = KEYS / VL,        /* vectors of their scores */
  COLUMNS = 128,            /* of keys that are turned at a time */
  QUERIES = 128,            /* of a unit: keys are turned once for all of them */
  FEWER = 32,               /* where threads would go without */
  GROUP = VL == 16 ? 4 : 1, /* of which scores, or sums of values, fill the registers */
  STRIP = 4                 /* vectors of columns that a group sums up at a time */
};

typedef struct {
  float scores[QUERIES][KEYS]; /* then weights */
  float largest[QUERIES], total[QUERIES], by[QUERIES];
} unit_state;

/* scores[r] += q[r] k over `count` columns, of n rows of q. */
INLINE void add_scores(float scores[][KEYS], const float *q, int64_t stride,
                       const float turned[][KEYS], int count, const int n) {
  vf sums[GROUP][PARTS];
  for (int r = 0; r < n; r++) {
    UNROLL for (int i = 0; i < PARTS; i++) sums[r][i] = v_load(scores[r] + i * VL);
  }
  for (int c = 0; c < count; c++) {
    vf keys[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) keys[i] = v_load(turned[c] + i * VL);
    UNROLL for (int r = 0; r < n; r++) {
      vf value = v_set(q[r * stride + c]);
      UNROLL for (int i = 0; i < PARTS; i++) sums[r][i] = v_fma(value, keys[i], sums[r][i]);
    }
  }
  for (int r = 0; r < n; r++) {
    UNROLL for (int i = 0; i < PARTS; i++) v_store(scores[r] + i * VL, sums[r][i]);
  }
}

#ifdef __SSE2__
enum { CAN_TURN_FOUR = 1 };
/* Four columns of four keys. */
static inline void turn_four(const float *k, int64_t stride, float *turned) {
  __m128 a = _mm_loadu_ps(k), b = _mm_loadu_ps(k + stride);
  __m128 c = _mm_loadu_ps(k + 2 * stride), d = _mm_loadu_ps(k + 3 * stride);
  __m128 ac = _mm_unpacklo_ps(a, c), bd = _mm_unpacklo_ps(b, d);
  _mm_storeu_ps(turned, _mm_unpacklo_ps(ac, bd));
  _mm_storeu_ps(turned + KEYS, _mm_unpackhi_ps(ac, bd));
  ac = _mm_unpackhi_ps(a, c), bd = _mm_unpackhi_ps(b, d);
  _mm_storeu_ps(turned + 2 * KEYS, _mm_unpacklo_ps(ac, bd));
  _mm_storeu_ps(turned + 3 * KEYS, _mm_unpackhi_ps(ac, bd));
}
#else
enum { CAN_TURN_FOUR = 0 };
static inline void turn_four(const float *k, int64_t stride, float *turned) {}
#endif

/* n_keys rows of k, `count` columns. */
static void turn_keys(const float *k, int64_t stride, int n_keys, int count, float turned[][KEYS]) {
  int whole = n_keys / 4 * 4, c = 0;
  for (; CAN_TURN_FOUR && c + 4 <= count; c += 4) {
    for (int j = 0; j < whole; j += 4) turn_four(k + j * stride + c, stride, turned[c] + j);
  }
  for (int j = 0; j < n_keys; j++) {
    for (int left = j < whole ? c : 0; left < count; left++) turned[left][j] = k[j * stride + left];
  }
}

/* Scores of `rows` queries with the keys of a block. */
static void score_block(unit_state *u, const attend_args *a, int64_t first_key, int n_keys,
                        int64_t first, int rows, int64_t column, int D) {
  float turned[COLUMNS][KEYS];
  memset(u->scores, 0, (size_t)rows * sizeof u->scores[0]);
  for (int at = 0; at < D; at += COLUMNS) {
    int count = (int)min_of(COLUMNS, D - at);
    if (n_keys < KEYS) memset(turned, 0, sizeof turned);
    turn_keys(a->k + first_key * a->k_stride + column + at, a->k_stride, n_keys, count, turned);
    int r = 0;
    const float *q = a->q + first * a->q_stride + column + at;
    for (; r + GROUP <= rows; r += GROUP) {
      add_scores(u->scores + r, q + r * a->q_stride, a->q_stride, turned, count, GROUP);
    }
    for (; r < rows; r++) {
      add_scores(u->scores + r, q + r * a->q_stride, a->q_stride, turned, count, 1);
    }
  }
}

/* Weights in place of scores; what was summed up before goes by `by`. */
static void weigh_block(unit_state *u, int rows, int n_keys, float scale) {
  for (int r = 0; r < rows; r++) {
    float *scores = u->scores[r], largest = u->largest[r];
    for (int j = n_keys; j < KEYS; j++) scores[j] = -INFINITY; /* whose weight is 0 */
    vf most = v_set(largest);
    for (int j = 0; j < KEYS; j += VL) {
      vf scaled = v_load(scores + j) * scale;
      v_store(scores + j, scaled);
      most = v_max(scaled, most); /* what is no number is passed over */
    }
    for (int lane = 0; lane < VL; lane++) largest = s_max(most[lane], largest);
    float lanes[SUM_LANES] = {0};
    for (int j = 0; j < KEYS; j += VL) {
      vf weights = v_exp(v_load(scores + j) - largest);
      v_store(scores + j, weights);
      float *part = lanes + j % SUM_LANES;
      v_store(part, v_load(part) + weights);
    }
    UNROLL for (int half = SUM_LANES / 2; half > 0; half /= 2) {
      UNROLL for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    }
    u->by[r] = s_exp(u->largest[r] - largest);
    u->total[r] = s_fma(u->total[r], u->by[r], lanes[0]);
    u->largest[r] = largest;
  }
}

/* y[r] = y[r] by[r] + weights[r] v, of n rows and `parts` vectors of columns. */
INLINE void add_values(float *y, int64_t y_stride, const float *v, int64_t v_stride,
                       float weights[][KEYS], const float *by, int n_keys, const int n,
                       const int parts) {
  vf sums[GROUP][STRIP];
  for (int r = 0; r < n; r++) {
    UNROLL for (int i = 0; i < parts; i++) sums[r][i] = v_load(y + r * y_stride + i * VL) * by[r];
  }
  for (int j = 0; j < n_keys; j++) {
    vf values[STRIP];
    UNROLL for (int i = 0; i < parts; i++) values[i] = v_load(v + j * v_stride + i * VL);
    UNROLL for (int r = 0; r < n; r++) {
      vf weight = v_set(weights[r][j]);
      UNROLL for (int i = 0; i < parts; i++) sums[r][i] = v_fma(weight, values[i], sums[r][i]);
    }
  }
  for (int r = 0; r < n; r++) {
    UNROLL for (int i = 0; i < parts; i++) v_store(y + r * y_stride + i * VL, sums[r][i]);
  }
}

/* The same of n rows and all columns. */
INLINE void sum_values(unit_state *u, int r, float *y, int64_t y_stride, const float *v,
                       int64_t v_stride, int n_keys, int D, const int n) {
  int c = 0;
  float (*weights)[KEYS] = u->scores + r;
  const float *by = u->by + r;
  for (; c + STRIP * VL <= D; c += STRIP * VL) {
    add_values(y + c, y_stride, v + c, v_stride, weights, by, n_keys, n, STRIP);
  }
  for (; c + VL <= D; c += VL) {
    add_values(y + c, y_stride, v + c, v_stride, weights, by, n_keys, n, 1);
  }
  for (; c < D; c++) {
    for (int row = 0; row < n; row++) {
      float sum = y[row * y_stride + c] * by[row];
      for (int j = 0; j < n_keys; j++) sum = s_fma(weights[row][j], v[j * v_stride + c], sum);
      y[row * y_stride + c] = sum;
    }
  }
}

void op_attend(const attend_args *a, int tid, int nt) {
  int D = a->C / a->heads;
  float scale = s_rsqrt((float)D);
  int64_t queries = a->heads * ceil_div(a->T, QUERIES) < 4 * nt ? FEWER : QUERIES;
  int64_t per_head = ceil_div(a->T, queries);
  span units = share(a->heads * per_head, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t first = unit % per_head * queries, column = unit / per_head * D;
    int rows = (int)min_of(queries, a->T - first);
    unit_state u;
    float *y = a->y + first * a->C + column;
    for (int r = 0; r < rows; r++) {
      u.largest[r] = -INFINITY;
      u.total[r] = 0.0f;
      memset(y + (int64_t)r * a->C, 0, (size_t)D * sizeof(float));
    }
    for (int64_t key = 0; key < a->S; key += KEYS) {
      int n_keys = (int)min_of(KEYS, a->S - key);
      score_block(&u, a, key, n_keys, first, rows, column, D);
      weigh_block(&u, rows, n_keys, scale);
      const float *v = a->v + key * a->v_stride + column;
      int r = 0;
      for (; r + GROUP <= rows; r += GROUP) {
        sum_values(&u, r, y + (int64_t)r * a->C, a->C, v, a->v_stride, n_keys, D, GROUP);
      }
      for (; r < rows; r++) {
        sum_values(&u, r, y + (int64_t)r * a->C, a->C, v, a->v_stride, n_keys, D, 1);
      }
    }
    for (int r = 0; r < rows; r++) {
      for (int c = 0; c < D; c++) y[(int64_t)r * a->C + c] /= u.total[r];
    }
  }
}

void op_attend_patches(const attend_patches_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  attend_args valid = {.q = a->q,
                       .k = a->k,
                       .v = a->v,
                       .y = a->y,
                       .T = rows,
                       .S = rows,
                       .C = a->C,
                       .q_stride = a->q_stride,
                       .k_stride = a->k_stride,
                       .v_stride = a->v_stride,
                       .heads = a->heads};
  op_attend(&valid, tid, nt);
}
