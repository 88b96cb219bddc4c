// delta_gates.cu - what the delta rule takes besides values: unit keys and queries, decay and write
// strength.
//
// Contract: in place in columns [0, 2 * key_heads * KEY_DIM) of y, per head: q = l2norm(q) /
//           sqrt(KEY_DIM), k = l2norm(k), l2norm(x) = x rsqrt(sum(x^2) + 1e-6); decay =
//           exp(-exp(a_log) softplus(a + dt_bias)); beta = sigmoid(b).
// Shapes:   y [T, C], a and b [T, Hv] (strided), a_log and dt_bias [Hv], decay and beta [T, Hv],
//           all float.
// Order:    lane l sums elements l, l + 32, ... in ascending order, then warp_sum.
// Launch:   grid (units / 4, T), a warp per unit: first 2 * key_heads vectors, then value heads by
//           32.
#include "flashrt.cuh"

constexpr int PER_LANE = ceil_div(KEY_DIM, 32);

DEVICE void normalize(float* x, int lane, float factor) {
  float v[PER_LANE], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    v[i] = c < KEY_DIM ? x[c] : 0.0f;
    sum = fmaf(v[i], v[i], sum);
  }
  float scale = rsqrt_f32(warp_sum(sum) + 1e-6f) * factor;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c < KEY_DIM) x[c] = v[i] * scale;
  }
}

KERNEL(128) delta_gates(ARGS delta_gates_args launch) {
  OPEN_RUN(delta_gates);
  begin();
  int t = blockIdx.y, lane = threadIdx.x & 31, unit = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int n_vectors = 2 * a.key_heads;
  if (unit < n_vectors) {
    float factor = unit < a.key_heads ? rsqrt_f32((float)KEY_DIM) : 1.0f;
    normalize(a.y + (size_t)t * a.C + unit * KEY_DIM, lane, factor);
    return;
  }
  int h = (unit - n_vectors) * 32 + lane;
  if (h >= a.Hv) return;
  float rate = exp_f32(a.a_log[h]) * softplus(a.a[(size_t)t * a.a_stride + h] + a.dt_bias[h]);
  a.decay[(size_t)t * a.Hv + h] = exp_f32(-rate);
  a.beta[(size_t)t * a.Hv + h] = sigmoid(a.b[(size_t)t * a.b_stride + h]);
}
