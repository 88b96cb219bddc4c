// linear_many.cu - y = x W^T for many tokens: bound by the tensor cores.
//
// Contract: y[t][n] for t < cursor.rows; other rows are neither read nor written.
// Shapes:   x [T, K] activations, w [N, K] as in weights.cuh, y [T, N] float.
// Order:    linear.cuh: a slice in one accumulator, the fold of the slices before it in a second
//           one.
// Launch:   block = WARPS_N x WARPS_T warps, a warp = ROW_TILES x TOKEN_TILES tiles of mma; grid
//           over rows of W, then tokens. STAGES chunks of 32 k are in flight by cp.async: weights
//           as they lie in memory, with the scales of their groups, x row by row. Both are read 16
//           bytes per lane; a pair's row takes 128 bytes and is swizzled against bank conflicts,
//           and so is a row of float32 weights.
#include "flashrt.cuh"
#include "linear.cuh"

constexpr int THREADS = 32 * WARPS_N * WARPS_T;
constexpr int BLOCK_TILES = WARPS_N * ROW_TILES, BLOCK_TOKENS = 8 * WARPS_T * TOKEN_TILES;
constexpr int X_VECTORS = K_CHUNK * sizeof(act_t) / 16;  // uint4 per token and chunk
// uint4 per row tile and chunk: codes, then scales plane by plane
constexpr int CODE_VECTORS = CHUNK_BYTES / 16, SCALE_VECTORS = chunk_scale_bytes() / 16,
              TILE_VECTORS = CODE_VECTORS + SCALE_VECTORS;
constexpr int W_STAGE = BLOCK_TILES * TILE_VECTORS, X_STAGE = BLOCK_TOKENS * X_VECTORS;

// Place of vector v of a row of x or of float32 weights, so that the lanes which read at once, of
// rows 2i and 2i + 1 (rows of 4 vectors: 4i to 4i + 3), find different banks. They take v = 2t + h
// or, where a step is a group, t + 4h, of 4 vectors v = t / 2 + 2h.
template <int N>
DEVICE int slot(int row, int v) {
  constexpr int FLIP = STEP_K == 4 ? 1 : 4;
  if (N == 8) return row * N + (v ^ (row & 1) * FLIP);
  return row * N + (STEP_K == 4 ? v : v ^ (row & 2));
}
DEVICE int x_slot(int token, int v) { return slot<X_VECTORS>(token, v); }

// 8 or 4 elements of a row at k, aligned or not, zeros beyond K
template <class T>
DEVICE uint4 gather(const T* x, int k, int K) {
  constexpr int N = 16 / sizeof(T);
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < N; i++)
    if (k + i < K) v[i * 4 / N] |= (uint32_t)x[k + i] << (N == 4 ? 0 : 16 * (i & 1));
  return make_uint4(v[0], v[1], v[2], v[3]);
}

struct Tile {
  const uint8_t* w;  // of the block's first row tile; float32: of its first row
  const act_t* x;    // of the block's first token
  size_t w_bytes;    // of a row tile
  int n_tiles, n_rows, n_tokens, n_chunks, K;
};

// Vector v of what a stage holds of a row tile.
DEVICE const uint8_t* stored_vector(const uint8_t* tile, int n_chunks, int chunk, int v) {
  if (v < CODE_VECTORS) return tile + (size_t)chunk * CHUNK_BYTES + 16 * v;
  v -= CODE_VECTORS;
#pragma unroll
  for (int p = 0; p < N_PLANES; p++) {
    int n = plane_groups(p, K_CHUNK) * plane_bytes(p);
    if (v < n || p + 1 == N_PLANES) {
      int group = chunk * K_CHUNK / plane_size(p);
      return tile + plane_offset(p, n_chunks) + ((size_t)group * plane_bytes(p) + v) * 16;
    }
    v -= n;
  }
  return tile;
}

DEVICE void load_weights(uint4* w, const Tile& tile, int chunk) {
  for (int i = threadIdx.x; i < W_STAGE; i += THREADS) {
    if constexpr (IS_C_ORDER) {
      int row = i / 8, v = i % 8, k = chunk * K_CHUNK + 4 * v;
      bool is_in = row < tile.n_rows && k < tile.K;
      const uint32_t* p =
          reinterpret_cast<const uint32_t*>(tile.w) + (size_t)(is_in ? row : 0) * tile.K;
#if ALIGNED
      copy_async16(w + slot<8>(row, v), p + (is_in ? k : 0), is_in);
#else
      w[slot<8>(row, v)] = is_in ? gather(p, k, tile.K) : make_uint4(0, 0, 0, 0);
#endif
    } else {
      int r = i / TILE_VECTORS;
      bool is_in = r < tile.n_tiles;
      const uint8_t* p = stored_vector(tile.w + (is_in ? r : 0) * tile.w_bytes, tile.n_chunks,
                                       chunk, i % TILE_VECTORS);
      copy_async16(w + i, p, is_in);
    }
  }
}

DEVICE void load_stage(uint4* w, uint4* x, const Tile& tile, int chunk) {
  load_weights(w, tile, chunk);
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

// What a lane holds of a row tile in a stage.
DEVICE Chunk staged_chunk(const uint4* w, int lane) {
  StoredScale stored[2];
  if constexpr (IS_C_ORDER) {
    int g = lane >> 2, t = lane & 3;
    Codes codes;
#pragma unroll
    for (int i = 0; i < CODE_WORDS / 4; i++) {
      uint4 v = w[slot<8>(8 * (i % 2) + g, 2 * t + i / 2)];
      codes.word[4 * i] = v.x;
      codes.word[4 * i + 1] = v.y;
      codes.word[4 * i + 2] = v.z;
      codes.word[4 * i + 3] = v.w;
    }
    return chunk_of(codes, stored);
  } else {
    const uint8_t* at = reinterpret_cast<const uint8_t*>(w + CODE_VECTORS);
#pragma unroll
    for (int p = 0; p < N_PLANES; p++) {
#pragma unroll
      for (int f = 0; f < CHUNK_SCALES; f++)
        stored[f].plane[p] =
            load_scale(p, at + 16 * f / plane_size(p) * 16 * plane_bytes(p), lane >> 2);
      at += plane_groups(p, K_CHUNK) * 16 * plane_bytes(p);
    }
    return chunk_of(load_codes<false>(reinterpret_cast<const uint8_t*>(w), lane), stored);
  }
}

DEVICE void multiply_stage(float (&c)[ROW_TILES][TOKEN_TILES][4], const uint4* w, const uint4* x,
                           int lane) {
  int g = lane >> 2, t = lane & 3;
  Operand b[TOKEN_TILES];
  XSums sums[TOKEN_TILES];
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++) {
    int token = 8 * j + g;
#if ACT_PARTS > 1
    int v = LANE_K * t / 4;
    b[j] = unpack_operand(x[x_slot(token, v)], x[x_slot(token, v + STEP_K / 4)]);
#else
    if (STEP_K == 4) {
      b[j] = unpack_operand(x[x_slot(token, t)]);
    } else {
      uint2 first = reinterpret_cast<const uint2*>(x + x_slot(token, t / 2))[t % 2],
            second = reinterpret_cast<const uint2*>(x + x_slot(token, t / 2 + 2))[t % 2];
      b[j] = unpack_operand(make_uint4(first.x, first.y, second.x, second.y));
    }
#endif
    sums[j] = sum_x(b[j]);
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    Chunk v = staged_chunk(w + r * TILE_VECTORS, lane);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) multiply_chunk(c[r][j], v, b[j], sums[j]);
  }
}

KERNEL(THREADS, 1) linear_many(ARGS linear_args launch) {
  OPEN_RUN(linear);
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
  tile.n_rows = a.N - 16 * first_tile;
  tile.w_bytes = IS_C_ORDER ? (size_t)16 * 4 * a.K : tile_bytes(tile.n_chunks);
  tile.w = reinterpret_cast<const uint8_t*>(a.w) + first_tile * tile.w_bytes;
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
    multiply_stage(c, w_stages + s * W_STAGE + row_tile * TILE_VECTORS,
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
  for (int r = 0; r < ROW_TILES; r++) {
    int first_row = (first_tile + row_tile + r) * 16 + g;
    float row_scale[2] = {1.0f, 1.0f};
    if (HAS_ROW_SCALE && row_tile + r < tile.n_tiles) {
      const uint8_t* p = tile.w + (row_tile + r) * tile.w_bytes + row_scale_offset(tile.n_chunks);
      row_scale[0] = reinterpret_cast<const float*>(p)[2 * g];
      row_scale[1] = reinterpret_cast<const float*>(p)[2 * g + 1];
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int n = first_row + 8 * (i >> 1), m = first_token + token + 8 * j + 2 * t + (i & 1);
        if (m < rows && n < a.N)
          a.y[(size_t)m * a.y_stride + n] = with_row_scale(sum[r][j][i], row_scale[i >> 1]);
      }
  }
}
