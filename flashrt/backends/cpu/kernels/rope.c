/* rope_append, rope_placed: norm and rotation of queries and keys, and the new rows of the key and
 * value store; rope_rows and append_rows: rotation alone, and new rows alone.
 *
 * IS: one unit of work per head and row, units of one head next to each other, so that threads
 * share few cache lines of the store. IS NOT: attention.
 */
#include "codes.h"
#include "common.h"
#include "fmath.h"

enum { MAX_HEAD = 1024 };

typedef struct {
  const rope_append_args *a;
  int64_t t, head, position;
  float *row; /* [MAX_HEAD], of keys that become codes */
  const int32_t
      *axes; /* three places, and how many pairs turn by the latter two; NULL: one place */
  int by_rows, by_columns;
} place;

/* What pair j turns by. */
INLINE int64_t place_of(const place *at, int j) {
  if (!at->axes) return at->position;
  if (j % 3 == 1 && j < 3 * at->by_rows) return at->axes[1];
  if (j % 3 == 2 && j < 3 * at->by_columns) return at->axes[2];
  return at->axes[0];
}

static void put_query(const place *at, int d, float x) {
  at->a->q[(at->t * at->a->Nq + at->head) * at->a->D + d] = x;
}
static void put_key(const place *at, int d, float x) {
  const rope_append_args *a = at->a;
  store_float(a->keys, keys_index(at->head, at->position, d, a->S, a->D, a->keys_dtype),
              a->keys_dtype, x);
}

static void put_row(const place *at, int d, float x) { at->row[d] = x; }

static void put_scale(const place *at, float *scales, float scale) {
  scales[keys_index(at->head, at->position, 0, at->a->S, 1, DTYPE_F32)] = scale;
}

static void put_key_codes(const place *at) {
  const rope_append_args *a = at->a;
  float scale = scale_of_row(at->row, a->D, a->keys_dtype);
  for (int d = 0; d < a->D; d++) {
    int64_t index = keys_index(at->head, at->position, d, a->S, a->D, a->keys_dtype);
    ((uint8_t *)a->keys)[index] = to_code(at->row[d], scale, a->keys_dtype);
  }
  put_scale(at, a->key_scales, scale);
}

/* put(rope(norm(x, w))) for one head. The angle is rounded to float32 before the sine is taken,
 * and sine and cosine are multiplied by the magnitude before they turn: so are the model's. */
INLINE void turn(const place *at, const float *x, const float *w, const int normed,
                 void (*put)(const place *, int, float)) {
  int D = at->a->D, R2 = at->a->R2;
  float scale = normed ? inverse_rms(x, D, at->a->eps) : 1.0f;
  for (int j = 0; j < R2; j++) {
    sine_cosine by = s_sincos((float)(place_of(at, j) - at->a->shift) * at->a->inv_freq[j]);
    float cosine = by.cosine * at->a->magnitude, sine = by.sine * at->a->magnitude;
    float low = x[j], high = x[j + R2];
    if (normed) low = low * scale * w[j], high = high * scale * w[j + R2];
    put(at, j, s_fma(low, cosine, -(high * sine)));
    put(at, j + R2, s_fma(high, cosine, low * sine));
  }
  for (int d = 2 * R2; d < D; d++) put(at, d, normed ? x[d] * scale * w[d] : x[d]);
}

/* The columns that pad D to whole groups of 32 are written as zeros. */
static void put_values(const place *at, const float *v) {
  const rope_append_args *a = at->a;
  int is_coded = is_code(a->values_dtype);
  float scale = is_coded ? scale_of_row(v, a->D, a->values_dtype) : 0.0f;
  if (is_coded) put_scale(at, a->value_scales, scale);
  for (int d = 0; d < ceil_div(a->D, LANES) * LANES; d++) {
    int64_t index = values_index(at->head, at->position, d, a->S, a->D, a->values_dtype);
    float x = d < a->D ? v[d] : 0.0f;
    if (is_coded) ((uint8_t *)a->values)[index] = to_code(x, scale, a->values_dtype);
    else store_float(a->values, index, a->values_dtype, x);
  }
}

static void append(const rope_append_args *a, const rope_placed_args *placed, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (rows <= 0) return;
  int64_t Nq = a->Nq, Nk = a->Nk, D = a->D;
  int64_t pitch = a->gated ? 2 * D : D; /* from one query to the next: a gate may lie between */
  float row[MAX_HEAD];
  int is_coded = is_code(a->keys_dtype);
  span units = share((Nq + 2 * Nk) * rows, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t head = unit / rows, t = unit % rows;
    const float *u = a->u + t * a->U;
    place at = {a, t, head, position_of(a->cursor) + t, row, NULL, 0, 0};
    if (placed) {
      at.axes = placed->places + 3 * t;
      at.by_rows = placed->by_rows, at.by_columns = placed->by_columns;
    }
    if (head < Nq) {
      turn(&at, u + head * pitch, a->q_norm, a->normed, put_query);
    } else if ((at.head = head - Nq) < Nk) {
      const float *key = u + Nq * pitch + at.head * D;
      turn(&at, key, a->k_norm, a->normed, is_coded ? put_row : put_key);
      if (is_coded) put_key_codes(&at);
    } else {
      at.head -= Nk;
      put_values(&at, u + Nq * pitch + (Nk + at.head) * D);
    }
  }
}

void op_rope_append(const rope_append_args *a, int tid, int nt) { append(a, NULL, tid, nt); }

void op_rope_placed(const rope_placed_args *a, int tid, int nt) {
  rope_append_args same = {.u = a->u,
                           .q_norm = a->q_norm,
                           .k_norm = a->k_norm,
                           .inv_freq = a->inv_freq,
                           .cursor = a->cursor,
                           .q = a->q,
                           .keys = a->keys,
                           .values = a->values,
                           .key_scales = a->key_scales,
                           .value_scales = a->value_scales,
                           .T = a->T,
                           .U = a->U,
                           .D = a->D,
                           .R2 = a->R2,
                           .Nq = a->Nq,
                           .Nk = a->Nk,
                           .S = a->S,
                           .C = a->C,
                           .keys_dtype = a->keys_dtype,
                           .values_dtype = a->values_dtype,
                           .key_scales_dtype = a->key_scales_dtype,
                           .value_scales_dtype = a->value_scales_dtype,
                           .eps = a->eps,
                           .shift = a->shift,
                           .gated = a->gated,
                           .normed = a->normed,
                           .magnitude = a->magnitude};
  append(&same, a, tid, nt);
}

/* ---- rotation alone, and new rows alone ---- */

void op_rope_rows(const rope_rows_args *a, int tid, int nt) {
  int64_t first = a->placed ? position_of(a->cursor) : 0;
  span units = share((int64_t)rows_of(a->cursor, a->T) * a->N, tid, nt);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t t = unit / a->N;
    const float *x = a->x + t * a->x_stride + unit % a->N * a->D;
    float *y = a->y + unit * a->D;
    for (int j = 0; j < a->R2; j++) {
      sine_cosine by = s_sincos((float)(first + t) * a->inv_freq[j]);
      float low = x[j], high = x[j + a->R2];
      y[j] = s_fma(low, by.cosine, -(high * by.sine));
      y[j + a->R2] = s_fma(high, by.cosine, low * by.sine);
    }
    for (int d = 2 * a->R2; d < a->D; d++) y[d] = x[d];
  }
}

void op_append_rows(const append_rows_args *a, int tid, int nt) {
  int64_t rows = rows_of(a->cursor, a->T), width = ceil_div(a->D, LANES) * LANES;
  span units = share(a->Nk * rows, tid, nt); /* of one head next to each other */
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    int64_t head = unit / rows, t = unit % rows, at = position_of(a->cursor) + t;
    const float *k = a->k + t * a->k_stride + head * a->D;
    const float *v = a->v + t * a->v_stride + head * a->D;
    for (int d = 0; d < a->D; d++) {
      store_float(a->keys, keys_index(head, at, d, a->S, a->D, a->keys_dtype), a->keys_dtype, k[d]);
    }
    for (int d = 0; d < width; d++) { /* padding as in rope_append */
      int64_t index = values_index(head, at, d, a->S, a->D, a->values_dtype);
      store_float(a->values, index, a->values_dtype, d < a->D ? v[d] : 0.0f);
    }
  }
}
