/* rope_append: norm and rotation of queries and keys, and the new rows of the key and value store.
 *
 * IS: one unit of work per head and row, units of one head next to each other, so that threads
 * share few cache lines of the store. IS NOT: attention.
 */
#include "common.h"
#include "fmath.h"

typedef struct {
  const rope_append_args *a;
  int64_t t, head, position;
} place;

static void put_query(const place *at, int d, float x) {
  at->a->q[(at->t * at->a->Nq + at->head) * at->a->D + d] = x;
}
static void put_key(const place *at, int d, float x) {
  const rope_append_args *a = at->a;
  store_float(a->keys, keys_index(at->head, at->position, d, a->S, a->D, a->keys_dtype),
              a->keys_dtype, x);
}

/* put(rope(rmsnorm(x, w))) for one head. The angle is rounded to float32 before the sine is
 * taken: so is the model's. */
INLINE void turn(const place *at, const float *x, const float *w,
                 void (*put)(const place *, int, float)) {
  int D = at->a->D, R2 = at->a->R2;
  float scale = inverse_rms(x, D, at->a->eps);
  for (int j = 0; j < R2; j++) {
    sine_cosine by = s_sincos((float)(at->position - at->a->shift) * at->a->inv_freq[j]);
    float low = x[j] * scale * w[j], high = x[j + R2] * scale * w[j + R2];
    put(at, j, s_fma(low, by.cosine, -(high * by.sine)));
    put(at, j + R2, s_fma(high, by.cosine, low * by.sine));
  }
  for (int d = 2 * R2; d < D; d++) put(at, d, x[d] * scale * w[d]);
}

/* The columns that pad D to whole groups of 32 are written as zeros. */
static void put_values(const place *at, const float *v) {
  const rope_append_args *a = at->a;
  for (int d = 0; d < ceil_div(a->D, LANES) * LANES; d++) {
    int64_t index = values_index(at->head, at->position, d, a->S, a->D, a->values_dtype);
    store_float(a->values, index, a->values_dtype, d < a->D ? v[d] : 0.0f);
  }
}

void op_rope_append(const rope_append_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (rows <= 0) return;
  int64_t Nq = a->Nq, Nk = a->Nk, D = a->D, width = 2 * (Nq + Nk) * D;
  span units = share((Nq + 2 * Nk) * rows, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t head = unit / rows, t = unit % rows;
    const float *u = a->u + t * width;
    place at = {a, t, head, position_of(a->cursor) + t};
    if (head < Nq) { /* queries are followed by their gate, head by head */
      turn(&at, u + head * 2 * D, a->q_norm, put_query);
    } else if ((at.head = head - Nq) < Nk) {
      turn(&at, u + (2 * Nq + at.head) * D, a->k_norm, put_key);
    } else {
      at.head -= Nk;
      put_values(&at, u + (2 * Nq + Nk + at.head) * D);
    }
  }
}
