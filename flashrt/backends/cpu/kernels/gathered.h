/* Gathered rows of x by panels of one of several matrices: what experts.c takes from linear.c,
 * linear_int8.c and linear_bf16.c.
 *
 * IS: the products of op_linear and its relatives, bit for bit, of rows that lie anywhere, by one thread that packs
 * them for itself. IS NOT: the choice of rows, nor the sharing of panels among threads.
 */
#pragma once
#include "stored.h"

typedef struct {
  stored_matrix w; /* its first panel is the matrix's */
  int64_t N;       /* rows of w, a multiple of LANES */
  const float *const *rows;
  int n;       /* rows */
  int n_terms; /* int8 of x: 1 or 2; else 0 */
  void *packed;
} gathered;

/* Bytes of a row, packed. */
static inline int64_t packed_nbytes(int64_t K) { return ceil_div(K, UNIT) * (UNIT * 4); }

/* Packs the rows into `room`, of n rows. NULL: one row is taken as it is. */
void flashrt_pack_floats(gathered *x, void *room);
void flashrt_pack_integers(gathered *x, void *room);
void flashrt_pack_bfloat16(gathered *x, void *room);

/* y[i][column - the first one of the panels] = row i of x times those of w. */
void flashrt_multiply_floats(const gathered *x, span panels, float *y, int64_t stride);
void flashrt_multiply_integers(const gathered *x, span panels, float *y, int64_t stride);
void flashrt_multiply_bfloat16(const gathered *x, span panels, float *y, int64_t stride);
