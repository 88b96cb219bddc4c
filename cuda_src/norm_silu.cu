// norm_silu.cu - y = silu(h G^T) (h U^T) with h = norm(x), W = [G; U]: norm_linear.cu and
// linear_silu.cu in one.
//
// Contract: linear_few.cuh; as rmsnorm, linear, silu_mul, bit for bit.
// Shapes:   x [T, K] and norm [K] float, w [2 I, K] as in weights.cuh, y [T, I] activations.
#include "flashrt.cuh"
#include "linear_few.cuh"

constexpr int THREADS = threads(SILU), MIN_BLOCKS = min_blocks(SILU);

KERNEL(THREADS, MIN_BLOCKS) norm_silu(ARGS norm_silu_args launch) {
  OPEN_RUN(norm_silu);
  __shared__ __align__(16) FewShared<SILU> shared;
  Product p = {a.w, a.y, 2 * a.I, a.I, a.I, (int)blockIdx.x, (int)gridDim.x};
  multiply_few<SILU>(a, p, shared);
}
