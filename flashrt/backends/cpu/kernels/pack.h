/* Rows as files have them, to panels: what pack.c and load.c share.
 *
 * IS: where the rows of a matrix come from and what their bytes are. IS NOT: reading (load.c) or the
 * storage (stored.h).
 */
#pragma once
#include "stored.h"

/* Blocks of ggml, by the numbers that GGUF has for them; 0: values. Their matrices are as
 * formats/blocks.py says: each type has one dtype and one kind of scales. */
enum {
  VALUES = 0,
  BLOCK_Q4_0 = 2,
  BLOCK_Q4_1 = 3,
  BLOCK_Q5_0 = 6,
  BLOCK_Q5_1 = 7,
  BLOCK_Q8_0 = 8,
  BLOCK_Q4_K = 12, /* from here on of 256 elements, else of 32 */
  BLOCK_Q5_K = 13,
  BLOCK_Q6_K = 14
};

typedef struct {
  const char *bytes;
  int64_t row_nbytes;
  const int64_t *order; /* row n is row order[n] of the bytes; NULL: row n */
  int64_t N;
  int type;
  stored_matrix m; /* where they go; K columns */
} row_source;

/* Rows [32 panel, 32 panel + 32) of a source; the panel is completed with zeros. */
void pack_panel(const row_source *s, int64_t panel);
