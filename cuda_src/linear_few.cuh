// linear_few.cuh - products with a weight matrix for up to 32 tokens: bound by the bytes of W.
//
// IS: the body of linear_few, linear_add, linear_silu, norm_linear and norm_silu, which differ in
// where x comes from and where a sum goes. A kernel is a file, so that only what is launched is
// compiled. All give the bits of `linear` and the launches that they stand for.
// IS NOT: the order of a sum, see linear.cuh, or what may stand for what, see backends/cuda/fusion.py.
//
// Contract: row t < cursor.rows of the output; other rows are neither read nor written.
// Order:    linear.cuh. Of the warps of a row tile, warp w takes slices w, w + WARPS, ...; the first
//           folds them in order through shared memory. A norm's sum is norm.cu's: its warps are
//           shared out among those of the block.
// Launch:   grid (row tiles, T / (8 * TOKEN_TILES)), WARPS warps per row tile of the block: few, so
//           that blocks of one multiprocessor overlap, unless there are too few row tiles to fill
//           the device. A warp holds two batches of weights, in bfloat16 a slice (8 KB), and loads
//           one while it multiplies the other; the first ones it loads before it waits for the
//           kernel that makes x.
#pragma once
#include "linear.cuh"

// Where a sum goes: y = sum; y = y + sum; or y = silu(sum) times that of the row tile which the
// second half of the block's warps multiplies, I / 16 tiles further on; or a sum over PICKS row tiles
// of as many experts.
enum Epilogue { STORE, ADD, SILU, SUM };

#ifndef PICKS
#define PICKS 1
#endif

// Row tiles of a block, each with WARPS warps of its own.
DEVICE constexpr int parts(Epilogue e) { return e == SILU ? 2 : e == SUM ? PICKS : 1; }

// What the registers must leave room for on a multiprocessor: 16 warps, 8 of the widest, or where
// chains and scales need registers too.
constexpr bool IS_WIDE = TOKEN_TILES == 4 || (TOKEN_TILES == 2 && FOLDS);
DEVICE constexpr int threads(Epilogue e) { return 32 * WARPS * parts(e); }
DEVICE constexpr int min_blocks(Epilogue e) { return (IS_WIDE ? 256 : 512) / threads(e); }
constexpr int BATCH_CHUNKS = IS_C_ORDER ? 1 : SLICE_CHUNKS / 2;
constexpr int MOST_GROUPS = CHUNK_SCALES == 2 ? 2 * BATCH_CHUNKS : BATCH_CHUNKS;  // of a batch

// Chunks of a row tile as they are stored, what a lane needs of them.
struct Batch {
  Codes codes[BATCH_CHUNKS];
  uint2 scales[N_PLANES ? N_PLANES : 1][MOST_GROUPS];
};

// Where a lane finds a row tile.
struct Tile {
  const uint8_t* codes;
  const uint8_t* plane[N_PLANES ? N_PLANES : 1];
  const float* row[2];  // float32 in C order: rows g and g + 8, at 8t
};

// x[token], four k from k on and four from k + STEP_K; zeros beyond the valid rows and beyond K
DEVICE Operand load_x(const act_t* x, bool is_row, int k, int K) {
#if ALIGNED
  bool is_in = is_row && k < K, is_in2 = is_row && k + STEP_K < K;
#if ACT_PARTS > 1
  constexpr uint4 zero = {0, 0, 0, 0};
  return unpack_operand(is_in ? *reinterpret_cast<const uint4*>(x + k) : zero,
                        is_in2 ? *reinterpret_cast<const uint4*>(x + k + STEP_K) : zero);
#else
  if (STEP_K == 4)
    return unpack_operand(is_in ? *reinterpret_cast<const uint4*>(x + k) : make_uint4(0, 0, 0, 0));
  constexpr uint2 zero = {0, 0};
  uint2 first = is_in ? *reinterpret_cast<const uint2*>(x + k) : zero,
        second = is_in2 ? *reinterpret_cast<const uint2*>(x + k + STEP_K) : zero;
  return unpack_operand(make_uint4(first.x, first.y, second.x, second.y));
#endif
#else
  act_t v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int at = k + i % 4 + i / 4 * STEP_K;
    v[i] = is_row && at < K ? x[at] : 0;
  }
#if ACT_PARTS > 1
  return unpack_operand(make_uint4(v[0], v[1], v[2], v[3]), make_uint4(v[4], v[5], v[6], v[7]));
#else
  return unpack_operand(
      make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16));
#endif
#endif
}

DEVICE Tile tile_of(const void* w, int n, int n_chunks, int N, int K, int g, int t) {
  Tile tile;
  if constexpr (IS_C_ORDER) {
#pragma unroll
    for (int row = 0; row < 2; row++)  // rows beyond N: another, whose sums nobody takes
      tile.row[row] =
          static_cast<const float*>(w) + (size_t)min(16 * n + 8 * row + g, N - 1) * K + 8 * t;
  } else {
    tile.codes = static_cast<const uint8_t*>(w) + n * tile_bytes(n_chunks);
#pragma unroll
    for (int p = 0; p < N_PLANES; p++) tile.plane[p] = tile.codes + plane_offset(p, n_chunks);
  }
  return tile;
}

// Eight k of two rows, at k of each; zeros beyond K
DEVICE Codes load_rows(const Tile& tile, int k, int t, int K) {
  Codes codes;
#pragma unroll
  for (int i = 0; i < CODE_WORDS / 4; i++) {
    int step = i / 2, at = k + 4 * step;
    const float* p = tile.row[i % 2] + at;
#if ALIGNED
    uint4 v = at + 8 * t < K ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
    codes.word[4 * i] = v.x;
    codes.word[4 * i + 1] = v.y;
    codes.word[4 * i + 2] = v.z;
    codes.word[4 * i + 3] = v.w;
#else
#pragma unroll
    for (int j = 0; j < 4; j++)
      codes.word[4 * i + j] = at + 8 * t + j < K ? __float_as_uint(p[j]) : 0;
#endif
  }
  return codes;
}

// Chunks [first, first + BATCH_CHUNKS); beyond `end` nothing is loaded.
DEVICE void load_batch(Batch& batch, const Tile& tile, int first, int end, int lane, int K) {
#pragma unroll
  for (int i = 0; i < BATCH_CHUNKS; i++) {
    if (first + i >= end) continue;
    if constexpr (IS_C_ORDER) batch.codes[i] = load_rows(tile, (first + i) * K_CHUNK, lane & 3, K);
    else batch.codes[i] = load_codes<true>(tile.codes + (size_t)(first + i) * CHUNK_BYTES, lane);
  }
#pragma unroll
  for (int p = 0; p < N_PLANES; p++)
#pragma unroll
    for (int i = 0; i < plane_groups(p, BATCH_CHUNKS * K_CHUNK); i++) {
      int k = first * K_CHUNK + i * plane_size(p);
      if (k < end * K_CHUNK)
        batch.scales[p][i] = load_scale(
            p, tile.plane[p] + (size_t)(k / plane_size(p)) * 16 * plane_bytes(p), lane >> 2);
    }
}

// x of the lane's token in tile j of the block: four k from k on, and four from k + STEP_K. The rows
// of a launch, from the block's first one on.
struct LaunchRows {
  const act_t* x;
  int token, rows;  // the lane's in tile 0; valid ones

  DEVICE Operand operand(int j, int k, int K) const {
    bool is_row = token + 8 * j < rows;
    return load_x(x + (size_t)(is_row ? token + 8 * j : 0) * K, is_row, k, K);
  }
};

template <class X>
DEVICE void multiply_batch(float (&c)[TOKEN_TILES][4], const Batch& batch, int first, int end,
                           const X& x, int t, int K) {
#pragma unroll
  for (int i = 0; i < BATCH_CHUNKS; i++) {
    if (first + i >= end) break;
    StoredScale stored[2];
#pragma unroll
    for (int f = 0; f < CHUNK_SCALES; f++)
#pragma unroll
      for (int p = 0; p < N_PLANES; p++)
        stored[f].plane[p] = batch.scales[p][(i * K_CHUNK + 16 * f) / plane_size(p)];
    Chunk w = chunk_of(batch.codes[i], stored);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) {
      Operand b = x.operand(j, (first + i) * K_CHUNK + LANE_K * t, K);
      multiply_chunk(c[j], w, b, sum_x(b));
    }
  }
}

// The block's rows of x, normed: [rows][K] in shared memory. part: a float per row and warp of
// norm.cu.
#ifdef NORM_THREADS
template <int N_WARPS, class Args>
DEVICE const act_t* norm_rows(act_t* to, float* part, const Args& a, int rows) {
  constexpr int NORM_WARPS = NORM_THREADS / 32;
  constexpr bool IS_KEPT = sizeof(act_t) == sizeof(float);  // x, where its norm will be
  int lane = threadIdx.x & 31;
  for (int i = threadIdx.x >> 5; i < rows * NORM_WARPS; i += N_WARPS) {
    size_t row = (size_t)(i / NORM_WARPS) * a.K;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < NORM_VECTORS; j++) {
      int c = 4 * (j * NORM_THREADS + i % NORM_WARPS * 32 + lane);
      if (c >= a.K) continue;
      float4 v = *reinterpret_cast<const float4*>(a.x + row + c);
      if constexpr (IS_KEPT) *reinterpret_cast<float4*>(to + row + c) = v;
      sum = fmaf(v.x, v.x, sum);
      sum = fmaf(v.y, v.y, sum);
      sum = fmaf(v.z, v.z, sum);
      sum = fmaf(v.w, v.w, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) part[i] = sum;
  }
  __syncthreads();
  for (int t = 0; t < rows; t++) {
    float sum = part[t * NORM_WARPS];
#pragma unroll
    for (int w = 1; w < NORM_WARPS; w++) sum = sum + part[t * NORM_WARPS + w];
    float scale = rsqrt_f32(sum / (float)a.K + a.eps);
    act_t* y = to + (size_t)t * a.K;
    for (int c = 4 * threadIdx.x; c < a.K; c += 4 * 32 * N_WARPS) {
      float4 v = IS_KEPT ? *reinterpret_cast<const float4*>(y + c)
                         : *reinterpret_cast<const float4*>(a.x + (size_t)t * a.K + c),
             g = *reinterpret_cast<const float4*>(a.norm + c);
      store_act4(y + c, v.x * scale * g.x, v.y * scale * g.y, v.z * scale * g.z, v.w * scale * g.w);
    }
  }
  __syncthreads();
  return to;
}
#endif

// Of super-slices, by token tile and lane: in shared memory, for registers are short.
typedef float Totals[TOKEN_TILES][32][4];

DEVICE void fold_super(Totals& totals, float (&sum)[TOKEN_TILES][4], int lane) {
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++) {
    fold(totals[j][lane], sum[j]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[j][i] = 0.0f;
  }
}

// Where warps leave their sums for each other.
template <Epilogue E>
struct FewSums {
  float part[2][threads(E) / 32][TOKEN_TILES][32][4];  // by turns
  Totals totals[parts(E)];                             // of each first warp
};

// The first batches of a row tile, and what its sums are multiplied by last.
struct FewWeights {
  Tile tile;
  Batch front, back;
  float row_scale[2];
};

DEVICE FewWeights load_weights(const Tile& tile, int warp, int n_chunks, int lane, int K) {
  FewWeights w;
  w.tile = tile;
  load_batch(w.front, tile, warp * SLICE_CHUNKS, n_chunks, lane, K);
  load_batch(w.back, tile, warp * SLICE_CHUNKS + BATCH_CHUNKS, n_chunks, lane, K);
  w.row_scale[0] = w.row_scale[1] = 1.0f;
  if constexpr (HAS_ROW_SCALE) {
    const float* p = reinterpret_cast<const float*>(tile.codes + row_scale_offset(n_chunks));
    w.row_scale[0] = p[2 * (lane >> 2)];
    w.row_scale[1] = p[2 * (lane >> 2) + 1];
  }
  return w;
}

// The sums of the block's row tile, in its first warp; of several, those of the others are then in
// part[0][WARPS], part[0][2 * WARPS], ... All warps of the block call it.
template <Epilogue E, class X>
DEVICE void sum_few(float (&sum)[TOKEN_TILES][4], FewSums<E>& shared, FewWeights& w, const X& x,
                    int K) {
  int of_block = threadIdx.x >> 5, half = parts(E) > 1 ? of_block / WARPS : 0,
      warp = of_block - half * WARPS, lane = threadIdx.x & 31, t = lane & 3;
  int n_chunks = ceil_div(K, K_CHUNK), n_slices = ceil_div(K, K_SLICE);
  auto& part = shared.part;
  auto& totals = shared.totals;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[j][i] = 0.0f;  // of the super-slice
  if (warp == 0)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) totals[half][j][lane][i] = 0.0f;
  for (int s0 = 0; s0 < n_slices; s0 += WARPS) {
    float c[TOKEN_TILES][4] = {};
    int slice = (s0 + warp) * SLICE_CHUNKS, turn = s0 / WARPS & 1;
#pragma unroll
    for (int i = 0; i < SLICE_CHUNKS; i += 2 * BATCH_CHUNKS) {
      int first = slice + i, next = i + 2 * BATCH_CHUNKS < SLICE_CHUNKS
                                        ? first + 2 * BATCH_CHUNKS
                                        : slice + WARPS * SLICE_CHUNKS;
      multiply_batch(c, w.front, first, n_chunks, x, t, K);
      load_batch(w.front, w.tile, next, n_chunks, lane, K);
      multiply_batch(c, w.back, first + BATCH_CHUNKS, n_chunks, x, t, K);
      load_batch(w.back, w.tile, next + BATCH_CHUNKS, n_chunks, lane, K);
    }
    if (WARPS == 1) {
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++) fold(sum[j], c[j]);
      if ((s0 + 1) % SUPER_SLICES == 0) fold_super(totals[half], sum, lane);
      continue;
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
      *reinterpret_cast<float4*>(part[turn][of_block][j][lane]) =
          make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
    // nobody writes this turn's part again before the first warp has passed the next barrier
    __syncthreads();
    if (warp == 0)
      for (int v = 0; v < min(WARPS, n_slices - s0); v++) {
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++) fold(sum[j], part[turn][of_block + v][j][lane]);
        if ((s0 + v + 1) % SUPER_SLICES == 0) fold_super(totals[half], sum, lane);
      }
  }
  if (warp == 0) {
    fold_super(totals[half], sum, lane);  // the last one, or +0, which changes nothing
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sum[j][i] = with_row_scale(totals[half][j][lane][i], w.row_scale[i >> 1]);
  }
  if constexpr (parts(E) > 1) {  // the place of a first warp: nobody else's
    if (warp == 0 && of_block > 0)
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++)
        *reinterpret_cast<float4*>(part[0][of_block][j][lane]) =
            make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
    __syncthreads();
  }
}

// N: rows of W that the launch has outputs for, half of all for SILU.
template <Epilogue E, class Args>
DEVICE void multiply_few(const Args& a, int N) {
  __shared__ __align__(16) FewSums<E> shared;
  int of_block = threadIdx.x >> 5, half = E == SILU ? of_block / WARPS : 0,
      warp = of_block - half * WARPS, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int n_chunks = ceil_div(a.K, K_CHUNK), first_token = blockIdx.y * 8 * TOKEN_TILES;
  Tile tile =
      tile_of(a.w, blockIdx.x + half * gridDim.x, n_chunks, E == SILU ? 2 * N : N, a.K, g, t);
  // weights do not depend on the predecessor
  FewWeights w = load_weights(tile, warp, n_chunks, lane, a.K);
  begin();
  int rows = a.cursor[CURSOR_ROWS];
  if (first_token >= rows) return;
#ifdef NORM_THREADS  // all rows: there is one block of tokens
  DYNAMIC_SHARED(act_t, normed);
  const act_t* x = norm_rows<threads(E) / 32>(normed, &shared.part[0][0][0][0][0], a, rows);
#else
  const act_t* x = (const act_t*)a.x;
#endif
  float sum[TOKEN_TILES][4];
  sum_few<E>(sum, shared, w, LaunchRows{x, first_token + g, rows}, a.K);
  if (of_block != 0) return;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int n = blockIdx.x * 16 + g + 8 * (i >> 1), token = first_token + 8 * j + 2 * t + (i & 1);
      if (token >= rows || n >= N) continue;
      if constexpr (E == SILU) {
        ((act_t*)a.y)[(size_t)token * N + n] =
            to_act(silu(sum[j][i]) * shared.part[0][WARPS][j][lane][i]);
      } else {
        float* y = a.y + (size_t)token * a.y_stride + n;
        *y = E == ADD ? *y + sum[j][i] : sum[j][i];
      }
    }
}
