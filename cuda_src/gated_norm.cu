// gated_norm.cu - the norm after the delta rule.
//
// Contract: y = w (o rsqrt(mean(o^2) + eps)) silu(z), per head over VALUE_DIM; w is plain.
// Shapes:   o [T, C] and z [T, C] (strided) float, w [VALUE_DIM] float, y [T, C] activations; C =
//           heads * VALUE_DIM.
// Order:    lane l sums elements l, l + 32, ... in ascending order, then warp_sum.
// Launch:   grid (heads / 4, T), a warp per head.
#include "flashrt.cuh"
#include "delta.cuh"

KERNEL(128) gated_rmsnorm(ARGS gated_rmsnorm_args launch) {
  OPEN_RUN(gated_rmsnorm);
  begin();
  int t = blockIdx.y, lane = threadIdx.x & 31, head = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (t >= a.cursor[CURSOR_ROWS] || head * VALUE_DIM >= a.C) return;
  const float* o = a.o + (size_t)t * a.C + head * VALUE_DIM;
  const float* z = a.z + (size_t)t * a.z_stride + head * VALUE_DIM;
  act_t* y = (act_t*)a.y + (size_t)t * a.C + head * VALUE_DIM;
  norm_head<VALUE_DIM>(y, o, z, a.w, a.eps, lane);
}
