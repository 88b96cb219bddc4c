// experts_out_many.cu - products = h D^T of the experts of many rows; experts_sum adds them up.
//
// Contract: experts_many.cuh; each row and expert as linear, bit for bit.
// Shapes:   h [T, P, I] activations, w [E H, I] as in weights.cuh, picks [T, P], products [T, P, H]
//           float. H is a multiple of 32.
#include "flashrt.cuh"
#include "experts_many.cuh"

KERNEL(THREADS, BLOCKS) experts_out_many(ARGS experts_out_args launch) {
  OPEN_RUN(experts_out);
  begin();
  PickTile picks(a);
  if (picks.n < 1) return;
  int n_tiles = a.H / 16, first_tile = blockIdx.y * BLOCK_TILES;
  auto tile_at = [&](int r) { return picks.expert * n_tiles + min(first_tile + r, n_tiles - 1); };
  Sums sum = {};
  sum_many(sum, a.w, a.h, a.E * a.H, a.I, tile_at, [&](int i) { return picks.pick(i); });
  int warp = opaque(threadIdx.x) >> 5, lane = opaque(threadIdx.x) & 31, g = lane >> 2, t = lane & 3;
  int row_tile = warp % WARPS_N * ROW_TILES, token = warp / WARPS_N * 8 * TOKEN_TILES;
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    int tile = first_tile + row_tile + r;
    float row_scale[2];
    load_row_scales(row_scale, a.w, tile_at(row_tile + r), a.I, g);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int m = token + 8 * j + 2 * t + (i & 1);
        if (m >= picks.n || tile >= n_tiles) continue;
        a.products[(size_t)picks.pick(m) * a.H + tile * 16 + g + 8 * (i >> 1)] =
            sum_with_row_scale(sum[r][j][i], row_scale[i >> 1]);
      }
  }
}
