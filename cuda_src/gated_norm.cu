// gated_norm.cu - the norm after the delta rule.
//
// Contract: y = w (o rsqrt(mean(o^2) + eps)) silu(z), per head over VALUE_DIM; w is plain.
// Shapes:   o [T, C] and z [T, C] (strided) float, w [VALUE_DIM] float, y [T, C] activations; C =
//           heads * VALUE_DIM.
// Order:    lane l sums elements l, l + 32, ... in ascending order, then warp_sum.
// Launch:   grid (heads / 4, T), a warp per head.
#include "flashrt.cuh"

constexpr int PER_LANE = ceil_div(VALUE_DIM, 32);

KERNEL(128) gated_rmsnorm(ARGS gated_rmsnorm_args launch) {
  OPEN_RUN(gated_rmsnorm);
  begin();
  int t = blockIdx.y, lane = threadIdx.x & 31, head = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (t >= a.cursor[CURSOR_ROWS] || head * VALUE_DIM >= a.C) return;
  const float* o = a.o + (size_t)t * a.C + head * VALUE_DIM;
  const float* z = a.z + (size_t)t * a.z_stride + head * VALUE_DIM;
  act_t* y = (act_t*)a.y + (size_t)t * a.C + head * VALUE_DIM;
  float v[PER_LANE], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    v[i] = c < VALUE_DIM ? o[c] : 0.0f;
    sum = fmaf(v[i], v[i], sum);
  }
  float scale = rsqrt_f32(warp_sum(sum) / (float)VALUE_DIM + a.eps);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c < VALUE_DIM) y[c] = to_act(a.w[c] * (v[i] * scale) * silu(z[c]));
  }
}
