// experts_many.cuh - products with the weights of experts for many rows: bound by tensor cores, or by
// the bytes of weights where few rows picked each expert.
//
// IS: which expert and which picks a block of experts_in_many or experts_out_many takes, and the
// loop over its super-slices. IS NOT: a product, see linear_many.cuh, or the grouping, see
// experts_group.cu.
//
// Contract: as the op. A pick is a row and one of its P experts, pick = row P + j.
// Order:    linear.cuh, of each product; super-slices are added up in registers. A column of mma
//           knows nothing of its neighbours, so it does not matter which picks share a block.
// Launch:   grid (tiles of picks, blocks of an expert's rows of W). Tile i is the block's if
//           members[i][1] says so: an expert, and which BLOCK_TOKENS of its picks. Experts that many
//           rows picked have several tiles, next to each other: they share W in the L2 cache.
#pragma once
#include "linear_many.cuh"

// An expert's picks of a block.
struct PickTile {
  const int* members;  // [pick of the tile][2]: a pick of the launch, and something else
  int expert, n;       // n < 1: there is no such tile

  template <class Args>
  DEVICE explicit PickTile(const Args& a) : members(a.members), expert(0), n(0) {
    int picks = a.cursor[CURSOR_ROWS] * a.P, i = blockIdx.x;
    int tile = i < picks ? a.members[2 * i + 1] : -1;
    if (tile < 0) return;
    expert = tile / MOST_TILES;
    int first = tile % MOST_TILES * BLOCK_TOKENS, start = a.groups[2 * expert];
    n = min(a.groups[2 * expert + 1] - first, BLOCK_TOKENS);
    members = a.members + 2 * (start + first);
  }
  DEVICE int pick(int i) const { return members[2 * min(i, n - 1)]; }
};

// The sums of the warp's tiles over all K. tile_at and row_at: see feed_of.
template <class TileAt, class RowAt>
DEVICE void sum_many(Sums& total, const void* w, const void* x, int N, int K, TileAt tile_at,
                     RowAt row_at) {
  DYNAMIC_SHARED(uint4, shared);
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n_chunks = ceil_div(K, K_CHUNK);
  int row_tile = warp % WARPS_N * ROW_TILES, token = warp / WARPS_N * 8 * TOKEN_TILES;
  Feed feed = feed_of(w, (const act_t*)x, N, K, 0, tile_at, row_at);
  load_first_stages(feed, shared, n_chunks);
  Turn turn;
#if IS_LONG
#pragma unroll 1
  for (int first = 0; first < n_chunks; first += SUPER_CHUNKS) {
    Sums sum = {};
    add_super(sum, feed, turn, shared, first, min(first + SUPER_CHUNKS, n_chunks), n_chunks,
              row_tile, token, lane);
    fold_sums(total, sum);
  }
#else  // one super-slice
  add_super(total, feed, turn, shared, 0, n_chunks, n_chunks, row_tile, token, lane);
#endif
  copy_async_wait<0>();
}
