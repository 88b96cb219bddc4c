// attention_few.cu - attention for few rows: blocks of keys side by side, then a merge.
//
// Contract: y = softmax(q K^T / sqrt(D)) V, times sigmoid(gate) where GATED, for valid rows. Query
//           head h uses key head h / GROUP; row t sees keys [SHIFT, position + t], or with SEES other
//           than SEEN_PAST all of the launch, or all before it; if there are none, y = 0.
// Shapes:   q [T, Nq, D], u [T, U] (GATED: gates beside queries), keys and values [Nk, S, D],
//           partials [TP, Nq, B, D + 2] = (maximum, sum, o[D]) per block of 256 keys, y [T, Nq * D]
//           activations; key_scales and value_scales [Nk, S] of codes.
// Order:    attention.cuh. One graph serves every position: a block takes every gridDim.x-th block
//           of keys, up to the position's. Each partial is computed alone, so the grid changes no
//           bits.
// Launch:   attention_partial: grid (up to B, Nk * T / BLOCK_ROWS), 256 threads. attention_merge: grid
//           (Nq, T), a thread per dim.
#include "flashrt.cuh"
#include "attention.cuh"

// Two blocks at a time for few columns. The split of a float cache takes more registers than that
// leaves; others take them or not, as ptxas sees fit: held to two blocks, some spill a few bytes.
#if CACHE_F32
#define BOUNDS 256, 1
#elif CACHE_CODES || ACT_PARTS > 1 || COLUMN_TILES > 2 || (SHIFT && GROUP > 4)
#define BOUNDS 256
#else
#define BOUNDS 256, 2
#endif

struct Turn {
  Queries queries;
  int block;  // of keys
};

// A turn of the loop. Not inlined, and with its state in shared memory: else what does not change
// from turn to turn stays in registers, and one block at a time is all that is left of two.
__device__ __noinline__ void partial_of_block(const attention_args& launch, const Turn& turn) {
  DYNAMIC_SHARED(Shared, pointer);
  Shared& shared = *pointer;
  Queries queries = turn.queries;
  int block = turn.block;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first_key = block * BLOCK_KEYS;
  attention_args a = moved(launch);
  int key_head = blockIdx.y % a.Nk;
  size_t plane = (size_t)key_head * a.S * HEAD_DIM;
  Accumulator s = {};
  scores(s, shared, (const cache_t*)a.keys + plane, first_key + 32 * warp, queries.limit());
  softmax(s, shared, queries, first_key + 32 * warp, Scales(launch, key_head));
  __syncthreads();
  a = moved(launch);

  auto partial = [&](int column) {
    int head = key_head * GROUP + column % GROUP;
    return a.partials +
           (((size_t)queries.row(column) * a.Nq + head) * a.B + block) * (HEAD_DIM + 2);
  };
  if (threadIdx.x < COLUMNS && queries.sees(threadIdx.x, first_key)) {
    float2 statistics = {shared.columns.block_max(threadIdx.x),
                         block_sum_of(shared.columns, threadIdx.x)};
    *reinterpret_cast<float2*>(partial(threadIdx.x)) = statistics;
  }
  if (warp >= DIM_GROUPS) return;
  Accumulator o = {};
  weigh_values(o, shared, (const cache_t*)a.values + plane, first_key, queries, warp);
  int g = lane >> 2, t = lane & 3, dim = 32 * warp + 4 * g;
#pragma unroll
  for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * j + 2 * t + e;
      if (!queries.sees(column, first_key) || dim >= HEAD_DIM) continue;
      float2* to = reinterpret_cast<float2*>(partial(column) + 2 + dim);
      to[0] = {o[0][j][e], o[0][j][e + 2]};
      to[1] = {o[1][j][e], o[1][j][e + 2]};
    }
}

KERNEL(BOUNDS) attention_partial(ARGS attention_args launch) {
  OPEN_RUN(attention);
  DYNAMIC_SHARED(Shared, pointer);
  Shared& shared = *pointer;
  begin();
  int key_head = blockIdx.y % a.Nk, first_row = blockIdx.y / a.Nk * BLOCK_ROWS;
  Queries queries = {first_row, a.cursor[CURSOR_ROWS], a.cursor[CURSOR_POSITION]};
  int limit = queries.limit();
  if (queries.first_row >= queries.rows || (int)blockIdx.x * BLOCK_KEYS >= limit) return;
  __shared__ Turn turn;
  if (threadIdx.x == 0) turn = {queries, (int)blockIdx.x};
  load_queries(shared, a, queries, key_head);
  for (;;) {
    __syncthreads();  // queries are there, and weights of the block before have been read
    int first_key = turn.block * BLOCK_KEYS;
    if (first_key >= turn.queries.limit()) break;
    if (is_key(first_key + BLOCK_KEYS - 1)) partial_of_block(launch, turn);
    __syncthreads();
    if (threadIdx.x == 0) turn.block += gridDim.x;
  }
}

constexpr int BATCH = 32;  // blocks merged at a time

KERNEL(256) attention_merge(ARGS attention_args launch) {
  OPEN_RUN(attention);
  begin();
  __shared__ float before[BATCH], factor[BATCH], sums[BATCH];
  int head = blockIdx.x, row = blockIdx.y, d = threadIdx.x;
  if (row >= a.cursor[CURSOR_ROWS]) return;
  int first_block = SHIFT / BLOCK_KEYS;
  int last_key = SEES == SEEN_PAST
                     ? a.cursor[CURSOR_POSITION] + row
                     : Queries{0, a.cursor[CURSOR_ROWS], a.cursor[CURSOR_POSITION]}.limit() - 1;
  int n_blocks = last_key < 0 || !is_key(last_key) ? 0 : last_key / BLOCK_KEYS + 1 - first_block;
  const float* partials =
      a.partials + (((size_t)row * a.Nq + head) * a.B + first_block) * (HEAD_DIM + 2);
  float max = -INF, sum = 0.0f, o = 0.0f;
  for (int first = 0; first < n_blocks; first += BATCH) {
    int n = min(BATCH, n_blocks - first);
    const float* batch = partials + (size_t)first * (HEAD_DIM + 2);
    float block[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      block[i] = i < n && d < HEAD_DIM ? batch[i * (HEAD_DIM + 2) + 2 + d] : 0.0f;
    // maxima so far: a scan over the lanes' blocks; exact, so any shape will do
    if (threadIdx.x < 32) {
      int i = threadIdx.x;
      float own = i < n ? batch[i * (HEAD_DIM + 2)] : -INF, largest = fmaxf(own, max);
#pragma unroll
      for (int k = 1; k < 32; k <<= 1) {
        float left = __shfl_up_sync(FULL_WARP, largest, k);
        if (i >= k) largest = fmaxf(largest, left);
      }
      float left = __shfl_up_sync(FULL_WARP, largest, 1);
      Factors f = merge_factors(i ? left : max, own);
      before[i] = f.before;
      factor[i] = f.block;
      sums[i] = i < n ? batch[i * (HEAD_DIM + 2) + 1] : 0.0f;
      max = __shfl_sync(FULL_WARP, largest, 31);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (i < n) {
        sum = merge(sum, sums[i], before[i], factor[i]);
        o = merge(o, block[i], before[i], factor[i]);
      }
    __syncthreads();
  }
  if (d >= HEAD_DIM) return;
  const float* gate = gates_of(a, row, head) + d;
  ((act_t*)a.y)[((size_t)row * a.Nq + head) * HEAD_DIM + d] = to_act(finished(o, sum, gate));
}
