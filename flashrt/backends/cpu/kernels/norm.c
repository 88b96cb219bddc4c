/* rmsnorm, add_rmsnorm, adaptive_rmsnorm, gated_rmsnorm, silu_rmsnorm: root-mean-square norms over a
 * row or over one part of a row.
 *
 * IS: one thread per row (or head): a row's sum has one order, see sum_of_squares. IS NOT: the
 * norms inside rope_append and delta_gates, which are over heads that those kernels hold already.
 */
#include "common.h"
#include "fmath.h"

/* y = x * scale * w */
INLINE void scale_row(float *y, const float *x, const float *w, float scale, int n) {
  int i = 0;
  for (; i + VL <= n; i += VL) v_store(y + i, v_load(x + i) * scale * v_load(w + i));
  for (; i < n; i++) y[i] = x[i] * scale * w[i];
}

void op_rmsnorm(const rmsnorm_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    const float *x = a->x + t * a->H;
    scale_row((float *)a->y + t * a->H, x, a->w, inverse_rms(x, a->H, a->eps), a->H);
  }
}

void op_add_rmsnorm(const add_rmsnorm_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    float *x = a->x + t * a->H;
    const float *r = a->r + t * a->H;
    for (int i = 0; i < a->H; i++) x[i] += r[i];
    scale_row((float *)a->y + t * a->H, x, a->w, inverse_rms(x, a->H, a->eps), a->H);
  }
}

void op_adaptive_rmsnorm(const adaptive_rmsnorm_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    float *x = a->x + t * a->H, *y = (float *)a->y + t * a->H;
    const float *r = a->r + t * a->H;
    int i = 0;
    if (a->added) {
      for (; i + VL <= a->H; i += VL) {
        v_store(x + i, v_fma(v_load(a->gate + i), v_load(r + i), v_load(x + i)));
      }
      for (; i < a->H; i++) x[i] = s_fma(a->gate[i], r[i], x[i]);
    }
    float scale = inverse_rms(x, a->H, a->eps);
    for (i = 0; i + VL <= a->H; i += VL) {
      v_store(y + i,
              v_fma(v_load(x + i) * scale, 1.0f + v_load(a->scale + i), v_load(a->shift + i)));
    }
    for (; i < a->H; i++) y[i] = s_fma(x[i] * scale, 1.0f + a->scale[i], a->shift[i]);
  }
}

void op_gated_rmsnorm(const gated_rmsnorm_args *a, int tid, int nt) {
  int heads = a->C / a->dv;
  span units = share((int64_t)rows_of(a->cursor, a->T) * heads, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t t = unit / heads, column = unit % heads * a->dv;
    const float *o = a->o + t * a->C + column, *z = a->z + t * a->z_stride + column;
    float *y = (float *)a->y + t * a->C + column;
    float scale = inverse_rms(o, a->dv, a->eps);
    int i = 0;
    for (; i + VL <= a->dv; i += VL) {
      v_store(y + i, v_load(a->w + i) * (v_load(o + i) * scale) * v_silu(v_load(z + i)));
    }
    for (; i < a->dv; i++) y[i] = a->w[i] * (o[i] * scale) * s_silu(z[i]);
  }
}

void op_silu_rmsnorm(const silu_rmsnorm_args *a, int tid, int nt) {
  int64_t size = a->C / a->groups;
  span units = share((int64_t)rows_of(a->cursor, a->T) * a->groups, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t t = unit / a->groups, column = unit % a->groups * size;
    const float *o = a->o + t * a->C + column, *z = a->z + t * a->z_stride + column;
    float *y = (float *)a->y + t * a->C + column;
    int64_t i = 0; /* y holds o silu(z) until its scale is known */
    for (; i + VL <= size; i += VL) v_store(y + i, v_load(o + i) * v_silu(v_load(z + i)));
    for (; i < size; i++) y[i] = o[i] * s_silu(z[i]);
    scale_row(y, y, a->w + column, inverse_rms(y, (int)size, a->eps), (int)size);
  }
}
