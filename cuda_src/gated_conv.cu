// gated_conv.cu - a short causal depthwise convolution between two gates.
//
// Contract: y[t] = c[t] * (sum_j w[j] z[t - W + j] + bias) with z = window ++ b * x, W = TAPS - 1;
//           then the window becomes the last W valid rows of z. With BIASED = 0 nothing is added,
//           and bias is not read.
// Shapes:   u [T, 3C] in columns [b | c | x], w [TAPS, C] oldest first, bias [C], window [W, C], all
//           float; y [T, C] activations.
// Order:    b * x is rounded before a tap meets it, as it is in the window; taps in ascending order,
//           one fma each; then the bias, then c.
// Launch:   grid (C / 128, T / ROWS_PER_BLOCK), a thread per channel. Blocks of the first rows are
//           the only ones that read the window, so they also write it.
#include "flashrt.cuh"

constexpr int W = TAPS - 1;
static_assert(W <= ROWS_PER_BLOCK, "only the first block may read the window");

// Row t of z in channel c; negative ones are rows of the window.
DEVICE float gated_row(const gated_conv_args& a, int t, int c) {
  if (t < 0) return a.window[(size_t)(W + t) * a.C + c];
  const float* u = a.u + (size_t)t * 3 * a.C + c;
  return u[0] * u[2 * (size_t)a.C];
}

KERNEL(128) gated_conv(ARGS gated_conv_args launch) {
  OPEN_RUN(gated_conv);
  begin();
  int c = blockIdx.x * 128 + threadIdx.x, first = blockIdx.y * ROWS_PER_BLOCK,
      rows = a.cursor[CURSOR_ROWS];
  if (c >= a.C || first >= rows) return;
  float w[TAPS], z[TAPS];  // z: the rows under the taps
#pragma unroll
  for (int j = 0; j < TAPS; j++) w[j] = a.w[(size_t)j * a.C + c];
#pragma unroll
  for (int j = 0; j < W; j++) z[j] = gated_row(a, first - W + j, c);
  if (first == 0) {
    float kept[W];  // read before any is written: rows of the old window may stay
#pragma unroll
    for (int j = 0; j < W; j++) kept[j] = gated_row(a, rows - W + j, c);
#pragma unroll
    for (int j = 0; j < W; j++) a.window[(size_t)j * a.C + c] = kept[j];
  }
  float bias = BIASED ? a.bias[c] : 0.0f;
  int last = min(first + ROWS_PER_BLOCK, rows);
#pragma unroll 4
  for (int t = first; t < last; t++) {
    z[W] = gated_row(a, t, c);
    float sum = w[0] * z[0];
#pragma unroll
    for (int j = 1; j < TAPS; j++) sum = fmaf(w[j], z[j], sum);
    if (BIASED) sum = sum + bias;
    float gate = a.u[((size_t)t * 3 + 1) * a.C + c];
    ((act_t*)a.y)[(size_t)t * a.C + c] = to_act(gate * sum);
#pragma unroll
    for (int j = 0; j < W; j++) z[j] = z[j + 1];
  }
}
