// linear_many.cu - y = x W^T for many tokens: bound by the tensor cores.
//
// Contract: y[t][n] for t < cursor.rows; other rows are neither read nor written.
// Shapes:   x [T, K] activations, w [N, K] as in weights.cuh, y [T, N] float.
// Order:    linear.cuh: a slice in one accumulator, the slices of its super-slice before it in a
//           second one; super-slices are added up in y, by the thread that stores it. Where the
//           tiles do not fill the device, blocks share K: each leaves its super-slices in `sums`,
//           the last one of a tile adds them up in order.
// Launch:   linear_many.cuh; grid over tokens, whose blocks share rows of W while these are in the
//           L2 cache, then rows of W, then parts of K, those of most k first.
#include "flashrt.cuh"
#include "linear_many.cuh"

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

// Adds a super-slice to what y has of those before it, and clears it; with the last one y is whole.
DEVICE void add_to_y(const linear_args& a, Sums& sum, int tile, int token, int rows, bool is_first,
                     bool is_last) {
  // addresses of y would take the registers of the loop over k
  int lane = opaque(threadIdx.x) & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    int first_row = (tile + r) * 16 + g;
    float row_scale[2] = {1.0f, 1.0f};
    if (first_row < a.N) load_row_scales(row_scale, a.w, tile + r, a.K, g);
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
DEVICE void leave(Sums& sum, float4* to, bool is_added) {
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
  int last_tile = ceil_div(a.N, 16) - 1;
  Feed feed = feed_of((const void*)a.w, (const act_t*)a.x, a.N, a.K, begin_chunk,
                      [&](int r) { return min(first_tile + r, last_tile); },
                      [&](int i) { return min(first_token + i, rows - 1); });
  load_first_stages(feed, shared, end_chunk);

  Sums sum = {};  // of the super-slice
  Turn turn;
#pragma unroll 1
  for (int super = part * split.supers; super * SUPER_CHUNKS < end_chunk; super++) {
    int super_end = min((super + 1) * SUPER_CHUNKS, end_chunk);
    add_super(sum, feed, turn, shared, super * SUPER_CHUNKS, super_end, end_chunk, row_tile, token,
              lane);
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
