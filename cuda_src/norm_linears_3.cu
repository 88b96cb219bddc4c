// norm_linears_3.cu - y<i> = norm(x) W<i>^T for a few tokens and three matrices.
//
// Contract: linears.cuh; as rmsnorm, then a linear for each, bit for bit. K is a multiple of 8.
// Shapes:   x [T, K], norm [K] float, w<i> [N<i>, K] as in weights.cuh, y<i> [T, N<i>] float.
// Launch:   the row tiles of all matrices side by side, those of the first before the others.
#define MATRICES 3
#include "flashrt.cuh"
#include "linears.cuh"

KERNEL(THREADS, MIN_BLOCKS) norm_linears_3(ARGS norm_linears_3_args launch) {
  OPEN_RUN(norm_linears_3);
  multiply_parts(a);
}
