/* dense, dense_add, flow_step: float32 layers of few rows, where `linear` wants bfloat16 weights.
 *
 * Order: output rows sit in vector lanes, so each output is two chains of scalar fma, over even k
 * and over odd k, ascending, from +0; their sum, then the bias. K alone fixes it: width, rows and
 * threads decide only which chains run side by side.
 *
 * Weights: panels of 32 outputs, [ceil(N / 32)][K][32], read once in order. Threads share the
 * panels. IS NOT: for many rows; each row reads the panel again, from cache.
 */
#include "common.h"
#include "dense.h"

enum { PARTS = LANES / VL }; /* vectors of a panel */

typedef struct {
  vf part[PARTS];
} panel;

/* The 32 sums of one row of x with one panel. */
INLINE panel panel_of(const float *x, const float *w, int K) {
  panel even = {}, odd = {};
  int k = 0;
  for (; k + 2 <= K; k += 2, w += 2 * LANES) {
    vf first = v_set(x[k]), second = v_set(x[k + 1]);
    UNROLL for (int i = 0; i < PARTS; i++) {
      even.part[i] = v_fma(first, v_load(w + i * VL), even.part[i]);
      odd.part[i] = v_fma(second, v_load(w + LANES + i * VL), odd.part[i]);
    }
  }
  if (k < K) {
    UNROLL for (int i = 0; i < PARTS; i++) {
      even.part[i] = v_fma(v_set(x[k]), v_load(w + i * VL), even.part[i]);
    }
  }
  UNROLL for (int i = 0; i < PARTS; i++) even.part[i] += odd.part[i];
  return even;
}

void op_dense(const dense_args *a, int tid, int nt) {
  span panels = share(ceil_div(a->N, LANES), tid, nt);
  for (int64_t at = panels.begin; at < panels.end; at++) {
    for (int64_t t = 0; t < a->T; t++) {
      panel sums = panel_of(a->x + t * a->K, a->w + at * a->K * LANES, a->K);
      for (int i = 0; i < PARTS; i++) {
        int64_t n = at * LANES + i * VL, count = a->N - n;
        if (count <= 0) break;
        vf y = sums.part[i] + load_some(a->b + n, count);
        store_some(a->y + t * a->N + n, v_activated(y, a->activation), count);
      }
    }
  }
}

void op_dense_add(const dense_add_args *a, int tid, int nt) {
  span panels = share(ceil_div(a->N, LANES), tid, nt);
  for (int64_t at = panels.begin; at < panels.end; at++) {
    for (int64_t t = 0; t < a->T; t++) {
      panel sums = panel_of(a->x + t * a->K, a->w + at * a->K * LANES, a->K);
      for (int i = 0; i < PARTS; i++) {
        int64_t n = at * LANES + i * VL, count = a->N - n;
        if (count <= 0) break;
        float *y = a->y + t * a->N + n;
        vf sum = sums.part[i] + load_some(a->b + n, count);
        store_some(y, load_some(y, count) + sum, count);
      }
    }
  }
}

void op_flow_step(const flow_step_args *a, int tid, int nt) {
  span panels = share(ceil_div(a->N, LANES), tid, nt);
  int action_dim = a->N / a->H;
  for (int64_t at = panels.begin; at < panels.end; at++) {
    panel sums = panel_of(a->z, a->w + at * a->K * LANES, a->K);
    for (int i = 0; i < LANES && at * LANES + i < a->N; i++) {
      int64_t n = at * LANES + i;
      float velocity = sums.part[i / VL][i % VL] + a->b[n];
      if (a->mask[n / action_dim] == 0.0f) a->x[n] += velocity / (float)a->steps;
    }
  }
  if (tid == 0) a->cursor[POLICY_PLAN_STEPS_LEFT] -= 1;
}
