// experts_few.cuh - products with the weights of experts for few rows: bound by the bytes of those.
//
// IS: which picks a block of experts_in_few or experts_out_few takes, and their rows of x. IS NOT: a
// product, see linear_few.cuh.
//
// Contract: as the op. A pick is a row and one of its P experts. Picks of the same expert go
//           together, 8 * TOKEN_TILES at a time in the order of rows: the block of the first one
//           takes them all, those of the others end. So an expert's weights are read once, however
//           many rows picked it, but for more than that.
// Order:    linear.cuh, of each product. A column of mma knows nothing of its neighbours, so it does
//           not matter who picked the same expert.
// Launch:   grid (row tiles of an expert, T * P): a block per row tile and pick.
#pragma once
#include "linear_few.cuh"

constexpr int BLOCK_PICKS = 8 * TOKEN_TILES;

// Blocks of a multiprocessor that registers must leave room for: codes in two pieces or with a table
// of their own, and the rows of picks, take those of half the warps.
constexpr bool IS_TIGHT = W_DTYPE == DTYPE_U5 || W_DTYPE == DTYPE_U6 || W_DTYPE == DTYPE_E2M1;
DEVICE constexpr int expert_blocks(Epilogue e) {
  return IS_TIGHT && !IS_WIDE ? ceil_div(min_blocks(e), 2) : min_blocks(e);
}

// Picks of the block: of one expert, ascending; -1 where there are fewer.
struct BlockPicks {
  int of[BLOCK_PICKS];
};

// Whether the block has picks; all threads call it. n: picks of all valid rows.
DEVICE bool take_picks(BlockPicks& block, const int* picks, int n, int expert) {
  int first = blockIdx.y, lane = threadIdx.x & 31, before = 0, taken = 0;
  for (int i0 = 0; i0 < first; i0 += 32) {
    int i = i0 + lane;
    before += __popc(__ballot_sync(FULL_WARP, i < first && picks[i] == expert));
  }
  if (before % BLOCK_PICKS) return false;
  if (threadIdx.x < 32) {
    for (int i0 = first; i0 < n && taken < BLOCK_PICKS; i0 += 32) {
      int i = i0 + lane;
      bool is_hit = i < n && picks[i] == expert;
      unsigned mask = __ballot_sync(FULL_WARP, is_hit);
      int at = taken + __popc(mask & ((1u << lane) - 1));
      if (is_hit && at < BLOCK_PICKS) block.of[at] = i;
      taken += __popc(mask);
    }
    for (int at = taken + lane; at < BLOCK_PICKS; at += 32) block.of[at] = -1;
  }
  __syncthreads();
  return true;
}

// Where in x the rows of a lane's picks begin, `per_row` picks to a row, and in them its k; columns
// without a pick are copies of the first, which nobody takes.
DEVICE void find_rows(int (&of_row)[TOKEN_TILES], const BlockPicks& block, int per_row, int K,
                      int lane) {
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; j++) {
    int pick = block.of[8 * j + (lane >> 2)];
    of_row[j] = (pick < 0 ? block.of[0] : pick) / per_row * K + LANE_K * (lane & 3);
  }
}
