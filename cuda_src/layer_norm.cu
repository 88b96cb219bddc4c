// layer_norm.cu - layer_norm, add_layer_norm: rows to mean 0 and variance 1, then scaled and moved.
//
// Contract: y = (x - mean) / sqrt(variance + eps) * w + b per row; add_layer_norm first does x += r,
//           and leaves rows at or beyond cursor.rows alone.
// Shapes:   x, r, y [T, C], y of add_layer_norm activations, w, b [C].
// Order:    thread i sums elements i, i + THREADS, ... in ascending order, then block_sum; so the mean,
//           then the squares of what is left. Fixed by C alone.
// Launch:   a block per row, in registers: EACH * THREADS >= C.
#include "flashrt.cuh"

// The thread's elements of a row, normed; `row` holds them, 0 beyond C.
DEVICE void normalize(float (&row)[EACH], float sum, int C, float eps) {
  float mean = block_sum<THREADS / 32>(sum) / (float)C, squares = 0.0f;
  __syncthreads();  // all have read the sums: there is one place for them
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    row[j] = row[j] - mean;
    if (j * THREADS + threadIdx.x < C) squares = fmaf(row[j], row[j], squares);
  }
  float scale = rsqrt_f32(block_sum<THREADS / 32>(squares) / (float)C + eps);
#pragma unroll
  for (int j = 0; j < EACH; j++) row[j] = row[j] * scale;
}

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
  normalize(row, sum, a.C, a.eps);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int c = j * THREADS + threadIdx.x;
    if (c < a.C) y[c] = fmaf(row[j], a.w[c], a.b[c]);
  }
}

KERNEL(THREADS) add_layer_norm(ARGS add_layer_norm_args launch) {
  OPEN_RUN(add_layer_norm);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  float* x = a.x + (size_t)t * a.C;
  const float* r = a.r + (size_t)t * a.C;
  act_t* y = (act_t*)a.y + (size_t)t * a.C;
  float row[EACH], sum = 0.0f;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int c = j * THREADS + threadIdx.x;
    row[j] = c < a.C ? x[c] + r[c] : 0.0f;
    if (c < a.C) x[c] = row[j];
    sum = sum + row[j];
  }
  normalize(row, sum, a.C, a.eps);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int c = j * THREADS + threadIdx.x;
    if (c < a.C) y[c] = to_act(fmaf(row[j], a.w[c], a.b[c]));
  }
}
