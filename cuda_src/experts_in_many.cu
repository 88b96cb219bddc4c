// experts_in_many.cu - h = silu(x G^T) (x U^T) of the experts of many rows, W = [G; U] of each.
//
// Contract: experts_many.cuh; each row and expert as linear, then silu_mul, bit for bit.
// Shapes:   x [T, H] activations, w [E 2 I, H] as in weights.cuh, picks [T, P], h [T, P, I]
//           activations. I is a multiple of 32.
// Launch:   the first half of a warp's row tiles are of G, the second half the same rows of U.
#include "flashrt.cuh"
#include "experts_many.cuh"

constexpr int PAIRS = ROW_TILES / 2, BLOCK_PAIRS = WARPS_N * PAIRS;
static_assert(ROW_TILES % 2 == 0, "a row tile of G needs the one of U");

KERNEL(THREADS, BLOCKS) experts_in_many(ARGS experts_in_args launch) {
  OPEN_RUN(experts_in);
  begin();
  PickTile picks(a);
  if (picks.n < 1) return;
  int n_tiles = a.I / 16, first_tile = blockIdx.y * BLOCK_PAIRS;
  auto tile_at = [&](int r) {
    int pair = min(first_tile + r / ROW_TILES * PAIRS + r % PAIRS, n_tiles - 1);
    return (2 * picks.expert + r % ROW_TILES / PAIRS) * n_tiles + pair;
  };
  Sums sum = {};
  sum_many(sum, a.w, a.x, 2 * a.E * a.I, a.H, tile_at, [&](int i) { return picks.pick(i) / a.P; });
  int warp = opaque(threadIdx.x) >> 5, lane = opaque(threadIdx.x) & 31, g = lane >> 2, t = lane & 3;
  int row_tile = warp % WARPS_N * ROW_TILES, token = warp / WARPS_N * 8 * TOKEN_TILES;
#pragma unroll
  for (int r = 0; r < PAIRS; r++) {
    int pair = first_tile + row_tile / 2 + r;
    float gate_scale[2], up_scale[2];
    load_row_scales(gate_scale, a.w, tile_at(row_tile + r), a.H, g);
    load_row_scales(up_scale, a.w, tile_at(row_tile + PAIRS + r), a.H, g);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int m = token + 8 * j + 2 * t + (i & 1);
        if (m >= picks.n || pair >= n_tiles) continue;
        float gate = sum_with_row_scale(sum[r][j][i], gate_scale[i >> 1]),
              up = sum_with_row_scale(sum[PAIRS + r][j][i], up_scale[i >> 1]);
        ((act_t*)a.h)[(size_t)picks.pick(m) * a.I + pair * 16 + g + 8 * (i >> 1)] =
            to_act(silu(gate) * up);
      }
  }
}
