// attend.cu - attend: attention of rows over all keys, in float32; no cache, no order.
//
// Contract: y = softmax(q k^T / sqrt(D)) v per head of D = C / heads columns.
// Shapes:   q [T, C], k, v [S, C] with strides of their own, y [T, C].
// Order:    keys in blocks of 32, ascending: lane j has the score of key j of a block, one chain of fma
//           over the head's columns. Weights are relative to the largest score so far, what was summed
//           before is scaled to a new one; lane i adds up column i, i + 32, ... over ascending keys, and
//           the weights of key i of each block, which warp_sum joins at the end. Fixed by S and D alone.
// Launch:   grid (T / WARPS, heads), a warp per row: the rows of a block share its keys and values.
#include "flashrt.cuh"

constexpr int WARPS = 8, KEYS = 32, PITCH = 32 * COLUMNS + 1;

KERNEL(32 * WARPS) attend(ARGS attend_args launch) {
  OPEN_RUN(attend);
  begin();
  __shared__ float keys[KEYS][PITCH], values[KEYS][PITCH], queries[WARPS][PITCH];
  int D = a.C / a.heads, head = blockIdx.y * D, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int t = blockIdx.x * WARPS + warp;
  for (int c = lane; c < D; c += 32)
    queries[warp][c] = t < a.T ? a.q[(size_t)t * a.q_stride + head + c] : 0.0f;
  float scale = rsqrt_f32((float)D), largest = -INF, total = 0.0f, y[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) y[i] = 0.0f;
  for (int first = 0; first < a.S; first += KEYS) {
    __syncthreads();  // the block before is used up
    for (int j = warp; j < KEYS && first + j < a.S; j += WARPS) {
      for (int c = lane; c < D; c += 32) {
        keys[j][c] = a.k[(size_t)(first + j) * a.k_stride + head + c];
        values[j][c] = a.v[(size_t)(first + j) * a.v_stride + head + c];
      }
    }
    __syncthreads();
    int n = min(KEYS, a.S - first);
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
  if (t >= a.T) return;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
    if (lane + 32 * i < D) a.y[(size_t)t * a.C + head + lane + 32 * i] = y[i] / total;
}
