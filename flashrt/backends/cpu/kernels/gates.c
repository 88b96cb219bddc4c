/* delta_gates: what the delta rule needs beside v: unit queries and keys, decay and write strength.
 *
 * IS: per row and head; q and k are normalised in place. IS NOT: the recurrence, see delta_rule.c.
 */
#include "common.h"
#include "fmath.h"

#define L2_EPS 1e-6f /* inside the root, of the sum, whatever the norms of the model use */

/* The queries, then the keys of row t, head after head. */
static void unit_heads(const delta_gates_args *a, int64_t t) {
  float query_scale = s_rsqrt((float)a->key_dim);
  for (int head = 0; head < 2 * a->key_heads; head++) {
    float *x = a->y + t * a->C + (int64_t)head * a->key_dim;
    float scale = s_rsqrt(sum_of_squares(x, a->key_dim) + L2_EPS);
    if (head < a->key_heads) scale *= query_scale;
    for (int i = 0; i < a->key_dim; i++) x[i] *= scale;
  }
}

void op_delta_gates(const delta_gates_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++) {
    unit_heads(a, t);
    const float *in = a->a + t * a->a_stride, *b = a->b + t * a->b_stride;
    float *decay = a->decay + t * a->Hv, *beta = a->beta + t * a->Hv;
    int h = 0;
    for (; h + VL <= a->Hv; h += VL) {
      vf rate = v_exp(v_load(a->a_log + h)) * v_softplus(v_load(in + h) + v_load(a->dt_bias + h));
      v_store(decay + h, v_exp(-rate));
      v_store(beta + h, v_sigmoid(v_load(b + h)));
    }
    for (; h < a->Hv; h++) {
      decay[h] = s_exp(-(s_exp(a->a_log[h]) * s_softplus(in[h] + a->dt_bias[h])));
      beta[h] = s_sigmoid(b[h]);
    }
  }
}
