// linear_few.cuh - products with a weight matrix for up to 32 tokens: bound by the bytes of W.
//
// IS: the body of linear_few, linear_add, linear_silu, norm_linear, norm_silu, and of the launches of
// several matrices, linears.cuh. They differ in where x comes from and where a sum goes. A kernel is
// a file, so that only what is launched is compiled. All give the bits of `linear` and the launches
// that they stand for.
// IS NOT: the order of a sum, see linear.cuh, or what may stand for what, see backends/cuda/fusion.py.
//
// Contract: row t < cursor.rows of the output; other rows are neither read nor written.
//           ALIGNED: K is a multiple of 8; WHOLE: of K_SLICE, so that every k of a slice is there.
// Order:    linear.cuh. Of the warps of a row tile, warp w takes slices w, w + WARPS, ...; the first
//           folds them in order through shared memory. A norm's sum is norm.cu's: its warps are
//           shared out among those of the block.
// Launch:   grid (row tiles, T / (8 * TOKEN_TILES)), WARPS warps per row tile of the block: few, so
//           that blocks of one multiprocessor overlap, unless there are too few row tiles to fill
//           the device. A warp holds two batches of weights, in bfloat16 a slice (8 KB), and loads
//           one while it multiplies the other; the first ones it loads before it waits for the
//           kernel that makes x.
#include "linear.cuh"
#include "few.cuh"

// What the registers must leave room for on a multiprocessor: 16 warps, 8 of the widest, or where
// chains and scales need registers too.
constexpr bool IS_WIDE = TOKEN_TILES == 4 || (TOKEN_TILES == 2 && FOLDS);
DEVICE constexpr int min_blocks(Epilogue e) { return (IS_WIDE ? 256 : 512) / threads(e); }
// Chunks between two questions whether there are more, which none needs if K is whole: but the
// compiler would rather prepare all that lie between, and runs out of registers.
constexpr int CHUNKS_AT_ONCE = !WHOLE || TOKEN_TILES > 1 || HAS_MIN ? 1 : FOLDS ? 2 : SLICE_CHUNKS;
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

// x at p, four k and four from STEP_K on; zeros where there are fewer than 1, or STEP_K + 1, `left`
DEVICE Operand load_x(const act_t* p, int left) {
#if ALIGNED
  bool is_in = WHOLE || left > 0, is_in2 = WHOLE || left > STEP_K;
#if ACT_PARTS > 1
  constexpr uint4 zero = {0, 0, 0, 0};
  uint4 first = is_in ? *reinterpret_cast<const uint4*>(p) : zero,
        second = is_in2 ? *reinterpret_cast<const uint4*>(p + STEP_K) : zero;
#if ACT_PARTS == 2
  if (IS_ORDERED)
    return Operand{
        {{{first.x, first.y}, {second.x, second.y}}, {{first.z, first.w}, {second.z, second.w}}}};
#endif
  return unpack_operand(first, second);
#else
  if (STEP_K == 4)
    return unpack_operand(is_in ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0));
  constexpr uint2 zero = {0, 0};
  uint2 first = is_in ? *reinterpret_cast<const uint2*>(p) : zero,
        second = is_in2 ? *reinterpret_cast<const uint2*>(p + STEP_K) : zero;
  return unpack_operand(make_uint4(first.x, first.y, second.x, second.y));
#endif
#else
  act_t v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int at = i % 4 + i / 4 * STEP_K;
    v[i] = at < left ? p[at] : 0;
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
    uint4 v = WHOLE || at + 8 * t < K ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
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
  if (WHOLE && first >= end) return;
  const uint8_t* codes = tile.codes + (size_t)(unsigned)first * CHUNK_BYTES;
#pragma unroll
  for (int i = 0; i < BATCH_CHUNKS; i++) {
    if (!WHOLE && first + i >= end) continue;
    if constexpr (IS_C_ORDER) batch.codes[i] = load_rows(tile, (first + i) * K_CHUNK, lane & 3, K);
    else batch.codes[i] = load_codes<true>(codes + i * CHUNK_BYTES, lane);
  }
#pragma unroll
  for (int p = 0; p < N_PLANES; p++) {
    unsigned k = first * K_CHUNK, group = k / plane_size(p);
    const uint8_t* scales = tile.plane[p] + (size_t)group * (16 * plane_bytes(p));
#pragma unroll
    for (int i = 0; i < plane_groups(p, BATCH_CHUNKS * K_CHUNK); i++)
      if (WHOLE || (int)k + i * plane_size(p) < end * K_CHUNK)
        batch.scales[p][i] = load_scale(p, scales + i * 16 * plane_bytes(p), lane >> 2);
  }
}

// x: where the lane's k of the batch begin, in the rows of its tokens
DEVICE void multiply_batch(float (&c)[TOKEN_TILES][4], const Batch& batch, int first, int end,
                           const act_t* const (&x)[TOKEN_TILES], int left) {
#pragma unroll
  for (int i = 0; i < BATCH_CHUNKS; i++) {
    if ((i > 0 || !WHOLE) && i % CHUNKS_AT_ONCE == 0 && first + i >= end) break;
    StoredScale stored[2];
#pragma unroll
    for (int f = 0; f < CHUNK_SCALES; f++)
#pragma unroll
      for (int p = 0; p < N_PLANES; p++)
        stored[f].plane[p] = batch.scales[p][(i * K_CHUNK + 16 * f) / plane_size(p)];
    Chunk w = chunk_of(batch.codes[i], stored);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) {
      Operand b = load_x(x[j] + i * K_CHUNK, left - i * K_CHUNK);
      multiply_chunk(c[j], w, b, sum_x(b));
    }
  }
}

DEVICE void fold_super(Totals& totals, float (&sum)[TOKEN_TILES][4], int lane) {
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++) {
    fold(totals[j][lane], sum[j]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[j][i] = 0.0f;
  }
}

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
    const float* scales = reinterpret_cast<const float*>(tile.codes + row_scale_offset(n_chunks));
    w.row_scale[0] = scales[2 * (lane >> 2)];
    w.row_scale[1] = scales[2 * (lane >> 2) + 1];
  }
  return w;
}

// The sums of the block's row tile, in its first warp; of several, those of the others are then in
// part[0][WARPS], part[0][2 * WARPS], ... All warps of the block call it. of_row: where in x the
// rows of this lane's tokens begin, and in them its k.
template <Epilogue E>
DEVICE void sum_few(float (&sum)[TOKEN_TILES][4], FewShared<E>& shared, FewWeights& w,
                    const act_t* x, const int (&of_row)[TOKEN_TILES], int K) {
  int of_block = threadIdx.x >> 5, half = parts(E) > 1 ? of_block / WARPS : 0,
      warp = of_block - half * WARPS, lane = threadIdx.x & 31, t = lane & 3;
  int n_chunks = ceil_div(K, K_CHUNK), n_slices = ceil_div(K, K_SLICE);
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[j][i] = 0.0f;  // of the super-slice
  if (warp == 0)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) shared.totals[half][j][lane][i] = 0.0f;
#pragma unroll 1
  for (int s0 = 0; s0 < n_slices; s0 += WARPS) {
    float c[TOKEN_TILES][4] = {};
    int slice = (s0 + warp) * SLICE_CHUNKS, turn = s0 / WARPS & 1;
    auto multiply = [&](const Batch& batch, int first) {
      const act_t* at[TOKEN_TILES];
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++) at[j] = x + of_row[j] + first * K_CHUNK;
      multiply_batch(c, batch, first, n_chunks, at, K - first * K_CHUNK - LANE_K * t);
    };
    if (!WHOLE || slice < n_chunks) {
#pragma unroll
      for (int i = 0; i < SLICE_CHUNKS; i += 2 * BATCH_CHUNKS) {
        int first = slice + i, next = i + 2 * BATCH_CHUNKS < SLICE_CHUNKS
                                          ? first + 2 * BATCH_CHUNKS
                                          : slice + WARPS * SLICE_CHUNKS;
        multiply(w.front, first);
        load_batch(w.front, w.tile, next, n_chunks, lane, K);
        multiply(w.back, first + BATCH_CHUNKS);
        load_batch(w.back, w.tile, next + BATCH_CHUNKS, n_chunks, lane, K);
      }
    }
    if (WARPS == 1) {
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++) fold(sum[j], c[j]);
      if ((s0 + 1) % SUPER_SLICES == 0) fold_super(shared.totals[half], sum, lane);
      continue;
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
      *reinterpret_cast<float4*>(shared.part[turn][of_block][j][lane]) =
          make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
    // nobody writes this turn's part again before the first warp has passed the next barrier
    __syncthreads();
    if (warp == 0)
#pragma unroll 1
      for (int v = 0; v < min(WARPS, n_slices - s0); v++) {
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++)
          fold(sum[j], shared.part[turn][of_block + v][j][lane]);
        if ((s0 + v + 1) % SUPER_SLICES == 0) fold_super(shared.totals[half], sum, lane);
      }
  }
  if (warp == 0) {
    fold_super(shared.totals[half], sum, lane);  // the last one, or +0, which changes nothing
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sum[j][i] = sum_with_row_scale(shared.totals[half][j][lane][i], w.row_scale[i >> 1]);
  }
  if constexpr (parts(E) > 1) {  // the place of a first warp: nobody else's
    if (warp == 0 && of_block > 0)
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j++)
        *reinterpret_cast<float4*>(shared.part[0][of_block][j][lane]) =
            make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
    __syncthreads();
  }
}

// A block's part of a launch whose arguments are `a`.
template <Epilogue E, class Args>
DEVICE void multiply_few(const Args& a, const Product& p, FewShared<E>& shared) {
  int of_block = threadIdx.x >> 5, half = E == SILU ? of_block / WARPS : 0,
      warp = of_block - half * WARPS, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int K = a.K, n_chunks = ceil_div(K, K_CHUNK), first_token = blockIdx.y * 8 * TOKEN_TILES;
  // weights do not depend on the predecessor
  FewWeights w = load_weights(tile_of(p.w, p.tile + half * p.half, n_chunks, p.N, K, g, t), warp,
                              n_chunks, lane, K);
  begin();
  int rows = a.cursor[CURSOR_ROWS];
  if (first_token >= rows) return;
#ifdef NORM_THREADS  // all rows: there is one block of tokens
  const act_t* x = norm_rows<threads(E) / 32>(&shared.part[0][0][0][0][0], a, rows);
#else
  const act_t* x = (const act_t*)a.x;
#endif
  int of_row[TOKEN_TILES];  // columns beyond the last are copies of it, which nobody takes
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
    of_row[j] = min(first_token + g + 8 * j, rows - 1) * K + LANE_K * t;
  float sum[TOKEN_TILES][4];
  sum_few<E>(sum, shared, w, x, of_row, K);
  if (of_block != 0) return;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int n = p.tile * 16 + g + 8 * (i >> 1), token = first_token + 8 * j + 2 * t + (i & 1);
      if (token >= rows || n >= p.n_out) continue;
      size_t at = (size_t)token * p.stride + n;
      if constexpr (E == SILU) {
        ((act_t*)p.y)[at] = to_act(silu(sum[j][i]) * shared.part[0][WARPS][j][lane][i]);
      } else {
        float* y = (float*)p.y + at;
        *y = E == ADD ? *y + sum[j][i] : sum[j][i];
      }
    }
}
