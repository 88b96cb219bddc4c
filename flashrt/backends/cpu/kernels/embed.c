/* embed, embed_seen: rows of the embedding table, and the journal of what went in.
 *
 * IS: a gather of rows from a MATRIX (panels of 32 rows) of any dtype, widened to float32. An id
 * outside [0, V), which the host should have refused, gives a row of NaN: nothing beyond the table
 * is read, and `sample` reports it.
 * IS NOT: scaling.
 */
#include "stored.h"

void op_embed(const embed_args *a, int tid, int nt) {
  const stored_matrix table = STORED(a, table, a->H);
  int rows = rows_of(a->cursor, a->T), position = position_of(a->cursor);
  span columns = share(a->H, tid, nt);
  for (int t = 0; t < rows; t++) {
    gather_row(&table, a->V, a->tokens[t], columns, a->x + (int64_t)t * a->H);
  }
  if (tid == 0) {
    for (int t = 0; t < rows; t++) a->journal[position + t] = a->tokens[t];
  }
}

void op_embed_seen(const embed_seen_args *a, int tid, int nt) {
  const stored_matrix table = STORED(a, table, a->H);
  int rows = rows_of(a->cursor, a->T), position = position_of(a->cursor);
  span columns = share(a->H, tid, nt);
  size_t nbytes = (size_t)(columns.end - columns.begin) * sizeof(float);
  for (int64_t t = 0; t < rows; t++) {
    int token = a->tokens[t];
    float *x = a->x + t * a->H;
    if (0 <= token && token < a->V) gather_row(&table, a->V, token, columns, x);
    else memcpy(x + columns.begin, a->seen + t * a->H + columns.begin, nbytes);
  }
  if (tid == 0) {
    for (int t = 0; t < rows; t++) a->journal[position + t] = a->tokens[t];
  }
}
