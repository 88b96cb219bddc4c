// experts_out_one.cu - y = sum over j of gates[j] (h[j] D^T), D that of expert picks[j], of one row.
//
// Contract: as experts_out_few, then experts_sum, bit for bit: each product in the order of
//           linear.cuh, then one fma each from 0, in ascending j.
// Shapes:   h [1, P, I] activations, w [E H, I] as in weights.cuh, picks [1, P], gates [1, P] float,
//           y [1, H] float. P = PICKS, H is a multiple of 32.
// Launch:   a block is a row tile of every expert, with WARPS warps for each.
#include "flashrt.cuh"
#include "experts_few.cuh"

constexpr int THREADS = threads(SUM), MIN_BLOCKS = 1;

KERNEL(THREADS, MIN_BLOCKS) experts_out_one(ARGS experts_out_args launch) {
  OPEN_RUN(experts_out);
  __shared__ __align__(16) FewShared<SUM> shared;
  begin();
  if (a.cursor[CURSOR_ROWS] < 1) return;
  int of_block = threadIdx.x >> 5, j = of_block / WARPS, lane = threadIdx.x & 31, g = lane >> 2,
      t = lane & 3, n_chunks = ceil_div(a.I, K_CHUNK);
  Tile tile = tile_of(a.w, a.picks[j] * gridDim.x + blockIdx.x, n_chunks, a.E * a.H, a.I, g, t);
  FewWeights w = load_weights(tile, of_block - j * WARPS, n_chunks, lane, a.I);
  int of_row[1] = {j * a.I + LANE_K * t};  // every column is a copy of it
  float sum[1][4];
  sum_few<SUM>(sum, shared, w, (const act_t*)a.h, of_row, a.I);
  if (of_block != 0 || t != 0) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float total = fmaf(a.gates[0], sum[0][2 * half], 0.0f);
#pragma unroll
    for (int i = 1; i < PICKS; i++)
      total = fmaf(a.gates[i], shared.part[0][i * WARPS][0][lane][2 * half], total);
    a.y[blockIdx.x * 16 + g + 8 * half] = total;
  }
}
