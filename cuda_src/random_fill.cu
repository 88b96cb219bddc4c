// random_fill.cu - random bfloat16 for weights whose values do not matter: benchmarks of shapes,
// without a file.
//
// Contract: n vectors of eight bfloat16, each round((b0 + b1 + b2 + b3 - 510) * scale) with four
//           random bytes: nearly normal, mean 0, standard deviation 147.8 * scale. A value depends
//           on its index and the seed alone.
// Launch:   grid-stride, a thread per vector.
#include "flashrt.cuh"

struct random_fill_args {
  uint4* w;  // [n]
  int32_t n;
  int32_t seed;
  float scale;
};

DEVICE uint32_t mixed(uint32_t x) {  // a bijection in which each bit of x turns about half the bits
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

DEVICE float variate(uint32_t index, uint32_t key, float scale) {
  uint32_t r = mixed(mixed(index) ^ key);
  uint32_t sum = (r & 255) + (r >> 8 & 255) + (r >> 16 & 255) + (r >> 24);
  return ((int)sum - 510) * scale;
}

KERNEL(256) random_fill(ARGS random_fill_args a) {
  begin();
  uint32_t key = mixed((uint32_t)a.seed + 0x9e3779b9u);
  for (uint32_t i = blockIdx.x * 256 + threadIdx.x; i < (uint32_t)a.n; i += gridDim.x * 256) {
    uint32_t pair[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
      uint32_t first = 8 * i + 2 * j;  // wraps beyond 2^32 elements: a repeat, which does no harm
      pair[j] = bf16_pack(variate(first, key, a.scale), variate(first + 1, key, a.scale));
    }
    a.w[i] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
}
