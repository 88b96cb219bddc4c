// experts_in_few.cu - h = silu(x G^T) (x U^T) of the experts of few rows, W = [G; U] of each.
//
// Contract: experts_few.cuh; each row and expert as linear_silu, bit for bit.
// Shapes:   x [T, H] activations, w [E 2 I, H] as in weights.cuh, picks [T, P], h [T, P, I]
//           activations. I is a multiple of 32.
// Launch:   a block is a row tile of G and the one of U, with warps of its own for each.
#include "flashrt.cuh"
#include "experts_few.cuh"

constexpr int THREADS = threads(SILU), MIN_BLOCKS = expert_blocks(SILU);

KERNEL(THREADS, MIN_BLOCKS) experts_in_few(ARGS experts_in_args launch) {
  OPEN_RUN(experts_in);
  __shared__ __align__(16) FewShared<SILU> shared;
  __shared__ BlockPicks block;
  begin();
  int n = a.cursor[CURSOR_ROWS] * a.P;
  if (blockIdx.y >= n) return;
  int of_block = threadIdx.x >> 5, half = of_block / WARPS, lane = threadIdx.x & 31, g = lane >> 2,
      t = lane & 3, n_chunks = ceil_div(a.H, K_CHUNK), expert = a.picks[blockIdx.y];
  Tile tile = tile_of(a.w, (2 * expert + half) * gridDim.x + blockIdx.x, n_chunks, 2 * a.E * a.I,
                      a.H, g, t);
  FewWeights w = load_weights(tile, of_block - half * WARPS, n_chunks, lane, a.H);
  if (!take_picks(block, a.picks, n, expert)) return;
  int of_row[TOKEN_TILES];
  find_rows(of_row, block, a.P, a.H, lane);
  float sum[TOKEN_TILES][4];
  sum_few<SILU>(sum, shared, w, (const act_t*)a.x, of_row, a.H);
  if (of_block != 0) return;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int pick = block.of[8 * j + 2 * t + (i & 1)];
      if (pick >= 0)
        ((act_t*)a.h)[(size_t)pick * a.I + blockIdx.x * 16 + g + 8 * (i >> 1)] =
            to_act(silu(sum[j][i]) * shared.part[0][WARPS][j][lane][i]);
    }
}
