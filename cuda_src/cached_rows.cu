// cached_rows.cu - rope_rows and append_rows: rotation alone, and new rows of the caches alone.
//
// Contract: rope_rows:   per valid row t and head, y = x with dims j and j + R2, j < R2, turned by the
//                        angle t inv_freq[j], where PLACED (position + t) inv_freq[j]; dims from 2 R2
//                        on pass.
//           append_rows: keys[position + t] = k[t], values[position + t] = v[t], of valid rows.
// Shapes:   x [T, N * D] strided, inv_freq [R2], y [T, N, D], k and v [T, Nk * D] strided, float; keys
//           and values [Nk, S, D], float with CACHE_F32, else bfloat16.
// Order:    no sums.
// Launch:   rope_rows: grid (N, T), a block per head; append_rows: grid (Nk, T). 64 threads.
#include "flashrt.cuh"

constexpr int THREADS = 64;

#if CACHE_F32
typedef float cache_t;
DEVICE cache_t to_cache(float x) { return x; }
#else
typedef uint16_t cache_t;
DEVICE cache_t to_cache(float x) { return bf16_round(x); }
#endif

KERNEL(THREADS) append_rows(ARGS append_rows_args launch) {
  OPEN_RUN(append_rows);
  begin();
  int h = blockIdx.x, t = blockIdx.y;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  size_t row = ((size_t)h * a.S + a.cursor[CURSOR_POSITION] + t) * a.D;
  const float *k = a.k + (size_t)t * a.k_stride + h * a.D,
              *v = a.v + (size_t)t * a.v_stride + h * a.D;
  for (int d = threadIdx.x; d < a.D; d += THREADS) {
    ((cache_t*)a.keys)[row + d] = to_cache(k[d]);
    ((cache_t*)a.values)[row + d] = to_cache(v[d]);
  }
}

KERNEL(THREADS) rope_rows(ARGS rope_rows_args launch) {
  OPEN_RUN(rope_rows);
  begin();
  int h = blockIdx.x, t = blockIdx.y;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  const float* x = a.x + (size_t)t * a.x_stride + h * a.D;
  float* y = a.y + ((size_t)t * a.N + h) * a.D;
  int place = t + (a.placed ? a.cursor[CURSOR_POSITION] : 0);
  for (int j = threadIdx.x; j < a.R2; j += THREADS) {
    float sine, cosine, first = x[j], second = x[j + a.R2];
    sincos_f32((float)place * a.inv_freq[j], sine, cosine);
    y[j] = first * cosine - second * sine;
    y[j + a.R2] = second * cosine + first * sine;
  }
  for (int d = 2 * a.R2 + threadIdx.x; d < a.D; d += THREADS) y[d] = x[d];
}
