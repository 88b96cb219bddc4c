// dense.cu - dense, dense_add, flow_step: float32 layers of few rows.
//
// Contract: dense:     y = f(x w^T + b), f the identity, silu or relu.
//           dense_add: y += x w^T + b.
//           flow_step: x += (z w^T + b) / steps in rows of the chunk whose mask is 0;
//                      cursor.plan_steps_left -= 1.
// Shapes:   x [T, K], w [N, K] in C order, b [N], y [T, N]; flow_step: z [1, K], x [N], mask [H], N
//           = H rows of actions.
// Order:    lane i of a warp takes vectors i, i + 32, ... of WIDTH elements in ascending order, one
//           chain of fma; then warp_sum, then the bias. WIDTH is 4 where K allows it: fixed by K
//           alone.
// Launch:   grid (N / 4, T), a warp per output. Plans are chains of such launches, so what counts
//           is latency: the first AHEAD vectors of the weights are on their way before the kernel
//           waits for its predecessor.
#include "flashrt.cuh"

constexpr int WARPS = 4;

struct Vector {
  float v[WIDTH];
};

DEVICE Vector load(const float* p) {
  Vector out;
  if constexpr (WIDTH == 4) {
    float4 q = *reinterpret_cast<const float4*>(p);
    out.v[0] = q.x;
    out.v[WIDTH - 3] = q.y;
    out.v[WIDTH - 2] = q.z;
    out.v[WIDTH - 1] = q.w;
  } else {
    out.v[0] = *p;
  }
  return out;
}

DEVICE float fma_into(const Vector& w, const Vector& x, float sum) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) sum = fmaf(w.v[i], x.v[i], sum);
  return sum;
}

struct Early {
  Vector v[AHEAD];
};

DEVICE const float* row_of(const float* w, int n, int N, int K) {
  return w + (size_t)min(n, N - 1) * K;
}

// The first weights of row n: constant, so they are on their way while the predecessor ends.
DEVICE Early first_weights(const float* w, int n, int N, int K) {
  int first = WIDTH * (threadIdx.x & 31);
  const float* row = row_of(w, n, N, K);
  Early early;
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (first + i * 32 * WIDTH < K) early.v[i] = load(row + first + i * 32 * WIDTH);
  return early;
}

// Row n of w times the row x. Every thread of the launch calls it.
DEVICE float dot(const Early& early, const float* w, const float* x, int n, int N, int K) {
  int first = WIDTH * (threadIdx.x & 31);
  const float* row = row_of(w, n, N, K);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (first + i * 32 * WIDTH < K)
      sum = fma_into(early.v[i], load(x + first + i * 32 * WIDTH), sum);
  for (int k = first + AHEAD * 32 * WIDTH; k < K; k += 32 * WIDTH)
    sum = fma_into(load(row + k), load(x + k), sum);
  return warp_sum(sum);
}

DEVICE int output() { return blockIdx.x * WARPS + (threadIdx.x >> 5); }
DEVICE bool is_writer(int n, int N) { return (threadIdx.x & 31) == 0 && n < N; }

DEVICE float activated(float y, int activation) {
  if (activation == ACTIVATION_SILU) return silu(y);
  return activation == ACTIVATION_RELU && y < 0.0f ? 0.0f : y;
}

KERNEL(32 * WARPS) dense(ARGS dense_args launch) {
  OPEN_RUN(dense);
  int n = output(), t = blockIdx.y;
  Early early = first_weights(a.w, n, a.N, a.K);
  begin();
  float sum = dot(early, a.w, a.x + (size_t)t * a.K, n, a.N, a.K);
  if (!is_writer(n, a.N)) return;
  a.y[(size_t)t * a.N + n] = activated(sum + a.b[n], a.activation);
}

KERNEL(32 * WARPS) dense_add(ARGS dense_add_args launch) {
  OPEN_RUN(dense_add);
  int n = output(), t = blockIdx.y;
  Early early = first_weights(a.w, n, a.N, a.K);
  begin();
  float sum = dot(early, a.w, a.x + (size_t)t * a.K, n, a.N, a.K);
  if (!is_writer(n, a.N)) return;
  float* y = a.y + (size_t)t * a.N + n;
  *y = *y + (sum + a.b[n]);
}

KERNEL(32 * WARPS) flow_step(ARGS flow_step_args launch) {
  OPEN_RUN(flow_step);
  int n = output();
  Early early = first_weights(a.w, n, a.N, a.K);
  begin();
  float sum = dot(early, a.w, a.z, n, a.N, a.K);
  if (blockIdx.x == 0 && threadIdx.x == 0) a.cursor[POLICY_PLAN_STEPS_LEFT] -= 1;
  if (!is_writer(n, a.N)) return;
  if (a.mask[n / (a.N / a.H)] == 0.0f) a.x[n] = a.x[n] + (sum + a.b[n]) / (float)a.steps;
}
