// linear_many.cu - y = x W^T for many tokens: bound by the tensor cores.
//
// Contract: y[t][n] for t < cursor.rows; other rows are neither read nor written.
// Shapes:   x [T, K] activations, w [N, K] as in linear.cuh, y [T, N] float.
// Order:    linear.cuh: a slice in one accumulator, the fold of the slices before it in a second
//           one.
// Launch:   block = WARPS_N x WARPS_T warps, a warp = ROW_TILES x TOKEN_TILES tiles of mma; grid
//           over rows of W, then tokens. STAGES chunks of 32 k are in flight by cp.async: weights
//           as they lie in memory, x row by row. Both are read 16 bytes per lane; a pair's row
//           takes 128 bytes and is swizzled against bank conflicts.
#include "flashrt.cuh"
#include "linear.cuh"

constexpr int THREADS = 32 * WARPS_N * WARPS_T;
constexpr int BLOCK_TILES = WARPS_N * ROW_TILES, BLOCK_TOKENS = 8 * WARPS_T * TOKEN_TILES;
constexpr int X_VECTORS = K_CHUNK * sizeof(act_t) / 16;  // uint4 per token and chunk
constexpr int W_STAGE = BLOCK_TILES * CHUNK_VECTORS, X_STAGE = BLOCK_TOKENS * X_VECTORS;

// Place of vector v of a token: with 8 vectors per row, lanes t = 0..3 of rows 2i and 2i + 1 take v
// = 2t + h, and the flip of h in odd rows keeps them apart; with 4 per row they are apart.
DEVICE int x_slot(int token, int v) {
  return token * X_VECTORS + (ACT_PARTS > 1 ? v ^ (token & 1) : v);
}

// 8 or 4 elements of x at k, aligned or not, zeros beyond K
DEVICE uint4 gather(const act_t* x, int k, int K) {
  constexpr int N = 16 / sizeof(act_t);
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < N; i++)
    if (k + i < K) v[i * 4 / N] |= (uint32_t)x[k + i] << (ACT_PARTS > 1 ? 0 : 16 * (i & 1));
  return make_uint4(v[0], v[1], v[2], v[3]);
}

struct Tile {
  const uint4* w;  // of the block's first row tile
  const act_t* x;  // of the block's first token
  int n_tiles, n_tokens, n_chunks, K;
};

DEVICE void load_stage(uint4* w, uint4* x, const Tile& tile, int chunk) {
  for (int i = threadIdx.x; i < W_STAGE; i += THREADS) {
    int r = i / CHUNK_VECTORS;
    bool is_in = r < tile.n_tiles;
    const uint4* p = tile.w + ((size_t)(is_in ? r : 0) * tile.n_chunks + chunk) * CHUNK_VECTORS +
                     i % CHUNK_VECTORS;
    copy_async16(w + i, p, is_in);
  }
  for (int i = threadIdx.x; i < X_STAGE; i += THREADS) {
    constexpr int N = 16 / sizeof(act_t);
    int token = i / X_VECTORS, v = i % X_VECTORS, k = chunk * K_CHUNK + v * N;
    bool is_in = token < tile.n_tokens && k < tile.K;
    const act_t* row = tile.x + (size_t)(is_in ? token : 0) * tile.K;
#if ALIGNED
    copy_async16(x + x_slot(token, v), row + (is_in ? k : 0), is_in);
#else
    x[x_slot(token, v)] = is_in ? gather(row, k, tile.K) : make_uint4(0, 0, 0, 0);
#endif
  }
}

DEVICE void multiply_stage(float (&c)[ROW_TILES][TOKEN_TILES][4], const uint4* w, const uint4* x,
                           int lane) {
  int g = lane >> 2, t = lane & 3;
  Operand b[TOKEN_TILES];
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++) {
#if ACT_PARTS > 1
    b[j] = unpack_operand(x[x_slot(8 * j + g, 2 * t)], x[x_slot(8 * j + g, 2 * t + 1)]);
#else
    b[j] = unpack_operand(x[x_slot(8 * j + g, t)]);
#endif
  }
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      uint4 v = w[r * CHUNK_VECTORS + step * 32 + lane];
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++) multiply_step(c[r][j], v, b[j], step);
    }
}

KERNEL(THREADS) linear_many(ARGS linear_args a) {
  DYNAMIC_SHARED(uint4, shared);
  uint4 *w_stages = shared, *x_stages = shared + STAGES * W_STAGE;
  begin();
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int rows = a.cursor[CURSOR_ROWS], first_tile = blockIdx.x * BLOCK_TILES,
      first_token = blockIdx.y * BLOCK_TOKENS;
  if (first_token >= rows) return;
  Tile tile;
  tile.K = a.K;
  tile.n_chunks = ceil_div(a.K, K_CHUNK);
  tile.n_tiles = ceil_div(a.N, 16) - first_tile;
  tile.n_tokens = rows - first_token;
  tile.w = reinterpret_cast<const uint4*>(a.w) + (size_t)first_tile * tile.n_chunks * CHUNK_VECTORS;
  tile.x = (const act_t*)a.x + (size_t)first_token * a.K;
  // of the warp, in the block
  int row_tile = warp % WARPS_N * ROW_TILES, token = warp / WARPS_N * 8 * TOKEN_TILES;

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < tile.n_chunks) load_stage(w_stages + s * W_STAGE, x_stages + s * X_STAGE, tile, s);
    copy_async_commit();
  }
  float c[ROW_TILES][TOKEN_TILES][4] = {}, sum[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < tile.n_chunks; chunk++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this chunk is there, and the stage of the chunk before is free
    int next = chunk + STAGES - 1, s = chunk % STAGES;
    if (next < tile.n_chunks)
      load_stage(w_stages + next % STAGES * W_STAGE, x_stages + next % STAGES * X_STAGE, tile,
                 next);
    copy_async_commit();
    multiply_stage(c, w_stages + s * W_STAGE + row_tile * CHUNK_VECTORS,
                   x_stages + s * X_STAGE + token * X_VECTORS, lane);
    if ((chunk + 1) % SLICE_CHUNKS == 0 || chunk + 1 == tile.n_chunks) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++) {
          fold(sum[r][j], c[r][j]);
#pragma unroll
          for (int i = 0; i < 4; i++) c[r][j][i] = 0.0f;
        }
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int n = (first_tile + row_tile + r) * 16 + g + 8 * (i >> 1),
            m = first_token + token + 8 * j + 2 * t + (i & 1);
        if (m < rows && n < a.N) a.y[(size_t)m * a.N + n] = sum[r][j][i];
      }
}
