// experts.cu - what goes on around the products with experts.
//
// experts_sum: y = sum over j of gates[t, j] products[t, j] for valid rows: one fma each, from 0, in
//              ascending j. products [T, P, H], gates [T, P], y [T, H] float. Grid (H / 256, T).
// add_gated:   y += sigmoid(gate[t]) x for valid rows, or with GATED = 0 y += x; y, x [T, H], gate
//              [T, 1] float, strided. Grid (H / 256, T).
#include "flashrt.cuh"

KERNEL(256) experts_sum(ARGS experts_out_args launch) {
  OPEN_RUN(experts_out);
  begin();
  int t = blockIdx.y, n = blockIdx.x * 256 + threadIdx.x;
  if (t >= a.cursor[CURSOR_ROWS] || n >= a.H) return;
  const float* product = a.products + (size_t)t * a.P * a.H + n;
  const float* gate = a.gates + (size_t)t * a.P;
  float sum = 0.0f;
#pragma unroll 4
  for (int j = 0; j < a.P; j++) sum = fmaf(gate[j], product[(size_t)j * a.H], sum);
  a.y[(size_t)t * a.H + n] = sum;
}

KERNEL(256) add_gated(ARGS add_gated_args launch) {
  OPEN_RUN(add_gated);
  begin();
  int t = blockIdx.y, n = blockIdx.x * 256 + threadIdx.x;
  if (t >= a.cursor[CURSOR_ROWS] || n >= a.H) return;
  float gate = GATED ? sigmoid(a.gate[(size_t)t * a.gate_stride]) : 1.0f;
  size_t i = (size_t)t * a.H + n;
  a.y[i] = a.y[i] + gate * a.x[i];
}
