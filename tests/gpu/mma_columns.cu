// mma_columns.cu - one mma of flashrt.cuh per block, operands and result in memory: to look at
// columns one by one.
#include "flashrt.cuh"

struct mma_columns_args {
  const uint32_t* a;  // [blocks][32 lanes][4]
  const uint32_t* b;  // [blocks][32 lanes][2]
  const float* c;     // [blocks][32 lanes][4]
  float* d;           // [blocks][32 lanes][4]
  int32_t blocks;
};

KERNEL(32) mma_columns(ARGS mma_columns_args p) {
  begin();
  int i = blockIdx.x * 32 + threadIdx.x;
  float c[4] = {p.c[4 * i], p.c[4 * i + 1], p.c[4 * i + 2], p.c[4 * i + 3]};
  mma(c, p.a[4 * i], p.a[4 * i + 1], p.a[4 * i + 2], p.a[4 * i + 3], p.b[2 * i], p.b[2 * i + 1]);
  for (int j = 0; j < 4; j++) p.d[4 * i + j] = c[j];
}
