// conv.cu - causal depthwise convolution over a window of earlier rows.
//
// Contract: y[t] = silu(sum_j w[j] x[t - W + j]) with x = window ++ u, W = TAPS - 1. conv_window:
//           then the window becomes the last W valid rows of x, raw. conv_verify: the window stays
//           as it is. conv_biased: as conv_window, of b + the sum.
// Shapes:   u [T, C] (strided), w [TAPS, C] oldest first, b [C], window [W, C], y [T, C], all float.
// Order:    taps in ascending order, one fma each.
// Launch:   grid (C / 128, T / ROWS_PER_BLOCK), a thread per channel. Blocks of the first rows are
//           the only ones that read the window, so they also write it.
#include "flashrt.cuh"
#include "delta.cuh"

constexpr int W = TAPS - 1;

// The block's rows of y; KEEPS: and the window after the last valid row. Args: of any of the
// kernels, fields by the same names.
template <bool KEEPS, bool BIASED = false, class Args>
DEVICE void convolve_rows(const Args& a) {
  int c = blockIdx.x * 128 + threadIdx.x, first = blockIdx.y * ROWS_PER_BLOCK,
      rows = a.cursor[CURSOR_ROWS];
  if (c >= a.C || first >= rows) return;
  const float* u = a.u + c;
  float w[TAPS], x[TAPS];  // x: the rows under the taps
#pragma unroll
  for (int j = 0; j < TAPS; j++) w[j] = a.w[(size_t)j * a.C + c];
#pragma unroll
  for (int j = 0; j < W; j++) {
    int t = first - W + j;
    x[j] = t < 0 ? a.window[(size_t)(W + t) * a.C + c] : u[(size_t)t * a.u_stride];
  }
  if constexpr (KEEPS) {
    if (first == 0) keep_window<W>(a, c, rows);
  }
  float b = 0.0f;
  if constexpr (BIASED) b = a.b[c];
  int last = min(first + ROWS_PER_BLOCK, rows);
#pragma unroll 4
  for (int t = first; t < last; t++) {
    x[W] = u[(size_t)t * a.u_stride];
    if constexpr (BIASED) a.y[(size_t)t * a.C + c] = convolve_from(fmaf(w[0], x[0], b), w, x);
    else a.y[(size_t)t * a.C + c] = convolve(w, x);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = x[j + 1];
  }
}

KERNEL(128) conv_window(ARGS conv_window_args launch) {
  OPEN_RUN(conv_window);
  begin();
  convolve_rows<true>(a);
}

KERNEL(128) conv_verify(ARGS conv_verify_args launch) {
  OPEN_RUN(conv_verify);
  begin();
  convolve_rows<false>(a);
}

KERNEL(128) conv_biased(ARGS conv_biased_args launch) {
  OPEN_RUN(conv_biased);
  begin();
  convolve_rows<true, true>(a);
}
