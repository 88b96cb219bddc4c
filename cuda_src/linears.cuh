// linears.cuh - products of the same few rows with MATRICES matrices, each in a format of its own.
//
// IS: linear_few.cuh once for each format, and which of them a block is for. Blocks of one launch, so
// that small matrices beside a large one cost no launch of their own.
// IS NOT: one sum for several matrices: a block has a row tile of one of them, and the bits are those
// of a launch for each.
//
// Part i has the format W<i>_DTYPE, W<i>_GROUP, W<i>_OUTER, W<i>_SCALES, which weights.cuh explains.
#pragma once
#include "few.cuh"

#define GLUE_(a, b, c) a##b##c
#define GLUE(a, b, c) GLUE_(a, b, c)
#define W_DTYPE GLUE(W, PART, _DTYPE)
#define W_GROUP GLUE(W, PART, _GROUP)
#define W_OUTER GLUE(W, PART, _OUTER)
#define W_SCALES GLUE(W, PART, _SCALES)

#define PART 0
namespace part0 {
#include "linear_few.cuh"
}
#undef PART
#define PART 1
namespace part1 {
#include "linear_few.cuh"
}
#undef PART
#if MATRICES > 2
#define PART 2
namespace part2 {
#include "linear_few.cuh"
}
#undef PART
#endif
DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int min_blocks_of_parts() {
  int n = least(part0::min_blocks(STORE), part1::min_blocks(STORE));
#if MATRICES > 2
  n = least(n, part2::min_blocks(STORE));
#endif
  return n;
}
constexpr int THREADS = threads(STORE), MIN_BLOCKS = min_blocks_of_parts();

// Multiplies if the block's tile is one of part i; else passes over that part's tiles.
#define MULTIPLY_PART(i)                                                    \
  if (tile < ceil_div(a.N##i, 16)) {                                        \
    Product p = {a.w##i, a.y##i, a.N##i, a.N##i, a.y##i##_stride, tile, 0}; \
    return part##i::multiply_few<STORE>(a, p, shared);                      \
  }                                                                         \
  tile -= ceil_div(a.N##i, 16)

template <class Args>
DEVICE void multiply_parts(const Args& a) {
  __shared__ __align__(16) FewShared<STORE> shared;
  int tile = blockIdx.x;
  MULTIPLY_PART(0);
  MULTIPLY_PART(1);
#if MATRICES > 2
  MULTIPLY_PART(2);
#endif
}
