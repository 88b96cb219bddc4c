/* conv_window: causal depthwise convolution over the last W raw rows and the new ones, then silu.
 *
 * IS: channels are split over threads, so each thread owns the window of its channels; per output one chain over taps,
 * oldest first. IS NOT: aware of which channels are queries, keys or values. Called by: the launch list of a graph.
 */
#include "common.h"
#include "fmath.h"

/* Row `index` of window ++ u: [0, W) is the window, oldest first, then the rows of u. */
INLINE const float *raw_row(const conv_window_args *a, int64_t index) {
  return index < a->W ? a->window + index * a->C : a->u + (index - a->W) * a->u_stride;
}

void op_conv_window(const conv_window_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span blocks = share(ceil_div(a->C, 16), tid, nt); /* whole cache lines per thread */
  int64_t begin = blocks.begin * 16, end = min_of(blocks.end * 16, a->C);
  for (int64_t t = 0; t < rows; t++) {
    float *y = a->y + t * a->C;
    int64_t c = begin;
    for (; c + VL <= end; c += VL) {
      vf sum = v_load(a->w + c) * v_load(raw_row(a, t) + c);
      for (int64_t tap = 1; tap < a->W1; tap++) {
        sum = v_fma(v_load(a->w + tap * a->C + c), v_load(raw_row(a, t + tap) + c), sum);
      }
      v_store(y + c, v_silu(sum));
    }
    for (; c < end; c++) {
      float sum = a->w[c] * raw_row(a, t)[c];
      for (int64_t tap = 1; tap < a->W1; tap++) sum = s_fma(a->w[tap * a->C + c], raw_row(a, t + tap)[c], sum);
      y[c] = s_silu(sum);
    }
  }
  /* Ascending, and rows >= 1: an old window row is read before it is overwritten. */
  for (int64_t i = 0; rows > 0 && i < a->W; i++) {
    const float *from = raw_row(a, i + rows);
    float *to = a->window + i * a->C;
    for (int64_t c = begin; c < end; c++) to[c] = from[c];
  }
}
