/* max_pool, layer_norm, add_rows, normalize, and of a tower activations, mix_rows, add_layer_norm,
 * gelu, geglu, turn_patches, image_patches: what images and rows of features need between their convolutions and products.
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

INLINE void norm_row(float *y, const float *x, const float *w, const float *b, int C, float eps) {
  float mean = row_sum(x, C, NULL) / (float)C;
  float scale = s_rsqrt(row_sum(x, C, &mean) / (float)C + eps);
  int i = 0;
  for (; i + VL <= C; i += VL) {
    v_store(y + i, v_fma((v_load(x + i) - mean) * scale, v_load(w + i), v_load(b + i)));
  }
  for (; i < C; i++) y[i] = s_fma((x[i] - mean) * scale, w[i], b[i]);
}

void op_layer_norm(const layer_norm_args *a, int tid, int nt) {
  span rows = share(a->T, tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    norm_row(a->y + t * a->C, a->x + t * a->C, a->w, a->b, a->C, a->eps);
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

/* ---- of a tower ---- */

/* The two pixels beside a point of a line of n, and their shares: pixel i has its middle at i + 1/2,
 * in both sizes. */
typedef struct {
  int low, high;
  float low_share, high_share;
} neighbours;

INLINE neighbours neighbours_of(int at, int n, int resized) {
  float place = s_fma((float)n / (float)resized, (float)at + 0.5f, -0.5f);
  if (place < 0.0f) place = 0.0f;
  neighbours found;
  found.low = (int)min_of((int)place, n - 1);
  found.high = (int)min_of(found.low + 1, n - 1);
  found.high_share = place - (float)found.low;
  if (found.high_share > 1.0f) found.high_share = 1.0f;
  found.low_share = 1.0f - found.high_share;
  return found;
}

INLINE float between(neighbours at, float low, float high) {
  return s_fma(at.high_share, high, at.low_share * low);
}

void op_image_patches(const image_patches_args *a, int tid, int nt) {
  span rows = share(a->T, tid, nt);
  int size = a->patch, group = a->group, across = a->side / size / group;
  for (int64_t t = rows.begin; t < rows.end; t++) {
    int square = (int)t / (group * group), inside = (int)t % (group * group);
    int top = (square / across * group + inside / group) * size - a->top;
    int left = (square % across * group + inside % group) * size - a->left;
    float *y = (float *)a->y + t * a->C;
    for (int i = 0; i < size; i++) {
      int is_row = top + i >= 0 && top + i < a->height;
      neighbours row = neighbours_of(is_row ? top + i : 0, a->H, a->height);
      const float *above = a->x + (int64_t)row.low * a->W * 3;
      const float *below = a->x + (int64_t)row.high * a->W * 3;
      for (int j = 0; j < size; j++) {
        int is_in = is_row && left + j >= 0 && left + j < a->width;
        neighbours column = neighbours_of(is_in ? left + j : 0, a->W, a->width);
        for (int c = 0; c < 3; c++) {
          int low = 3 * column.low + c, high = 3 * column.high + c;
          float value = between(row, between(column, above[low], above[high]),
                                between(column, below[low], below[high]));
          y[(c * size + i) * size + j] = (is_in ? value : a->fill) * 2.0f - 1.0f;
        }
      }
    }
  }
}

void op_activations(const activations_args *a, int tid, int nt) {
  span all = share((int64_t)rows_of(a->cursor, a->T) * a->C, tid, nt);
  for (int64_t i = all.begin; i < all.end; i++) ((float *)a->y)[i] = a->x[i];
}

void op_mix_rows(const mix_rows_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    for (int c = 0; c < a->C; c++) {
      float sum = 0.0f;
      UNROLL for (int i = 0; i < 4; i++) {
        sum = s_fma(a->weights[4 * t + i], a->table[(int64_t)a->rows[4 * t + i] * a->C + c], sum);
      }
      a->y[t * a->C + c] = sum;
    }
  }
}

void op_add_layer_norm(const add_layer_norm_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    float *x = a->x + t * a->C;
    const float *r = a->r + t * a->C;
    for (int i = 0; i < a->C; i++) x[i] += r[i];
    norm_row((float *)a->y + t * a->C, x, a->w, a->b, a->C, a->eps);
  }
}

/* 2 Phi(-z), z >= 0: 7.1.26 of Abramowitz and Stegun, within 1.5e-7. */
INLINE vf v_tails(vf z) {
  vf at = z * 0.70710678f, t = 1.0f / v_fma(at, v_set(0.3275911f), v_set(1.0f));
  vf p = v_fma(v_set(1.061405429f), t, v_set(-1.453152027f));
  p = v_fma(p, t, v_set(1.421413741f));
  p = v_fma(p, t, v_set(-0.284496736f));
  p = v_fma(p, t, v_set(0.254829592f));
  return p * t * v_exp(-at * at);
}

INLINE vf v_gelu(vf u, const int is_tanh) {
  if (is_tanh) { /* (1 + tanh(s / 2)) / 2 is the sigmoid of s */
    return u * v_sigmoid(1.5957691216f * v_fma(u * u * u, v_set(0.044715f), u));
  }
  vf half = 0.5f * v_tails(v_select(u < 0.0f, -u, u));
  return u * v_select(u < 0.0f, half, 1.0f - half);
}

void op_gelu(const gelu_args *a, int tid, int nt) {
  span all = share((int64_t)rows_of(a->cursor, a->T) * a->I, tid, nt);
  float *y = a->y;
  int64_t i = all.begin;
  for (; i + VL <= all.end; i += VL) v_store(y + i, v_gelu(v_load(a->u + i), a->tanh));
  if (i < all.end) { /* a lane's bits do not depend on the others */
    float rest[VL] = {0};
    memcpy(rest, a->u + i, (size_t)(all.end - i) * sizeof(float));
    v_store(rest, v_gelu(v_load(rest), a->tanh));
    memcpy(y + i, rest, (size_t)(all.end - i) * sizeof(float));
  }
}

void op_geglu(const geglu_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span columns = share(a->I, tid, nt);
  for (int64_t t = 0; t < rows; t++) {
    const float *gate = a->u + t * 2 * a->I, *up = gate + a->I;
    float *y = (float *)a->y + t * a->I, rest[VL] = {0};
    int64_t i = columns.begin, left;
    for (; i + VL <= columns.end; i += VL) {
      v_store(y + i, v_gelu(v_load(gate + i), 1) * v_load(up + i));
    }
    if ((left = columns.end - i) > 0) { /* a lane's bits do not depend on the others */
      memcpy(rest, gate + i, (size_t)left * sizeof(float));
      v_store(rest, v_gelu(v_load(rest), 1));
      for (int64_t j = 0; j < left; j++) y[i + j] = rest[j] * up[i + j];
    }
  }
}

void op_turn_patches(const turn_patches_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  int half = 2 * a->R;
  for (int64_t t = rows.begin; t < rows.end; t++) {
    for (int j = 0; j < half; j++) {
      int axis = j >= a->R;
      sine_cosine by = s_sincos((float)a->places[2 * t + axis] * a->inv_freq[j - axis * a->R]);
      for (float *x = a->x + t * a->x_stride + j; x < a->x + t * a->x_stride + a->C;
           x += 2 * half) {
        float low = x[0], high = x[half];
        x[0] = s_fma(low, by.cosine, -(high * by.sine));
        x[half] = s_fma(high, by.cosine, low * by.sine);
      }
    }
  }
}
