// attention_many.cu - attention for many rows: a block of queries walks over the keys.
//
// Contract, shapes and order: as attention_few.cu; `partials` is not used.
// Launch:   grid (T / BLOCK_ROWS, Nk), 256 threads; COLUMNS queries per block. Running maxima and
//           sums are in shared memory, running outputs in registers.
#include "flashrt.cuh"
#include "attention.cuh"

KERNEL(256) attention_rows(ARGS attention_args launch) {
  OPEN_RUN(attention);
  DYNAMIC_SHARED(Shared, pointer);
  Shared& shared = *pointer;
  Columns& columns = shared.columns;
  begin();
  // the last rows have most keys: they start first
  int key_head = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2,
      t = lane & 3;
  Queries queries = {int(gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS, a.cursor[CURSOR_ROWS],
                     a.cursor[CURSOR_POSITION]};
  if (queries.first_row >= queries.rows) return;
  int limit = queries.position + queries.rows;
  int last_key = queries.position + min(queries.first_row + BLOCK_ROWS, queries.rows) - 1;
  const cache_t* keys = (const cache_t*)a.keys + (size_t)key_head * a.S * HEAD_DIM;
  const cache_t* values = (const cache_t*)a.values + (size_t)key_head * a.S * HEAD_DIM;
  load_queries(shared, a, queries, key_head);
  if (threadIdx.x < COLUMNS) {
    columns.max[threadIdx.x] = -INF;
    columns.sum[threadIdx.x] = 0.0f;
  }
  __syncthreads();

  Accumulator o = {};
  for (int first_key = SHIFT / BLOCK_KEYS * BLOCK_KEYS; first_key <= last_key;
       first_key += BLOCK_KEYS) {
    Accumulator block = {};
    scores(block, shared, keys, first_key + 32 * warp, limit);
    softmax(block, shared, queries, first_key + 32 * warp, Scales(launch, key_head));
    __syncthreads();
    if (threadIdx.x < COLUMNS) {
      int c = threadIdx.x;
      Factors f = merge_factors(columns.max[c], columns.block_max[c]);
      bool is_hidden = !queries.sees(c, first_key);
      columns.factor[c] = is_hidden ? make_float2(-1.0f, 0.0f) : make_float2(f.before, f.block);
      if (!is_hidden) {
        columns.sum[c] = merge(columns.sum[c], block_sum_of(columns, c), f.before, f.block);
        columns.max[c] = f.max;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) block[i][j][e] = 0.0f;
    if (warp < DIM_GROUPS) weigh_values(block, shared, values, first_key, queries, warp);
    __syncthreads();  // factors are there, weights are no longer needed
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float2 f = columns.factor[8 * j + 2 * t + e];
        if (f.x < 0.0f) continue;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float& sum = o[i][j][e + 2 * h];
            sum = merge(sum, block[i][j][e + 2 * h], f.x, f.y);
          }
      }
  }

  int dim = 32 * warp + 4 * g;
  if (dim >= HEAD_DIM) return;
#pragma unroll
  for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * j + 2 * t + e, row = queries.row(column),
          head = key_head * GROUP + column % GROUP;
      if (queries.last_key(column) < 0) continue;
      const float* gate = gates_of(a, row, head) + dim;
      act_t* y = (act_t*)a.y + ((size_t)row * a.Nq + head) * HEAD_DIM + dim;
      float sum = columns.sum[column];
      store_act4(y, finished(o[0][j][e], sum, gate), finished(o[0][j][e + 2], sum, gate + 1),
                 finished(o[1][j][e], sum, gate + 2), finished(o[1][j][e + 2], sum, gate + 3));
    }
}
