// silu_norm.cu - the norm of Mamba-2: the gate first.
//
// Contract: v = o silu(z); y = v rsqrt(mean(v^2) + eps) w, the mean over each of `groups` equal parts
//           of a row; rows at or beyond cursor.rows are left alone.
// Shapes:   o [T, C] and z [T, C] (strided) float, w [C] float, y [T, C] activations.
// Order:    thread i sums elements i, i + THREADS, ... in ascending order, then block_sum. Fixed by
//           C / groups alone.
// Launch:   grid (groups, T), the part in registers: VALUES * THREADS >= C / groups. z is strided by
//           any number, so elements are read one by one, next to each other in a warp.
#include "flashrt.cuh"

KERNEL(THREADS) silu_rmsnorm(ARGS silu_rmsnorm_args launch) {
  OPEN_RUN(silu_rmsnorm);
  begin();
  int t = blockIdx.y, size = a.C / a.groups, first = blockIdx.x * size;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  const float* o = a.o + (size_t)t * a.C + first;
  const float* z = a.z + (size_t)t * a.z_stride + first;
  act_t* y = (act_t*)a.y + (size_t)t * a.C + first;
  float v[VALUES], sum = 0.0f;
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    int c = j * THREADS + (int)threadIdx.x;
    v[j] = c < size ? o[c] * silu(z[c]) : 0.0f;
    sum = fmaf(v[j], v[j], sum);
  }
  float scale = rsqrt_f32(block_sum<THREADS / 32>(sum) / (float)size + a.eps);
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    int c = j * THREADS + (int)threadIdx.x;
    if (c < size) y[c] = to_act(v[j] * scale * a.w[first + c]);
  }
}
