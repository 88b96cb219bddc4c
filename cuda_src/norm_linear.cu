// norm_linear.cu - y = norm(x) W^T for a few tokens whose rows shared memory holds.
//
// Contract: linear_few.cuh; as rmsnorm, then linear, bit for bit. K is a multiple of 8.
// Shapes:   x [T, K] and norm [K] float, w [N, K] as in weights.cuh, y [T, N] float.
// Launch:   every block norms all rows, while the first weights are under way: less than a launch
//           of its own and the wait for it, as long as rows are short beside a block's weights.
#include "flashrt.cuh"
#include "linear_few.cuh"

constexpr int THREADS = threads(STORE), MIN_BLOCKS = min_blocks(STORE);

KERNEL(THREADS, MIN_BLOCKS) norm_linear(ARGS norm_linear_args launch) {
  OPEN_RUN(norm_linear);
  __shared__ __align__(16) FewShared<STORE> shared;
  multiply_few<STORE>(a, Product{a.w, a.y, a.N, a.N, a.y_stride, (int)blockIdx.x, 0}, shared);
}
