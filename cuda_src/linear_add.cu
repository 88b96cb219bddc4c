// linear_add.cu - y += x W^T for up to 32 tokens.
//
// Contract: linear_few.cuh; as linear, then the first half of add_rmsnorm, bit for bit.
// Shapes:   x [T, K] activations, w [N, K] as in weights.cuh, y [T, N] float.
#include "flashrt.cuh"
#include "linear_few.cuh"

constexpr int THREADS = threads(ADD), MIN_BLOCKS = min_blocks(ADD);

KERNEL(THREADS, MIN_BLOCKS) linear_add(ARGS linear_add_args launch) {
  OPEN_RUN(linear_add);
  __shared__ __align__(16) FewShared<ADD> shared;
  multiply_few<ADD>(a, Product{a.w, a.y, a.N, a.N, a.y_stride, (int)blockIdx.x, 0}, shared);
}
