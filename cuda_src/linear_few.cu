// linear_few.cu - y = x W^T for up to 32 tokens.
//
// Contract: linear_few.cuh. Shapes: x [T, K] activations, w [N, K] as in weights.cuh, y [T, N] float.
#include "flashrt.cuh"
#include "linear_few.cuh"

constexpr int THREADS = threads(STORE), MIN_BLOCKS = min_blocks(STORE);

KERNEL(THREADS, MIN_BLOCKS) linear_few(ARGS linear_args launch) {
  OPEN_RUN(linear);
  __shared__ __align__(16) FewShared<STORE> shared;
  multiply_few<STORE>(a, Product{a.w, a.y, a.N, a.N, a.y_stride, (int)blockIdx.x, 0}, shared);
}
