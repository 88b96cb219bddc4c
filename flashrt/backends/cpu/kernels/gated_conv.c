/* gated_conv: a causal depthwise convolution over the last W rows of b * x and the new ones, between
 * the gates b and c.
 *
 * IS: channels are split over threads, so each thread owns the window of its channels; per output
 * one chain over taps, oldest first, then the bias, then c. b * x is rounded before a tap meets it,
 * as it is in the window. IS NOT: the projection that gives b, c and x.
 */
#include "common.h"

/* Channels [c, c + VL), or one, of row `index` of window ++ b * x: [0, W) is the window, oldest
 * first, then the rows of u. */
INLINE vf v_row(const gated_conv_args *a, int64_t index, int64_t c) {
  if (index < a->W) return v_load(a->window + index * a->C + c);
  const float *u = a->u + (index - a->W) * 3 * a->C + c;
  return v_load(u) * v_load(u + 2 * (int64_t)a->C);
}
INLINE float s_row(const gated_conv_args *a, int64_t index, int64_t c) {
  if (index < a->W) return a->window[index * a->C + c];
  const float *u = a->u + (index - a->W) * 3 * a->C + c;
  return u[0] * u[2 * (int64_t)a->C];
}

INLINE vf v_output(const gated_conv_args *a, int64_t t, int64_t c) {
  vf sum = v_load(a->w + c) * v_row(a, t, c);
  for (int64_t tap = 1; tap < a->W1; tap++)
    sum = v_fma(v_load(a->w + tap * a->C + c), v_row(a, t + tap, c), sum);
  if (a->biased) sum = sum + v_load(a->bias + c);
  return v_load(a->u + (3 * t + 1) * a->C + c) * sum;
}
INLINE float s_output(const gated_conv_args *a, int64_t t, int64_t c) {
  float sum = a->w[c] * s_row(a, t, c);
  for (int64_t tap = 1; tap < a->W1; tap++)
    sum = s_fma(a->w[tap * a->C + c], s_row(a, t + tap, c), sum);
  if (a->biased) sum = sum + a->bias[c];
  return a->u[(3 * t + 1) * a->C + c] * sum;
}

void op_gated_conv(const gated_conv_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span blocks = share(ceil_div(a->C, 16), tid, nt); /* whole cache lines per thread */
  span own = {blocks.begin * 16, min_of(blocks.end * 16, a->C)};
  for (int64_t t = 0; t < rows; t++) {
    float *y = (float *)a->y + t * a->C;
    int64_t c = own.begin;
    for (; c + VL <= own.end; c += VL) v_store(y + c, v_output(a, t, c));
    for (; c < own.end; c++) y[c] = s_output(a, t, c);
  }
  /* Ascending, and rows >= 1: an old window row is read before it is overwritten. */
  for (int64_t i = 0; rows > 0 && i < a->W; i++) {
    float *window = a->window + i * a->C;
    for (int64_t c = own.begin; c < own.end; c++) window[c] = s_row(a, i + rows, c);
  }
}
