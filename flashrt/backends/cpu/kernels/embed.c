/* embed: rows of the embedding table, and the journal of what went in.
 *
 * IS: a gather of bfloat16 rows from a MATRIX (panels of 32 rows), widened to float32. An id
 * outside [0, V), which the host should have refused, gives a row of NaN: nothing beyond the table
 * is read, and `sample` reports it.
 * IS NOT: scaling.
 */
#include "common.h"

/* Columns [begin, end) of row `token`; element k of a row is LANES after element k - 1. */
static void gather(float *x, const embed_args *a, int32_t token, span columns) {
  int is_known = token >= 0 && token < a->V;
  const uint16_t *row = a->table + matrix_index(is_known ? token : 0, 0, a->H);
  for (int64_t k = columns.begin; k < columns.end; k++)
    x[k] = is_known ? from_bf16(row[k * LANES]) : NAN;
}

void op_embed(const embed_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T), position = position_of(a->cursor);
  span columns = share(a->H, tid, nt);
  for (int t = 0; t < rows; t++) gather(a->x + (int64_t)t * a->H, a, a->tokens[t], columns);
  if (tid == 0) {
    for (int t = 0; t < rows; t++) a->journal[position + t] = a->tokens[t];
  }
}
