// rope.cu - head norms, rotary positions, and the new rows of the caches.
//
// Contract: per row t and head, from u = [per query head: q, gate | k | v]: q = rope(norm(q)),
//           keys[position + t] = rope(norm(k)), values[position + t] = v. norm(x) = x
//           rsqrt(mean(x^2) + eps) w. Dims j and j + R2, j < R2, turn by the angle (position + t -
//           shift) * inv_freq[j]; dims from 2 R2 on pass.
// Shapes:   u [T, 2 Nq D + 2 Nk D], q_norm and k_norm [D], inv_freq [R2], q [T, Nq, D], float; keys
//           and values [Nk, S, D].
// Order:    lane l sums elements l, l + 32, ... in ascending order, then warp_sum.
// Launch:   grid ((Nq + 2 Nk) / 4, T), a warp per head.
#include "flashrt.cuh"

constexpr int PER_LANE = ceil_div(HEAD_DIM, 32);

#if CACHE_F32
typedef float cache_t;
DEVICE cache_t to_cache(float x) { return x; }
#else
typedef uint16_t cache_t;
DEVICE cache_t to_cache(float x) { return bf16_round(x); }
#endif

// Norm and rotation of one head; `head` is the warp's own shared memory.
DEVICE void turn(float* head, const float* x, const float* w, const rope_append_args& a,
                 int position, int lane) {
  float v[PER_LANE], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    v[i] = c < HEAD_DIM ? x[c] : 0.0f;
    sum = fmaf(v[i], v[i], sum);
  }
  float scale = rsqrt_f32(warp_sum(sum) / (float)HEAD_DIM + a.eps);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c < HEAD_DIM) head[c] = v[i] * scale * w[c];
  }
  __syncwarp();
  for (int j = lane; j < a.R2; j += 32) {
    float sine, cosine, first = head[j], second = head[j + a.R2];
    sincos_f32((float)(position - a.shift) * a.inv_freq[j], sine, cosine);
    head[j] = first * cosine - second * sine;
    head[j + a.R2] = second * cosine + first * sine;
  }
  __syncwarp();
}

KERNEL(128) rope_append(ARGS rope_append_args a) {
  begin();
  __shared__ float heads[4][HEAD_DIM];
  int t = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5,
      unit = blockIdx.x * 4 + warp;
  if (t >= a.cursor[CURSOR_ROWS] || unit >= a.Nq + 2 * a.Nk) return;
  int position = a.cursor[CURSOR_POSITION] + t;
  const float* u = a.u + (size_t)t * (2 * a.Nq + 2 * a.Nk) * HEAD_DIM;
  float* head = heads[warp];
  if (unit < a.Nq) {
    turn(head, u + 2 * unit * HEAD_DIM, a.q_norm, a, position, lane);
    float* q = a.q + ((size_t)t * a.Nq + unit) * HEAD_DIM;
    for (int c = lane; c < HEAD_DIM; c += 32) q[c] = head[c];
    return;
  }
  bool is_key = unit < a.Nq + a.Nk;
  int h = unit - a.Nq - (is_key ? 0 : a.Nk);
  const float* x = u + (a.Nq + unit) * HEAD_DIM;
  cache_t* row = (cache_t*)(is_key ? a.keys : a.values) + ((size_t)h * a.S + position) * HEAD_DIM;
  if (is_key) {
    turn(head, x, a.k_norm, a, position, lane);
    x = head;
  }
  for (int c = lane; c < HEAD_DIM; c += 32) row[c] = to_cache(x[c]);
}
