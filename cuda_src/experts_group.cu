// experts_group.cu - picks by expert, for experts_in_many and experts_out_many.
//
// Contract: groups[e] = [first, n]: the n picks of expert e are members[first + i][0]. Tiles of at
//           most BLOCK_TOKENS picks of one expert, experts in ascending order: members[i][1] is
//           expert MOST_TILES + number, of tile i; -1 from there on up to the number of picks.
//           Picks of an expert are in any order: no bit of a result depends on it.
// Shapes:   picks [T, P], groups [E, 2], members [T, P, 2]; E <= THREADS.
// Launch:   one block: counts, a scan over experts by one thread each, and places.
#include "flashrt.cuh"

constexpr int N_WARPS = THREADS / 32;

// The sum over the lanes up to this one.
DEVICE unsigned warp_scan(unsigned v, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    unsigned before = __shfl_up_sync(FULL_WARP, v, o);
    if (lane >= o) v += before;
  }
  return v;
}

// The sum over the threads before this one, and over all.
DEVICE unsigned scan(unsigned v, unsigned& all) {
  __shared__ unsigned sums[N_WARPS];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  unsigned up_to = warp_scan(v, lane);
  __syncthreads();  // the sums of the scan before this one are read
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  unsigned warps = warp_scan(lane < N_WARPS ? sums[lane] : 0, lane);
  all = __shfl_sync(FULL_WARP, warps, 31);
  return __shfl_sync(FULL_WARP, warps, (warp + 31) & 31) * (warp > 0) + up_to - v;
}

template <class Args>
DEVICE void group_picks(const Args& a) {
  __shared__ int count[THREADS], next[THREADS];
  int e = threadIdx.x, n = a.cursor[CURSOR_ROWS] * a.P;
  count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += THREADS) atomicAdd(&count[a.picks[i]], 1);
  __syncthreads();
  unsigned mine = count[e], all;
  unsigned first = scan(mine, all);
  unsigned tiles = ceil_div(mine, BLOCK_TOKENS), first_tile = scan(tiles, all);
  next[e] = first;
  if (e < a.E) {
    a.groups[2 * e] = first;
    a.groups[2 * e + 1] = mine;
  }
  for (unsigned i = 0; i < tiles; i++) a.members[2 * (first_tile + i) + 1] = e * MOST_TILES + i;
  for (int i = all + threadIdx.x; i < n; i += THREADS) a.members[2 * i + 1] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += THREADS) a.members[2 * atomicAdd(&next[a.picks[i]], 1)] = i;
}

KERNEL(THREADS) experts_in_group(ARGS experts_in_args launch) {
  OPEN_RUN(experts_in);
  begin();
  group_picks(a);
}

KERNEL(THREADS) experts_out_group(ARGS experts_out_args launch) {
  OPEN_RUN(experts_out);
  begin();
  group_picks(a);
}
