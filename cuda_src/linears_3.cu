// linears_3.cu - y<i> = x W<i>^T for up to 32 tokens and three matrices.
//
// Contract: linears.cuh; as a linear for each, bit for bit.
// Shapes:   x [T, K] activations, w<i> [N<i>, K] as in weights.cuh, y<i> [T, N<i>] float.
// Launch:   the row tiles of all matrices side by side, those of the first before the others.
#define MATRICES 3
#include "flashrt.cuh"
#include "linears.cuh"

KERNEL(THREADS, MIN_BLOCKS) linears_3(ARGS linears_3_args launch) {
  OPEN_RUN(linears_3);
  multiply_parts(a);
}
