// experts_out_few.cu - products = h D^T of the experts of few rows; experts_sum adds them up.
//
// Contract: experts_few.cuh; each row and expert as linear, bit for bit.
// Shapes:   h [T, P, I] activations, w [E H, I] as in weights.cuh, picks [T, P], products [T, P, H]
//           float. H is a multiple of 32.
#include "flashrt.cuh"
#include "experts_few.cuh"

constexpr int THREADS = threads(STORE), MIN_BLOCKS = expert_blocks(STORE);

KERNEL(THREADS, MIN_BLOCKS) experts_out_few(ARGS experts_out_args launch) {
  OPEN_RUN(experts_out);
  __shared__ __align__(16) FewShared<STORE> shared;
  __shared__ BlockPicks block;
  begin();
  int n = a.cursor[CURSOR_ROWS] * a.P;
  if (blockIdx.y >= n) return;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3,
      n_chunks = ceil_div(a.I, K_CHUNK), expert = a.picks[blockIdx.y];
  Tile tile = tile_of(a.w, expert * gridDim.x + blockIdx.x, n_chunks, a.E * a.H, a.I, g, t);
  FewWeights w = load_weights(tile, warp, n_chunks, lane, a.I);
  if (!take_picks(block, a.picks, n, expert)) return;
  int of_row[TOKEN_TILES];
  find_rows(of_row, block, 1, a.I, lane);
  float sum[TOKEN_TILES][4];
  sum_few<STORE>(sum, shared, w, (const act_t*)a.h, of_row, a.I);
  if (warp != 0) return;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int pick = block.of[8 * j + 2 * t + (i & 1)];
      if (pick >= 0)
        a.products[(size_t)pick * a.H + blockIdx.x * 16 + g + 8 * (i >> 1)] = sum[j][i];
    }
}
