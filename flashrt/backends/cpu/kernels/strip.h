/* Strips of columns of a recurrent state, in registers through all rows of a launch.
 *
 * IS: how many columns go together, and their loads and stores from rows. IS NOT: a recurrence.
 * Included by: delta_rule.c, ssm.c.
 */
#pragma once
#include "common.h"

enum {
  STRIP = VL < 8 ? 16 : 32,
  STRIP_VECTORS = STRIP / VL
}; /* columns whose chains fill the registers */

typedef struct {
  vf v[STRIP_VECTORS];
} strip;

/* Columns beyond n_cols load as zero and are not stored. */
INLINE strip load_columns(const float *p, int n_cols) {
  strip s;
  float padded[STRIP] = {0};
  if (n_cols < STRIP) p = memcpy(padded, p, sizeof *p * (size_t)n_cols);
  for (int j = 0; j < STRIP_VECTORS; j++) s.v[j] = v_load(p + j * VL);
  return s;
}
INLINE void store_columns(float *p, int n_cols, strip s) {
  float padded[STRIP];
  float *out = n_cols < STRIP ? padded : p;
  for (int j = 0; j < STRIP_VECTORS; j++) v_store(out + j * VL, s.v[j]);
  if (n_cols < STRIP) memcpy(p, padded, sizeof *p * (size_t)n_cols);
}
