// linear_silu.cu - y = silu(x G^T) (x U^T) for up to 32 tokens, W = [G; U].
//
// Contract: linear_few.cuh; as linear, then silu_mul, bit for bit. I is a multiple of 16.
// Shapes:   x [T, K] activations, w [2 I, K] as in weights.cuh, y [T, I] activations.
// Launch:   a block is a row tile of G and the one of U, with warps of its own for each.
#include "flashrt.cuh"
#include "linear_few.cuh"

constexpr int THREADS = threads(SILU), MIN_BLOCKS = min_blocks(SILU);

KERNEL(THREADS, MIN_BLOCKS) linear_silu(ARGS linear_silu_args launch) {
  OPEN_RUN(linear_silu);
  __shared__ __align__(16) FewShared<SILU> shared;
  Product p = {a.w, a.y, 2 * a.I, a.I, a.I, (int)blockIdx.x, (int)gridDim.x};
  multiply_few<SILU>(a, p, shared);
}
