// limits.cu - what the device can do: the bare rates that measurements are given as fractions of.
//
// Contract: copy_stream:  dst[i] = src[i], n vectors of 16 bytes
//           read_stream:  out[block] = xor of all words that the block read: nothing but loads
//           mma_rate:     `steps` times CHAINS independent mma per warp, operands in registers:
//                         nothing but tensor cores
// Launch:   copy and read grid-stride with LOADS vectors in flight per thread; mma_rate with 8
//           warps per block, all multiprocessors full.
#include "flashrt.cuh"

struct copy_stream_args {
  const uint4* src;  // [n]
  uint4* dst;        // [n]
  int32_t n;
};
struct read_stream_args {
  const uint4* src;  // [n]
  uint32_t* out;     // [blocks]
  int32_t n, blocks;
};
struct mma_rate_args {
  float* out;  // [threads]
  int32_t threads;
  int32_t steps;
};

constexpr int LOADS = 8;   // vectors in flight per thread
constexpr int CHAINS = 8;  // independent accumulators per warp

KERNEL(256) copy_stream(ARGS copy_stream_args a) {
  begin();
  size_t n = a.n, stride = (size_t)gridDim.x * 256 * LOADS;
  for (size_t first = (size_t)blockIdx.x * 256 * LOADS + threadIdx.x; first < n; first += stride) {
    uint4 v[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; j++)
      if (first + 256 * j < n) v[j] = load_stream(a.src + first + 256 * j);
#pragma unroll
    for (int j = 0; j < LOADS; j++)
      if (first + 256 * j < n) a.dst[first + 256 * j] = v[j];
  }
}

KERNEL(256) read_stream(ARGS read_stream_args a) {
  begin();
  __shared__ uint32_t part[256];
  uint32_t sum = 0;
  size_t n = a.n, stride = (size_t)gridDim.x * 256 * LOADS;
  for (size_t first = (size_t)blockIdx.x * 256 * LOADS + threadIdx.x; first < n; first += stride) {
    uint4 v[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; j++)
      v[j] =
          first + 256 * j < n ? load_stream(a.src + first + 256 * j) : make_uint4(0u, 0u, 0u, 0u);
#pragma unroll
    for (int j = 0; j < LOADS; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 256; i++) sum ^= part[i];
    a.out[blockIdx.x] = sum;
  }
}

// Two bfloat16 of magnitude [1, 2), signs and mantissas that differ by lane: tensor cores slow down
// on busy bits, so zeros would give a rate that no real product reaches.
DEVICE uint32_t operand(uint32_t index) {
  return 0x3f803f80u ^ (index * 0x9e3779b1u & 0x807f807fu);
}

KERNEL(256) mma_rate(ARGS mma_rate_args a) {
  begin();
  float c[CHAINS][4] = {};
  uint32_t id = blockIdx.x * 256 + threadIdx.x, x[6];
#pragma unroll
  for (int j = 0; j < 6; j++) x[j] = operand(8 * id + j + 1);
  for (int step = 0; step < a.steps; step++) {
#pragma unroll
    for (int j = 0; j < CHAINS; j++) mma(c[j], x[0], x[1], x[2], x[3], x[4], x[5]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < CHAINS; j++) sum = sum + c[j][0] + c[j][1] + c[j][2] + c[j][3];
  a.out[id] = sum;
}
