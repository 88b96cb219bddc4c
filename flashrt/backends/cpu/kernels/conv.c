/* conv_window, conv_verify, conv_biased: causal depthwise convolution over the last W raw rows and the new ones,
 * then silu.
 *
 * IS: channels are split over threads, so each thread owns the window of its channels; per output
 * one chain over taps, oldest first, from the bias if there is one. IS NOT: aware of which channels are queries, keys or values.
 */
#include "common.h"
#include "fmath.h"

/* Row `index` of window ++ u: [0, W) is the window, oldest first, then the rows of u. */
INLINE const float *raw_row(const conv_window_args *a, int64_t index) {
  return index < a->W ? a->window + index * a->C : a->u + (index - a->W) * a->u_stride;
}

/* sum = b + w * x, the bias b first if there is one */
INLINE void first_tap(float *sum, const float *w, const float *x, const float *b, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) {
    vf wc = v_load(w + c), xc = v_load(x + c);
    v_store(sum + c, b ? v_fma(wc, xc, v_load(b + c)) : wc * xc);
  }
  for (; c < n; c++) sum[c] = b ? s_fma(w[c], x[c], b[c]) : w[c] * x[c];
}

/* sum += w * x */
INLINE void add_tap(float *sum, const float *w, const float *x, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) {
    v_store(sum + c, v_fma(v_load(w + c), v_load(x + c), v_load(sum + c)));
  }
  for (; c < n; c++) sum[c] = s_fma(w[c], x[c], sum[c]);
}

INLINE void silu_in_place(float *y, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) v_store(y + c, v_silu(v_load(y + c)));
  for (; c < n; c++) y[c] = s_silu(y[c]);
}

static span channels_of(int64_t C, int tid, int nt) {
  span blocks = share(ceil_div(C, 16), tid, nt); /* whole cache lines per thread */
  return (span){blocks.begin * 16, min_of(blocks.end * 16, C)};
}

/* `bias`: of all channels, or NULL. */
static void convolve(const conv_window_args *a, const float *bias, span channels, int rows) {
  int64_t begin = channels.begin, n = channels.end - begin;
  for (int64_t t = 0; t < rows; t++) {
    float *y = a->y + t * a->C + begin;
    first_tap(y, a->w + begin, raw_row(a, t) + begin, bias ? bias + begin : NULL, n);
    for (int64_t tap = 1; tap < a->W1; tap++)
      add_tap(y, a->w + tap * a->C + begin, raw_row(a, t + tap) + begin, n);
    silu_in_place(y, n);
  }
}

static void convolve_and_keep(const conv_window_args *a, const float *bias, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span channels = channels_of(a->C, tid, nt);
  convolve(a, bias, channels, rows);
  /* Ascending, and rows >= 1: an old window row is read before it is overwritten. */
  for (int64_t i = 0; rows > 0 && i < a->W; i++) {
    const float *from = raw_row(a, i + rows);
    float *to = a->window + i * a->C;
    for (int64_t c = channels.begin; c < channels.end; c++) to[c] = from[c];
  }
}

void op_conv_window(const conv_window_args *a, int tid, int nt) {
  convolve_and_keep(a, NULL, tid, nt);
}

void op_conv_biased(const conv_biased_args *b, int tid, int nt) {
  conv_window_args a = {.u = b->u,
                        .w = b->w,
                        .window = b->window,
                        .cursor = b->cursor,
                        .y = b->y,
                        .T = b->T,
                        .C = b->C,
                        .W1 = b->W1,
                        .W = b->W,
                        .u_stride = b->u_stride};
  convolve_and_keep(&a, b->b, tid, nt);
}

void op_conv_verify(const conv_verify_args *v, int tid, int nt) {
  conv_window_args a = {.u = v->u,
                        .w = v->w,
                        .window = (float *)v->window,
                        .cursor = v->cursor,
                        .y = v->y,
                        .T = v->T,
                        /* the window is only read */
                        .C = v->C,
                        .W1 = v->W1,
                        .W = v->W,
                        .u_stride = v->u_stride};
  convolve(&a, NULL, channels_of(a.C, tid, nt), rows_of(a.cursor, a.T));
}
