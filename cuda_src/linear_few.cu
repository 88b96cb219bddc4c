// linear_few.cu - y = x W^T for up to 32 tokens: bound by the bytes of W.
//
// Contract: y[t][n] for t < cursor.rows; other rows are neither read nor written.
// Shapes:   x [T, K] activations, w [N, K] as in linear.cuh, y [T, N] float.
// Order:    linear.cuh. Warp w takes slices w, w + WARPS, ...; warp 0 folds them in order through
//           shared memory.
// Launch:   grid (N / 16, T / (8 * TOKEN_TILES)), WARPS warps: few, so that blocks of one
//           multiprocessor overlap, unless there are too few row tiles to fill the device. A warp
//           holds a slice of weights (8 KB), and loads half of the next while it multiplies the
//           other half; the first one it loads before it waits for the kernel that makes x.
#include "flashrt.cuh"
#include "linear.cuh"

// What the registers must leave room for on a multiprocessor: 16 warps, 8 of the widest.
constexpr int THREADS = 32 * WARPS, MIN_BLOCKS = (TOKEN_TILES == 4 ? 8 : 16) / WARPS;
constexpr int HALF_CHUNKS = SLICE_CHUNKS / 2, HALF_VECTORS = 2 * HALF_CHUNKS;

// x[token][k .. k + 7]; zeros beyond the valid rows and beyond K
DEVICE Operand load_x(const act_t* x, bool is_row, int k, int K) {
  constexpr uint4 zero = {0, 0, 0, 0};
#if ALIGNED
  bool is_in = is_row && k < K;
  const uint4* p = reinterpret_cast<const uint4*>(x + k);
#if ACT_PARTS > 1
  return unpack_operand(is_in ? p[0] : zero, is_in ? p[1] : zero);
#else
  return unpack_operand(is_in ? p[0] : zero);
#endif
#else
  act_t v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = is_row && k + i < K ? x[k + i] : 0;
#if ACT_PARTS > 1
  return unpack_operand(make_uint4(v[0], v[1], v[2], v[3]), make_uint4(v[4], v[5], v[6], v[7]));
#else
  return unpack_operand(
      make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16));
#endif
#endif
}

// Weights of chunks [first, first + HALF_CHUNKS) of a row tile; beyond `end` nothing is loaded.
DEVICE void load_half(uint4 (&w)[HALF_VECTORS], const uint4* tile, int first, int end) {
#pragma unroll
  for (int i = 0; i < HALF_VECTORS; i++)
    if (first + i / 2 < end) w[i] = load_stream(tile + (size_t)first * CHUNK_VECTORS + 32 * i);
}

DEVICE void multiply_half(float (&c)[TOKEN_TILES][4], const uint4 (&w)[HALF_VECTORS], int first,
                          int end, const act_t* x, int token, int rows, int t, int K) {
#pragma unroll
  for (int i = 0; i < HALF_CHUNKS; i++) {
    if (first + i >= end) break;
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) {
      bool is_row = token + 8 * j < rows;
      Operand b = load_x(x + (size_t)(is_row ? token + 8 * j : 0) * K, is_row,
                         (first + i) * K_CHUNK + 8 * t, K);
      multiply_step(c[j], w[2 * i], b, 0);
      multiply_step(c[j], w[2 * i + 1], b, 1);
    }
  }
}

KERNEL(THREADS, MIN_BLOCKS) linear_few(ARGS linear_args a) {
  __shared__ __align__(16) float part[2][WARPS][TOKEN_TILES][32][4];  // by turns
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int K = a.K, n_chunks = ceil_div(K, K_CHUNK), n_slices = ceil_div(K, K_SLICE);
  int first_token = blockIdx.y * 8 * TOKEN_TILES;
  const uint4* tile =
      reinterpret_cast<const uint4*>(a.w) + (size_t)blockIdx.x * n_chunks * CHUNK_VECTORS + lane;
  const act_t* x = (const act_t*)a.x;

  uint4 front[HALF_VECTORS], back[HALF_VECTORS];
  // weights do not depend on the predecessor
  load_half(front, tile, warp * SLICE_CHUNKS, n_chunks);
  load_half(back, tile, warp * SLICE_CHUNKS + HALF_CHUNKS, n_chunks);
  begin();
  int rows = a.cursor[CURSOR_ROWS];
  if (first_token >= rows) return;

  float sum[TOKEN_TILES][4] = {};
  for (int s0 = 0; s0 < n_slices; s0 += WARPS) {
    float c[TOKEN_TILES][4] = {};
    int first = (s0 + warp) * SLICE_CHUNKS, next = first + WARPS * SLICE_CHUNKS,
        turn = s0 / WARPS & 1;
    multiply_half(c, front, first, n_chunks, x, first_token + g, rows, t, K);
    load_half(front, tile, next, n_chunks);
    multiply_half(c, back, first + HALF_CHUNKS, n_chunks, x, first_token + g, rows, t, K);
    load_half(back, tile, next + HALF_CHUNKS, n_chunks);
    if (WARPS == 1) {
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++) fold(sum[j], c[j]);
      continue;
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
      *reinterpret_cast<float4*>(part[turn][warp][j][lane]) =
          make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
    // nobody writes this turn's part again before warp 0 has passed the next barrier
    __syncthreads();
    if (warp == 0)
      for (int w = 0; w < min(WARPS, n_slices - s0); w++)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++) fold(sum[j], part[turn][w][j][lane]);
  }
  if (warp != 0) return;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int n = blockIdx.x * 16 + g + 8 * (i >> 1), token = first_token + 8 * j + 2 * t + (i & 1);
      if (token < rows && n < a.N) a.y[(size_t)token * a.N + n] = sum[j][i];
    }
}
