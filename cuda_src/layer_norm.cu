// layer_norm.cu - layer_norm: rows to mean 0 and variance 1, then scaled and moved.
//
// Contract: y = (x - mean) / sqrt(variance + eps) * w + b per row.
// Shapes:   x, y [T, C], w, b [C].
// Order:    thread i sums elements i, i + THREADS, ... in ascending order, then block_sum; so the mean,
//           then the squares of what is left. Fixed by C alone.
// Launch:   a block per row, in registers: EACH * THREADS >= C.
#include "flashrt.cuh"

KERNEL(THREADS) layer_norm(ARGS layer_norm_args launch) {
  OPEN_RUN(layer_norm);
  begin();
  const float* x = a.x + (size_t)blockIdx.x * a.C;
  float* y = a.y + (size_t)blockIdx.x * a.C;
  float row[EACH], sum = 0.0f;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int c = j * THREADS + threadIdx.x;
    row[j] = c < a.C ? x[c] : 0.0f;
    sum = sum + row[j];
  }
  float mean = block_sum<THREADS / 32>(sum) / (float)a.C, squares = 0.0f;
  __syncthreads();  // all have read the sums: there is one place for them
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    row[j] = row[j] - mean;
    if (j * THREADS + threadIdx.x < a.C) squares = fmaf(row[j], row[j], squares);
  }
  float scale = rsqrt_f32(block_sum<THREADS / 32>(squares) / (float)a.C + a.eps);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int c = j * THREADS + threadIdx.x;
    if (c < a.C) y[c] = fmaf(row[j] * scale, a.w[c], a.b[c]);
  }
}
