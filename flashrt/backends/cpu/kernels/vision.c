/* max_pool, layer_norm, add_rows, normalize, attend: what images and rows of features need between
 * their convolutions.
 *
 * IS: one thread per pixel or row (of a head), so that a row's bits depend on the row alone. IS
 * NOT: for keys of a cache; see attention.c.
 */
#include "common.h"
#include "fmath.h"

/* ---- pixels ---- */

void op_max_pool(const max_pool_args *a, int tid, int nt) {
  span rows = share((int64_t)a->B * a->Y, tid, nt);
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const float *image = a->x + row / a->Y * a->H * a->W * a->C;
    int top = (int)(row % a->Y) * a->stride - a->padding;
    for (int at = 0; at < a->X; at++) {
      float *y = a->y + (row * a->X + at) * a->C;
      int left = at * a->stride - a->padding, is_first = 1;
      for (int i = (int)max_of(top, 0); i < min_of(top + a->taps, a->H); i++) {
        for (int j = (int)max_of(left, 0); j < min_of(left + a->taps, a->W); j++) {
          const float *x = image + ((int64_t)i * a->W + j) * a->C;
          /* NaN is the largest, and stays. */
          for (int c = 0; c < a->C; c++) {
            int stays = !is_first && (x[c] <= y[c] || y[c] != y[c]);
            y[c] = stays ? y[c] : x[c];
          }
          is_first = 0;
        }
      }
    }
  }
}

/* ---- rows ---- */

/* Sum of x[i], or of (x[i] - mean)^2, in the order of sum_of_squares. */
INLINE float row_sum(const float *x, int n, const float *mean) {
  vf acc[SUM_LANES / VL] = {};
  float lanes[SUM_LANES] = {0};
  int i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
    UNROLL for (int v = 0; v < SUM_LANES / VL; v++) {
      vf e = v_load(x + i + v * VL);
      if (mean) acc[v] = v_fma(e - *mean, e - *mean, acc[v]);
      else acc[v] += e;
    }
  }
  UNROLL for (int v = 0; v < SUM_LANES / VL; v++) v_store(lanes + v * VL, acc[v]);
  for (int lane = 0; i + lane < n; lane++) {
    float e = x[i + lane];
    lanes[lane] = mean ? s_fma(e - *mean, e - *mean, lanes[lane]) : lanes[lane] + e;
  }
  UNROLL for (int half = SUM_LANES / 2; half > 0; half /= 2) {
    UNROLL for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

void op_layer_norm(const layer_norm_args *a, int tid, int nt) {
  span rows = share(a->T, tid, nt);
  int C = a->C;
  for (int64_t t = rows.begin; t < rows.end; t++) {
    const float *x = a->x + t * C;
    float *y = a->y + t * C, mean = row_sum(x, C, NULL) / (float)C;
    float scale = s_rsqrt(row_sum(x, C, &mean) / (float)C + a->eps);
    int i = 0;
    for (; i + VL <= C; i += VL) {
      v_store(y + i, v_fma((v_load(x + i) - mean) * scale, v_load(a->w + i), v_load(a->b + i)));
    }
    for (; i < C; i++) y[i] = s_fma((x[i] - mean) * scale, a->w[i], a->b[i]);
  }
}

void op_add_rows(const add_rows_args *a, int tid, int nt) {
  span all = share((int64_t)a->T * a->C, tid, nt);
  for (int64_t i = all.begin; i < all.end; i++) a->y[i] = a->x[i] + a->r[i];
}

void op_normalize(const normalize_args *a, int tid, int nt) {
  span rows = share(a->T, tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    for (int c = 0; c < a->C; c++) {
      a->y[t * a->C + c] = (a->x[t * a->C + c] - a->mean[c]) / a->std[c] - a->shift;
    }
  }
}

/* ---- attention ---- */

enum { KEYS = 128 }; /* of a partial softmax */

/* q k over n columns, in the order of sum_of_squares. */
INLINE float dot(const float *q, const float *k, int n) {
  vf acc[SUM_LANES / VL] = {};
  float lanes[SUM_LANES] = {0};
  int i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
    UNROLL for (int v = 0; v < SUM_LANES / VL; v++) {
      acc[v] = v_fma(v_load(q + i + v * VL), v_load(k + i + v * VL), acc[v]);
    }
  }
  UNROLL for (int v = 0; v < SUM_LANES / VL; v++) v_store(lanes + v * VL, acc[v]);
  for (int lane = 0; i + lane < n; lane++)
    lanes[lane] = s_fma(q[i + lane], k[i + lane], lanes[lane]);
  UNROLL for (int half = SUM_LANES / 2; half > 0; half /= 2) {
    UNROLL for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

/* y = y by + x weight, n columns */
INLINE void add_scaled(float *y, const float *x, float weight, float by, int n) {
  int i = 0;
  for (; i + VL <= n; i += VL) {
    v_store(y + i, v_fma(v_load(x + i), v_set(weight), v_load(y + i) * by));
  }
  for (; i < n; i++) y[i] = s_fma(x[i], weight, y[i] * by);
}

/* Blocks of KEYS keys in ascending order: weights are relative to the largest score so far, and
 * what was summed up before is scaled to a new one. Rows of a head are neighbours, so that its keys
 * stay in the cache. */
void op_attend(const attend_args *a, int tid, int nt) {
  int D = a->C / a->heads;
  float scale = s_rsqrt((float)D);
  span units = share((int64_t)a->heads * a->T, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t t = unit % a->T, column = unit / a->T * D;
    const float *q = a->q + t * a->q_stride + column;
    float *y = a->y + t * a->C + column;
    float largest = -INFINITY, total = 0.0f;
    memset(y, 0, (size_t)D * sizeof(float));
    for (int first = 0; first < a->S; first += KEYS) {
      float scores[KEYS];
      int n = (int)min_of(KEYS, a->S - first);
      float before = largest;
      for (int j = 0; j < n; j++) {
        scores[j] = dot(q, a->k + (int64_t)(first + j) * a->k_stride + column, D) * scale;
        largest = s_max(scores[j], largest);
      }
      float by = s_exp(before - largest);
      total *= by;
      for (int j = 0; j < n; j++) {
        float weight = s_exp(scores[j] - largest);
        total += weight;
        add_scaled(y, a->v + (int64_t)(first + j) * a->v_stride + column, weight, j ? 1.0f : by, D);
      }
    }
    for (int i = 0; i < D; i++) y[i] /= total;
  }
}
