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
#include "delta.cuh"

KERNEL(128) delta_gates(ARGS delta_gates_args launch) {
  OPEN_RUN(delta_gates);
  begin();
  int t = blockIdx.y, lane = threadIdx.x & 31, unit = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int n_vectors = 2 * a.key_heads;
  if (unit < n_vectors) {
    float factor = unit < a.key_heads ? rsqrt_f32((float)KEY_DIM) : 1.0f;
    normalize<KEY_DIM>(a.y + (size_t)t * a.C + unit * KEY_DIM, lane, factor);
    return;
  }
  int h = (unit - n_vectors) * 32 + lane;
  if (h >= a.Hv) return;
  a.decay[(size_t)t * a.Hv + h] =
      decay_of(a.a_log[h], a.a[(size_t)t * a.a_stride + h], a.dt_bias[h]);
  a.beta[(size_t)t * a.Hv + h] = sigmoid(a.b[(size_t)t * a.b_stride + h]);
}
