// rope.cu - head norms, rotary positions, and the new rows of the caches.
//
// Contract: per row t and head, from u = [per query head: q, gate | k | v] (GATED) or [q | k | v]:
//           q = rope(norm(q)), keys[position + t] = rope(norm(k)), values[position + t] = v.
//           norm(x) = x rsqrt(mean(x^2) + eps) w (NORMED) or x. Dims j and j + R2, j < R2, turn by
//           the angle (position + t - shift) * inv_freq[j] and are multiplied by the magnitude;
//           dims from 2 R2 on pass. rope_placed: by places[t, axis] in place of position + t, axis 1
//           where j % 3 = 1 and j < 3 by_rows, 2 where j % 3 = 2 and j < 3 by_columns, else 0.
// Shapes:   u [T, U], q_norm and k_norm [D], inv_freq [R2], q [T, Nq, D], float; keys
//           and values [Nk, S, D].
//           With CACHE_CODES, keys and values are codes, and key_scales and value_scales [Nk, S]
//           float; else those are not used.
// Order:    lane l sums elements l, l + 32, ... in ascending order, then warp_sum.
// Launch:   grid ((Nq + 2 Nk) / 4, T), a warp per head.
#include "flashrt.cuh"

constexpr int PER_LANE = ceil_div(HEAD_DIM, 32);
constexpr int QUERY_PITCH = (GATED ? 2 : 1) * HEAD_DIM;  // from one query to the next

#if CACHE_CODES
#include "codes.cuh"
typedef uint8_t cache_t;
#elif CACHE_F32
typedef float cache_t;
DEVICE cache_t to_cache(float x) { return x; }
#else
typedef uint16_t cache_t;
DEVICE cache_t to_cache(float x) { return bf16_round(x); }
#endif

// Norm and rotation of one head; `head` is the warp's own shared memory, `place(j)` what pair j turns
// by.
template <typename Args, typename Place>
DEVICE void turn(float* head, const float* x, const float* w, const Args& a, Place place,
                 int lane) {
  float v[PER_LANE], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    v[i] = c < HEAD_DIM ? x[c] : 0.0f;
    sum = fmaf(v[i], v[i], sum);
  }
#if NORMED
  float scale = rsqrt_f32(warp_sum(sum) / (float)HEAD_DIM + a.eps);
#endif
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c >= HEAD_DIM) continue;
#if NORMED
    head[c] = v[i] * scale * w[c];
#else
    head[c] = v[i];
#endif
  }
  __syncwarp();
  for (int j = lane; j < a.R2; j += 32) {
    float sine, cosine, first = head[j], second = head[j + a.R2];
    sincos_f32((float)(place(j) - a.shift) * a.inv_freq[j], sine, cosine);
    sine *= a.magnitude;
    cosine *= a.magnitude;
    head[j] = first * cosine - second * sine;
    head[j + a.R2] = second * cosine + first * sine;
  }
  __syncwarp();
}

// The head of this warp; row t is at `position`.
template <typename Args, typename Place>
DEVICE void append(const Args& a, int t, int position, Place place) {
  __shared__ float heads[4][HEAD_DIM];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, unit = blockIdx.x * 4 + warp;
  if (unit >= a.Nq + 2 * a.Nk) return;
  const float* u = a.u + (size_t)t * a.U;
  float* head = heads[warp];
  if (unit < a.Nq) {
    turn(head, u + unit * QUERY_PITCH, a.q_norm, a, place, lane);
    float* q = a.q + ((size_t)t * a.Nq + unit) * HEAD_DIM;
    for (int c = lane; c < HEAD_DIM; c += 32) q[c] = head[c];
    return;
  }
  bool is_key = unit < a.Nq + a.Nk;
  int h = unit - a.Nq - (is_key ? 0 : a.Nk);
  const float* x = u + a.Nq * QUERY_PITCH + (unit - a.Nq) * HEAD_DIM;
  cache_t* row = (cache_t*)(is_key ? a.keys : a.values) + ((size_t)h * a.S + position) * HEAD_DIM;
  if (is_key) {
    turn(head, x, a.k_norm, a, place, lane);
    x = head;
  }
#if CACHE_CODES
  float largest = 0.0f;
  for (int c = lane; c < HEAD_DIM; c += 32) {
    float size = fabsf(x[c]);
    largest = size > largest || !(size <= 3.402823466e38f) ? size : largest;
    if (!(largest <= 3.402823466e38f)) break;
  }
  float scale = scale_of_row(largest);
  float* scales = (float*)(is_key ? a.key_scales : a.value_scales);
  if (lane == 0) scales[(size_t)h * a.S + position] = scale;
  for (int c = lane; c < HEAD_DIM; c += 32) row[c] = to_code(x[c], scale);
#else
  for (int c = lane; c < HEAD_DIM; c += 32) row[c] = to_cache(x[c]);
#endif
}

KERNEL(128) rope_append(ARGS rope_append_args launch) {
  OPEN_RUN(rope_append);
  begin();
  int t = blockIdx.y, position = a.cursor[CURSOR_POSITION] + t;
  if (t < a.cursor[CURSOR_ROWS]) append(a, t, position, [&](int) { return position; });
}

KERNEL(128) rope_placed(ARGS rope_placed_args launch) {
  OPEN_RUN(rope_placed);
  begin();
  int t = blockIdx.y;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  const int* places = a.places + 3 * t;
  append(a, t, a.cursor[CURSOR_POSITION] + t, [&](int j) {
    int axis = j % 3;
    return places[axis && j < 3 * (axis == 1 ? a.by_rows : a.by_columns) ? axis : 0];
  });
}
