/* embed: rows of the embedding table, and the journal of what went in.
 *
 * IS: a gather of bfloat16 rows from a MATRIX (panels of 32 rows), widened to float32. IS NOT: a check of token ids: the
 * host refuses ids outside [0, V) before they come here. Called by: the launch list of a graph.
 */
#include "common.h"

void op_embed(const embed_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T), position = position_of(a->cursor);
  span columns = share(a->H, tid, nt);
  for (int t = 0; t < rows; t++) {
    const uint16_t *row = a->table + matrix_index(a->tokens[t], 0, a->H); /* element k is at row[k * LANES] */
    float *x = a->x + (int64_t)t * a->H;
    for (int64_t k = columns.begin; k < columns.end; k++) x[k] = from_bf16(row[k * LANES]);
  }
  if (tid == 0) {
    for (int t = 0; t < rows; t++) a->journal[position + t] = a->tokens[t];
  }
}
