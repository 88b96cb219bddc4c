/* experts_in, experts_out: products with the weights of the experts that rows picked. */
#include "fmath.h"
#include "stored.h"

/* A row of a matrix times x, in the order of linear.c. */
static float dot(const stored_matrix *m, int64_t n_rows, int64_t row, const float *x) {
  float y = 0, w[SLICE];
  for (int64_t k0 = 0; k0 < m->K; k0 += SLICE) {
    span slice = {k0, min_of(k0 + SLICE, m->K)};
    gather_row(m, n_rows, row, slice, w - k0); /* which counts from column 0 */
    float s = 0;
    for (int64_t k = k0; k < slice.end; k += CHAIN) {
      float c = 0;
      for (int64_t i = k; i < min_of(k + CHAIN, slice.end); i++) c = s_fma(w[i - k0], x[i], c);
      s = k == k0 ? c : s + c;
    }
    y = k0 == 0 ? s : y + s;
  }
  return y;
}

void op_experts_in(const experts_in_args *a, int tid, int nt) {
  const stored_matrix w = STORED(a, w, a->H);
  int64_t n_picks = (int64_t)rows_of(a->cursor, a->T) * a->P, n_rows = (int64_t)a->E * 2 * a->I;
  span columns = share(a->I, tid, nt);
  for (int64_t pick = 0; pick < n_picks; pick++) {
    const float *x = (const float *)a->x + pick / a->P * a->H;
    float *h = (float *)a->h + pick * a->I;
    int64_t first = (int64_t)a->picks[pick] * 2 * a->I;
    for (int64_t i = columns.begin; i < columns.end; i++)
      h[i] = s_silu(dot(&w, n_rows, first + i, x)) * dot(&w, n_rows, first + a->I + i, x);
  }
}

void op_experts_out(const experts_out_args *a, int tid, int nt) {
  const stored_matrix w = STORED(a, w, a->I);
  int64_t n_picks = (int64_t)rows_of(a->cursor, a->T) * a->P, n_rows = (int64_t)a->E * a->H;
  span columns = share(a->H, tid, nt);
  for (int64_t pick = 0; pick < n_picks; pick++) {
    const float *h = (const float *)a->h + pick * a->I;
    float *y = a->y + pick / a->P * a->H;
    for (int64_t n = columns.begin; n < columns.end; n++) {
      float product = dot(&w, n_rows, (int64_t)a->picks[pick] * a->H + n, h);
      y[n] = s_fma(a->gates[pick], product, pick % a->P ? y[n] : 0.0f);
    }
  }
}
