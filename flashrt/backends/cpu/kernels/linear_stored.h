/* What linear.c takes from linear_stored.c. */
#pragma once
#include "stored.h"
#include "tile.h"

enum {
  BAND = 2 * GROUP_WORDS, /* lanes as wide as a group, side by side */
  BANDS = LANES / BAND,
#if defined __AVX512F__
  STORED_TOKENS = 4, /* of a tile: 8 of 32 registers accumulate, as many as hide an fma's latency */
  FEW_STORED = 16,   /* rows; with more, widening pays; measured */
#else
  STORED_TOKENS = 2,
  FEW_STORED = 2,
#endif
  LEAST_GROUP = 16, /* see core/groups.py */
  TABLES = 5        /* per group and 32 lanes: s, s 2^-8, s 2^-16, s 2^-24, m */
};

typedef struct {
  const char *codes; /* of the slice, or values */
  const float *tables;
  int group_shift; /* k >> it: the group */
  int n_k;
} slice_view;

/* A slice of a panel, its scales laid out. */
typedef struct {
  const stored_matrix *of;
  slice_view view;
  const char *planes[MOST_PLANES];
  int is_fast; /* else element by element */
  _Alignas(64) float tables[SLICE / LEAST_GROUP * TABLES * LANES];
} open_slice;

void flashrt_open_slice(open_slice *s, const stored_matrix *m, int64_t panel, int64_t k0);

/* Weights of a band of a slice, in float32, [k][BAND]. `wide` has room for SLICE * BAND. */
void flashrt_widen_band(const open_slice *s, int band, float *wide);

/* y[t][lane] = the sums of a panel for n_rows <= FEW_STORED rows of x, over all K; rows packed in
 * n_tiles tiles of up to STORED_TOKENS, [slice][tile][k][token], the first ones having one more
 * where n_rows is no multiple. Columns from n_cols on do not exist. */
void flashrt_stream_stored(const stored_matrix *m, int64_t panel, const float *x, int n_rows,
                           int n_tiles, float *y, int64_t y_stride, int64_t n_cols);
