/* max_pool, layer_norm, add_rows, normalize: what images and rows of features need between their
 * convolutions.
 *
 * IS: one thread per pixel or row, so that a row's bits depend on the row alone. IS NOT: attention;
 * see attend.c.
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
