/* silu_mul, add_bias, scale_rows, last_*, keep_*, advance, hold, place_rows: small steps between the larger kernels.
 *
 * IS: columns split over threads. IS NOT: anything with a sum.
 */
#include "common.h"
#include "fmath.h"

void op_silu_mul(const silu_mul_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span columns = share(a->I, tid, nt);
  for (int64_t t = 0; t < rows; t++) {
    const float *gate = a->u + t * 2 * a->I, *up = gate + a->I;
    float *y = (float *)a->y + t * a->I;
    int64_t i = columns.begin;
    for (; i + VL <= columns.end; i += VL)
      v_store(y + i, v_silu(v_load(gate + i)) * v_load(up + i));
    for (; i < columns.end; i++) y[i] = s_silu(gate[i]) * up[i];
  }
}

void op_add_bias(const add_bias_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span columns = share(a->N, tid, nt);
  for (int64_t t = 0; t < rows; t++) {
    float *x = a->x + t * a->N;
    for (int64_t n = columns.begin; n < columns.end; n++) x[n] = x[n] + a->b[n];
  }
}

void op_scale_rows(const scale_rows_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span columns = share(a->N, tid, nt);
  for (int64_t t = 0; t < rows; t++) {
    float *x = a->x + t * a->N;
    for (int64_t n = columns.begin; n < columns.end; n++) x[n] = x[n] * a->factor;
  }
}

void op_last_row(const last_row_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (tid > 0 || rows < 1) return;
  memcpy(a->y, (const float *)a->x + (int64_t)(rows - 1) * a->H, (size_t)a->H * sizeof(float));
}

void op_last_values(const last_values_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (tid > 0 || rows < 1) return;
  memcpy(a->y, a->x + (int64_t)(rows - 1) * a->x_stride, (size_t)a->C * sizeof(float));
}

void op_keep_rows(const keep_rows_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  size_t first = (size_t)rows.begin * a->H, n = (size_t)(rows.end - rows.begin) * a->H;
  memcpy((float *)a->y + first, (const float *)a->x + first, n * sizeof(float));
}

void op_keep_values(const keep_values_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++)
    memcpy(a->y + t * a->y_stride, a->x + t * a->x_stride, (size_t)a->C * sizeof(float));
}

void op_last_cursor(const last_cursor_args *a, int tid, int nt) {
  if (tid > 0) return;
  memset(a->last, 0, CURSOR_WORDS * sizeof(int32_t));
  if (a->cursor[CURSOR_ROWS] < 1) return;
  a->last[CURSOR_POSITION] = a->cursor[CURSOR_POSITION] + a->cursor[CURSOR_ROWS] - 1;
  a->last[CURSOR_ROWS] = 1;
}

void op_all_rows(const all_rows_args *a, int tid, int nt) {
  if (tid > 0) return;
  memset(a->all, 0, CURSOR_WORDS * sizeof(int32_t));
  a->all[CURSOR_ROWS] = a->rows;
}

void op_advance(const advance_args *a, int tid, int nt) {
  if (tid == 0) a->cursor[CURSOR_POSITION] += a->cursor[CURSOR_ROWS];
}

void op_hold(const hold_args *a, int tid, int nt) {
  if (tid > 0) return;
  int32_t token = a->cursor[CURSOR_TOKEN];
  int is_stop = token < 0;
  for (int i = 1; i < STOP_WORDS && i <= a->stops[0]; i++) is_stop |= a->stops[i] == token;
  if (is_stop) a->cursor[CURSOR_ROWS] = 0;
}

void op_place_rows(const place_rows_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (tid > 0 || rows < 1) return;
  int32_t first = position_of(a->cursor) + a->delta[0];
  for (int i = 0; i < 3 * rows; i++) {
    a->places[i] = first + i / 3 + (a->given ? a->offsets[i] : 0);
  }
  if (a->given) a->delta[0] += a->growth[0];
}
