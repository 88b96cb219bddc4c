// attend.cu - attend, attend_patches: attention of rows over all keys, in float32; no cache, no order.
//
// Contract: y = softmax(q k^T / sqrt(D)) v per head of D = C / heads columns; attend_patches: of the
//           cursor's rows among themselves.
// Shapes:   q [T, C], k, v [S, C] with strides of their own, y [T, C], of attend_patches activations.
// Order:    keys in blocks of 32, ascending: lane j has the score of key j of a block, one chain of fma
//           over the head's columns. Weights are relative to the largest score so far, what was summed
//           before is scaled to a new one; lane i adds up column i, i + 32, ... over ascending keys, and
//           the weights of key i of each block, which warp_sum joins at the end. Fixed by S and D alone.
// Launch:   grid (T / WARPS, heads), a warp per row: the rows of a block share its keys and values.
#include "flashrt.cuh"

constexpr int WARPS = 8, KEYS = 32, PITCH = 32 * COLUMNS + 1;

// `put(i, value)` of each column of row blockIdx.x * WARPS + warp; T rows, S keys.
template <typename Args, typename Put>
DEVICE void attend_row(const Args& a, int T, int S, Put put) {
  __shared__ float keys[KEYS][PITCH], values[KEYS][PITCH], queries[WARPS][PITCH];
  int D = a.C / a.heads, head = blockIdx.y * D, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int t = blockIdx.x * WARPS + warp;
  for (int c = lane; c < D; c += 32)
    queries[warp][c] = t < T ? a.q[(size_t)t * a.q_stride + head + c] : 0.0f;
  float scale = rsqrt_f32((float)D), largest = -INF, total = 0.0f, y[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) y[i] = 0.0f;
  for (int first = 0; first < S; first += KEYS) {
    __syncthreads();  // the block before is used up
    for (int j = warp; j < KEYS && first + j < S; j += WARPS) {
      for (int c = lane; c < D; c += 32) {
        keys[j][c] = a.k[(size_t)(first + j) * a.k_stride + head + c];
        values[j][c] = a.v[(size_t)(first + j) * a.v_stride + head + c];
      }
    }
    __syncthreads();
    int n = min(KEYS, S - first);
    float score = -INF;
    if (lane < n) {
      float sum = 0.0f;
      for (int c = 0; c < D; c++) sum = fmaf(queries[warp][c], keys[lane][c], sum);
      score = sum * scale;
    }
    float most = score;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      float other = __shfl_xor_sync(FULL_WARP, most, o);
      most = other > most ? other : most;
    }
    float now = most > largest ? most : largest;
    float by = exp_f32(largest - now), weight = lane < n ? exp_f32(score - now) : 0.0f;
    largest = now;
    total = total * by + weight;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) y[i] = y[i] * by;
    for (int j = 0; j < n; j++) {
      float w = __shfl_sync(FULL_WARP, weight, j);
#pragma unroll
      for (int i = 0; i < COLUMNS; i++)
        if (lane + 32 * i < D) y[i] = fmaf(w, values[j][lane + 32 * i], y[i]);
    }
  }
  total = warp_sum(total);
  if (t >= T) return;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
    if (lane + 32 * i < D) put((size_t)t * a.C + head + lane + 32 * i, y[i] / total);
}

KERNEL(32 * WARPS) attend(ARGS attend_args launch) {
  OPEN_RUN(attend);
  begin();
  attend_row(a, a.T, a.S, [&](size_t at, float y) { a.y[at] = y; });
}

KERNEL(32 * WARPS) attend_patches(ARGS attend_patches_args launch) {
  OPEN_RUN(attend_patches);
  begin();
  int rows = a.cursor[CURSOR_ROWS];
  if (blockIdx.x * WARPS >= rows) return;
  attend_row(a, rows, rows, [&](size_t at, float y) { ((act_t*)a.y)[at] = to_act(y); });
}
