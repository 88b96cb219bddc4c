// linear_many.cu - y = x W^T for many tokens: bound by the tensor cores.
//
// Contract: y[t][n] for t < cursor.rows; other rows are neither read nor written.
// Shapes:   x [T, K] activations, w [N, K] as in weights.cuh, y [T, N] float.
// Order:    linear.cuh: a slice in one accumulator, the slices of its super-slice before it in a
//           second one; super-slices are added up in y, by the thread that stores it. Where the
//           tiles do not fill the device, blocks share K: each leaves its super-slices in `sums`,
//           the last one of a tile adds them up in order.
// Launch:   block = WARPS_N x WARPS_T warps, a warp = ROW_TILES x TOKEN_TILES tiles of mma; grid
//           over tokens, whose blocks share rows of W while these are in the L2 cache, then rows
//           of W, then parts of K, those of most k first. STAGES chunks of 32 k are in flight by
//           cp.async: weights as they lie in memory, with the scales of their groups, x row by
//           row. Both are read 16 bytes per lane; a pair's row takes 128 bytes and is swizzled
//           against bank conflicts, and so is a row of float32 weights.
#include "flashrt.cuh"
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

// What the launch has besides the op's arguments: Split in kernels.py. Part p has super-slices
// [p * supers, (p + 1) * supers). Plane 0 of `sums` is the fold of those of part 0, each of the
// others one of the super-slices that follow.
struct split_args {
  float4* sums;        // [plane][tile][vector][thread]
  uint32_t* finished;  // [tile]: parts that are done; 0 between launches
  int parts, supers;
  int row_blocks, tiles;  // along rows of W, and in all
};
struct many_args {
  linear_args linear;
  split_args split;
};

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

DEVICE Feed feed_of(const linear_args& a, int first_tile, int first_token, int rows,
                    int first_chunk) {
  Feed feed;
  int n_chunks = ceil_div(a.K, K_CHUNK), last_tile = ceil_div(a.N, 16) - 1;
  auto tile_at = [&](int r) {
    size_t n = min(first_tile + r, last_tile);
    return static_cast<const uint8_t*>((const void*)a.w) + n * tile_bytes(n_chunks);
  };
#pragma unroll
  for (int j = 0; j < CODE_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS;
    if constexpr (IS_C_ORDER) {
      size_t row = min(16 * first_tile + i / 8, a.N - 1);
      feed.codes[j] = static_cast<const uint8_t*>((const void*)a.w) +
                      (row * a.K + first_chunk * K_CHUNK + 4 * (i % 8)) * 4;
    } else {
      feed.codes[j] =
          tile_at(i / CODE_VECTORS) + (size_t)first_chunk * CHUNK_BYTES + 16 * (i % CODE_VECTORS);
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
        tile_at(i / (SCALE_VECTORS ? SCALE_VECTORS : 1)) + plane_offset(plane, n_chunks) + 16 * v;
  }
#pragma unroll
  for (int j = 0; j < X_ROUNDS; j++) {
    int i = threadIdx.x + j * THREADS;
    size_t token = min(first_token + i / X_VECTORS, rows - 1);
    feed.x[j] = (const act_t*)a.x + token * a.K + first_chunk * K_CHUNK +
                16 / sizeof(act_t) * (i % X_VECTORS);
  }
  feed.codes_left = a.K - first_chunk * K_CHUNK - 4 * (threadIdx.x % 8);
  feed.x_left = a.K - first_chunk * K_CHUNK - 16 / (int)sizeof(act_t) * (threadIdx.x % X_VECTORS);
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

// Adds a super-slice to what y has of those before it, and clears it; with the last one y is whole.
DEVICE void add_to_y(const linear_args& a, float (&sum)[ROW_TILES][TOKEN_TILES][4], int tile,
                     int token, int rows, bool is_first, bool is_last) {
  // addresses of y would take the registers of the loop over k
  int lane = opaque(threadIdx.x) & 31, g = lane >> 2, t = lane & 3;
  int n_chunks = ceil_div(a.K, K_CHUNK);
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    int first_row = (tile + r) * 16 + g;
    float row_scale[2] = {1.0f, 1.0f};
    if (HAS_ROW_SCALE && first_row < a.N) {
      const uint8_t* p = reinterpret_cast<const uint8_t*>(a.w) + (tile + r) * tile_bytes(n_chunks) +
                         row_scale_offset(n_chunks);
      row_scale[0] = reinterpret_cast<const float*>(p)[2 * g];
      row_scale[1] = reinterpret_cast<const float*>(p)[2 * g + 1];
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int n = first_row + 8 * (i >> 1), m = token + 8 * j + 2 * t + (i & 1);
        if (m < rows && n < a.N) {
          float* y = a.y + (size_t)m * a.y_stride + n;
          float total = is_first ? sum[r][j][i] : *y + sum[r][j][i];
          *y = is_last ? sum_with_row_scale(total, row_scale[i >> 1]) : total;
        }
        sum[r][j][i] = 0.0f;
      }
  }
}

// This thread's vectors of a plane of this block's tile.
DEVICE float4* plane_of(const split_args& split, int plane, int tile) {
  return split.sums + ((size_t)plane * split.tiles + tile) * (ROW_TILES * TOKEN_TILES * THREADS) +
         threadIdx.x;
}

// Leaves a super-slice in its plane, and clears it.
DEVICE void leave(float (&sum)[ROW_TILES][TOKEN_TILES][4], float4* to, bool is_added) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++, to += THREADS) {
      float4 v = is_added ? *to : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      float total[4] = {v.x, v.y, v.z, v.w};
      fold(total, sum[r][j]);
      *to = make_float4(total[0], total[1], total[2], total[3]);
#pragma unroll
      for (int i = 0; i < 4; i++) sum[r][j][i] = 0.0f;
    }
}

// Whether all other parts of the tile have left their planes; then they may be read. `verdict` is
// shared memory that no thread reads after its call.
DEVICE bool is_last_part(const split_args& split, int tile, int* verdict) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *verdict = atomicAdd(split.finished + tile, 1u) == split.parts - 1u;
    // what is read comes after the counter; the barrier passes this on to the block
    __threadfence();
    if (*verdict) split.finished[tile] = 0;
  }
  __syncthreads();
  return *verdict;
}

KERNEL(THREADS, BLOCKS) linear_many(ARGS many_args arguments) {
  const linear_args& launch = arguments.linear;
  const split_args& split = arguments.split;
  OPEN_RUN(linear);
  DYNAMIC_SHARED(uint4, shared);
  begin();
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int part = blockIdx.y / split.row_blocks, row_block = blockIdx.y % split.row_blocks;
  int rows = a.cursor[CURSOR_ROWS], first_tile = row_block * BLOCK_TILES,
      first_token = blockIdx.x * BLOCK_TOKENS, n_chunks = ceil_div(a.K, K_CHUNK);
  if (first_token >= rows) return;
  // of the warp, in the block
  int row_tile = warp % WARPS_N * ROW_TILES, token = warp / WARPS_N * 8 * TOKEN_TILES;
  int begin_chunk = part * split.supers * SUPER_CHUNKS,
      end_chunk = min(begin_chunk + split.supers * SUPER_CHUNKS, n_chunks);
  int block_tile = (blockIdx.z * split.row_blocks + row_block) * gridDim.x + blockIdx.x;
  Feed feed = feed_of(a, first_tile, first_token, rows, begin_chunk);

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (feed.chunk < end_chunk) load_stage(feed, shared + s * STAGE);
    copy_async_commit();
  }
  float sum[ROW_TILES][TOKEN_TILES][4] = {};  // of the super-slice
  int taken = 0, freed = STAGES - 1;          // the stage of this chunk, and of the chunk before
#pragma unroll 1
  for (int super = part * split.supers; super * SUPER_CHUNKS < end_chunk; super++) {
    int super_end = min((super + 1) * SUPER_CHUNKS, end_chunk);
#pragma unroll 1
    for (int first = super * SUPER_CHUNKS; first < super_end; first += SLICE_CHUNKS) {
      float c[ROW_TILES][TOKEN_TILES][4] = {};
      int end = min(first + SLICE_CHUNKS, super_end);
#pragma unroll 1
      for (int chunk = first; chunk < end; chunk++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this chunk is there, and nobody reads the one before
        if (feed.chunk < end_chunk) load_stage(feed, shared + freed * STAGE);
        copy_async_commit();
        const uint4* stage = shared + taken * STAGE;
        multiply_stage(c, stage + row_tile * CODE_VECTORS, stage + CODES + row_tile * SCALE_VECTORS,
                       stage + CODES + SCALES + token * X_VECTORS, lane);
        freed = taken;
        taken = taken + 1 == STAGES ? 0 : taken + 1;
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++) fold(sum[r][j], c[r][j]);
    }
    if (split.parts == 1) {
      add_to_y(a, sum, first_tile + row_tile, first_token + token, rows, super == 0,
               super_end == n_chunks);
    } else {
      int plane = max(super - split.supers + 1, 0);
      leave(sum, plane_of(split, plane, block_tile), plane == 0 && super > 0);
    }
  }
  copy_async_wait<0>();
  int* verdict = reinterpret_cast<int*>(shared);  // the stages are done with, after a barrier
  if (split.parts == 1 || !is_last_part(split, block_tile, verdict)) return;
  int n_planes = ceil_div(n_chunks, SUPER_CHUNKS) - split.supers + 1;
  for (int plane = 0; plane < n_planes; plane++) {
    const float4* from = plane_of(split, plane, block_tile);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++, from += THREADS) {
        float4 v = *from;
        float of_plane[4] = {v.x, v.y, v.z, v.w};
        fold(sum[r][j], of_plane);
      }
  }
  add_to_y(a, sum, first_tile + row_tile, first_token + token, rows, true, true);
}
