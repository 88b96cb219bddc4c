// linear_many.cuh - products with a weight matrix for many tokens: bound by the tensor cores.
//
// IS: the loop of linear_many, experts_in_many and experts_out_many, from memory to the sums of a
// super-slice. They differ in which rows of W and of x a block takes, and in where sums go. A kernel
// is a file, so that only what is launched is compiled.
// IS NOT: the order of a sum, see linear.cuh.
//
// Launch:   block = WARPS_N x WARPS_T warps, a warp = ROW_TILES x TOKEN_TILES tiles of mma. STAGES
//           chunks of 32 k are in flight by cp.async: weights as they lie in memory, with the scales
//           of their groups, x row by row. Both are read 16 bytes per lane; a pair's row takes 128
//           bytes and is swizzled against bank conflicts, and so is a row of float32 weights.
#pragma once
#include "linear.cuh"

constexpr int THREADS = 32 * WARPS_N * WARPS_T;
constexpr int BLOCK_TILES = WARPS_N * ROW_TILES, BLOCK_TOKENS = 8 * WARPS_T * TOKEN_TILES;
constexpr int X_VECTORS = K_CHUNK * sizeof(act_t) / 16;  // uint4 per token and chunk
// uint4 per row tile and chunk
constexpr int CODE_VECTORS = CHUNK_BYTES / 16, SCALE_VECTORS = chunk_scale_bytes() / 16;
// uint4 per stage: codes of all row tiles, then scales, plane by plane of each tile, then x
constexpr int CODES = BLOCK_TILES * CODE_VECTORS, SCALES = BLOCK_TILES * SCALE_VECTORS,
              XS = BLOCK_TOKENS * X_VECTORS, STAGE = CODES + SCALES + XS;
// and per thread
constexpr int CODE_ROUNDS = ceil_div(CODES, THREADS), SCALE_ROUNDS = ceil_div(SCALES, THREADS),
              X_ROUNDS = ceil_div(XS, THREADS);
static_assert(THREADS % 32 == 0,
              "a thread takes the same k, and rows of one swizzle, in every round");

// Place of vector v of a row of x or of float32 weights, so that the lanes which read at once, of
// rows 2i and 2i + 1 (rows of 4 vectors: 4i to 4i + 3), find different banks. They take v = 2t + h
// or, where a step is a group, t + 4h, of 4 vectors v = t / 2 + 2h.
template <int N>
DEVICE int slot(int row, int v) {
  constexpr int FLIP = STEP_K == 4 ? 1 : 4;
  if (N == 8) return row * N + (v ^ (row & 1) * FLIP);
  return row * N + (STEP_K == 4 ? v : v ^ (row & 2));
}

// 8 or 4 elements of a row, aligned or not, zeros where it ends after n
template <class T>
DEVICE uint4 gather(const T* x, int n) {
  constexpr int N = 16 / sizeof(T);
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i < n) v[i * 4 / N] |= (uint32_t)x[i] << (N == 4 ? 0 : 16 * (i & 1));
  return make_uint4(v[0], v[1], v[2], v[3]);
}

// 16 bytes of a row to shared memory, zeros where it ends after n elements
template <class T>
DEVICE void copy_elements(uint4* to, const T* from, int n) {
#if ALIGNED
  copy_async16(to, from, n > 0);
#else
  *to = gather(from, n);
#endif
}

// What a thread copies into a stage: the addresses are made once and advance by constants. Rows of
// W and of x beyond the last one are copies of it: no other sum sees them, and nobody stores theirs.
struct Feed {
  const uint8_t* codes[CODE_ROUNDS];  // of this thread's vectors in the next chunk
  const act_t* x[X_ROUNDS];
  const uint8_t* scales[SCALE_ROUNDS ? SCALE_ROUNDS : 1];  // in the first chunk
  int plane[SCALE_ROUNDS ? SCALE_ROUNDS : 1];
  int codes_left, x_left;  // elements of a row from this thread's k in the next chunk on
  int chunk;
};

// tile_at(r): the row tile of W of the block's tile r; row_at(i): the row of x of its token i.
template <class TileAt, class RowAt>
DEVICE Feed feed_of(const void* w, const act_t* x, int N, int K, int first_chunk, TileAt tile_at,
                    RowAt row_at) {
  Feed feed;
  int n_chunks = ceil_div(K, K_CHUNK);
  auto at = [&](int r) {
    return static_cast<const uint8_t*>(w) + (size_t)tile_at(r) * tile_bytes(n_chunks);
  };
#pragma unroll
  for (int j = 0; j < CODE_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS;
    if constexpr (IS_C_ORDER) {
      size_t row = min(16 * tile_at(i / 128) + i / 8 % 16, N - 1);
      feed.codes[j] =
          static_cast<const uint8_t*>(w) + (row * K + first_chunk * K_CHUNK + 4 * (i % 8)) * 4;
    } else {
      feed.codes[j] =
          at(i / CODE_VECTORS) + (size_t)first_chunk * CHUNK_BYTES + 16 * (i % CODE_VECTORS);
    }
  }
#pragma unroll
  for (int j = 0; j < SCALE_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS, v = i % (SCALE_VECTORS ? SCALE_VECTORS : 1), plane = 0;
#pragma unroll
    for (int p = 0; p + 1 < N_PLANES; p++) {
      int n = plane_groups(p, K_CHUNK) * plane_bytes(p);
      if (plane == p && v >= n) {
        plane = p + 1;
        v -= n;
      }
    }
    feed.plane[j] = plane;
    feed.scales[j] =
        at(i / (SCALE_VECTORS ? SCALE_VECTORS : 1)) + plane_offset(plane, n_chunks) + 16 * v;
  }
#pragma unroll
  for (int j = 0; j < X_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS;
    size_t row = row_at(i / X_VECTORS);
    feed.x[j] = x + row * K + first_chunk * K_CHUNK + 16 / sizeof(act_t) * (i % X_VECTORS);
  }
  feed.codes_left = K - first_chunk * K_CHUNK - 4 * (threadIdx.x % 8);
  feed.x_left = K - first_chunk * K_CHUNK - 16 / (int)sizeof(act_t) * (threadIdx.x % X_VECTORS);
  feed.chunk = first_chunk;
  return feed;
}

// Whether round j of a thread has a vector, of n in all; known at compile time but for the last.
DEVICE bool is_round(int j, int n) {
  return (j + 1) * THREADS <= n || threadIdx.x + j * THREADS < n;
}

// Copies the next chunk into a stage.
DEVICE void load_stage(Feed& feed, uint4* stage) {
  int x_slot = slot<X_VECTORS>(threadIdx.x / X_VECTORS, threadIdx.x % X_VECTORS);
#pragma unroll
  for (int j = 0; j < CODE_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS;
    if (is_round(j, CODES)) {
      if constexpr (IS_C_ORDER)
        copy_elements(stage + slot<8>(threadIdx.x / 8, threadIdx.x % 8) + j * THREADS,
                      reinterpret_cast<const uint32_t*>(feed.codes[j]), feed.codes_left);
      else copy_async16(stage + i, feed.codes[j]);
    }
    feed.codes[j] += IS_C_ORDER ? 4 * K_CHUNK : CHUNK_BYTES;
  }
#pragma unroll
  for (int j = 0; j < SCALE_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS, at = 0;
#pragma unroll
    for (int p = 0; p < N_PLANES; p++)
      if (feed.plane[j] == p) at = feed.chunk * K_CHUNK / plane_size(p) * 16 * plane_bytes(p);
    if (is_round(j, SCALES)) copy_async16(stage + CODES + i, feed.scales[j] + at);
  }
#pragma unroll
  for (int j = 0; j < X_ROUNDS; j++) {
    if (is_round(j, XS))
      copy_elements(stage + CODES + SCALES + x_slot + j * THREADS, feed.x[j], feed.x_left);
    feed.x[j] += K_CHUNK;
  }
  feed.codes_left -= K_CHUNK;
  feed.x_left -= K_CHUNK;
  feed.chunk++;
}

// What a lane holds of a row tile in a stage.
DEVICE Chunk staged_chunk(const uint4* codes, const uint4* scales, int lane) {
  StoredScale stored[2];
  if constexpr (IS_C_ORDER) {
    int g = lane >> 2, t = lane & 3;
    Codes words;
#pragma unroll
    for (int i = 0; i < CODE_WORDS / 4; i++) {
      uint4 v = codes[slot<8>(8 * (i % 2) + g, 2 * t + i / 2)];
      words.word[4 * i] = v.x;
      words.word[4 * i + 1] = v.y;
      words.word[4 * i + 2] = v.z;
      words.word[4 * i + 3] = v.w;
    }
    return chunk_of(words, stored);
  } else {
    const uint8_t* at = reinterpret_cast<const uint8_t*>(scales);
#pragma unroll
    for (int p = 0; p < N_PLANES; p++) {
#pragma unroll
      for (int f = 0; f < CHUNK_SCALES; f++)
        stored[f].plane[p] =
            load_scale(p, at + 16 * f / plane_size(p) * 16 * plane_bytes(p), lane >> 2);
      at += plane_groups(p, K_CHUNK) * 16 * plane_bytes(p);
    }
    return chunk_of(load_codes<false>(reinterpret_cast<const uint8_t*>(codes), lane), stored);
  }
}

// Vector v of a token of this lane, g = lane / 4; x: of the warp's tokens.
DEVICE Operand staged_x(const uint4* x, int j, int g, int t) {
  x += 8 * j * X_VECTORS;
#if ACT_PARTS > 1
  int v = LANE_K * t / 4;
  return unpack_operand(x[slot<8>(g, v)], x[slot<8>(g, v + STEP_K / 4)]);
#else
  if (STEP_K == 4) return unpack_operand(x[slot<4>(g, t)]);
  uint2 first = reinterpret_cast<const uint2*>(x + slot<4>(g, t / 2))[t % 2],
        second = reinterpret_cast<const uint2*>(x + slot<4>(g, t / 2 + 2))[t % 2];
  return unpack_operand(make_uint4(first.x, first.y, second.x, second.y));
#endif
}

// codes, scales, x: of the warp.
DEVICE void multiply_stage(float (&c)[ROW_TILES][TOKEN_TILES][4], const uint4* codes,
                           const uint4* scales, const uint4* x, int lane) {
  Operand b[TOKEN_TILES];
  XSums sums[TOKEN_TILES];
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++) {
    b[j] = staged_x(x, j, lane >> 2, lane & 3);
    sums[j] = sum_x(b[j]);
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    Chunk v = staged_chunk(codes + r * CODE_VECTORS, scales + r * SCALE_VECTORS, lane);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) multiply_chunk(c[r][j], v, b[j], sums[j]);
  }
}

// Sums of a warp: of its row tiles and token tiles, as mma leaves them.
typedef float Sums[ROW_TILES][TOKEN_TILES][4];

DEVICE void fold_sums(Sums& sum, const Sums& slice) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) fold(sum[r][j], slice[r][j]);
}

// The stage of this chunk, and of the chunk before.
struct Turn {
  int taken = 0, freed = STAGES - 1;
};

// Fills the first stages, of chunks up to `end`.
DEVICE void load_first_stages(Feed& feed, uint4* shared, int end) {
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (feed.chunk < end) load_stage(feed, shared + s * STAGE);
    copy_async_commit();
  }
}

// sum += a super-slice, chunks [super_begin, super_end), of the warp's row tiles and tokens; further
// stages, up to `end`, are filled ahead of their use.
DEVICE void add_super(Sums& sum, Feed& feed, Turn& turn, uint4* shared, int super_begin,
                      int super_end, int end, int row_tile, int token, int lane) {
#pragma unroll 1
  for (int first = super_begin; first < super_end; first += SLICE_CHUNKS) {
    Sums c = {};
    int slice_end = min(first + SLICE_CHUNKS, super_end);
#pragma unroll 1
    for (int chunk = first; chunk < slice_end; chunk++) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();  // this chunk is there, and nobody reads the one before
      if (feed.chunk < end) load_stage(feed, shared + turn.freed * STAGE);
      copy_async_commit();
      const uint4* stage = shared + turn.taken * STAGE;
      multiply_stage(c, stage + row_tile * CODE_VECTORS, stage + CODES + row_tile * SCALE_VECTORS,
                     stage + CODES + SCALES + token * X_VECTORS, lane);
      turn.freed = turn.taken;
      turn.taken = turn.taken + 1 == STAGES ? 0 : turn.taken + 1;
    }
    fold_sums(sum, c);
  }
}

// What the sums of row tile `tile` are multiplied by last, for rows g and g + 8.
DEVICE void load_row_scales(float (&scale)[2], const void* w, int tile, int K, int g) {
  scale[0] = scale[1] = 1.0f;
  if (!HAS_ROW_SCALE) return;
  int n_chunks = ceil_div(K, K_CHUNK);
  const uint8_t* p = static_cast<const uint8_t*>(w) + (size_t)tile * tile_bytes(n_chunks) +
                     row_scale_offset(n_chunks);
  scale[0] = reinterpret_cast<const float*>(p)[2 * g];
  scale[1] = reinterpret_cast<const float*>(p)[2 * g + 1];
}
