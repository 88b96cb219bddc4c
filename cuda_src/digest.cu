// digest.cu - the state digest: the sums that core/digest.py defines.
//
// Contract: sums[i] += (lo, hi) of term i (DigestTerm.FORMAT, offset made an address); the caller
//           has zeroed the sums. Rows lie in C order on this backend, whatever their layout code.
// Order:    sums are modulo 2^64, so any order gives the same: block sums are added by integer
//           atomics.
// Launch:   grid (blocks, terms), 256 threads, grid-stride over the elements of a term.
#include "flashrt.cuh"

struct digest_terms_args {
  // [n][10]: address, seed, planes, start, stop, origin, cols, pitch, element bytes, layout
  const int64_t* terms;
  uint64_t* sums;  // [n][2]
  int32_t n;
};
constexpr int TERM_WORDS = 10;

DEVICE uint64_t mix(uint64_t z) {
  z = (z ^ z >> 32) * DIGEST_G;
  z = (z ^ z >> 29) * DIGEST_H;
  return z ^ z >> 32;
}

KERNEL(256) digest_terms(ARGS digest_terms_args a) {
  begin();
  __shared__ unsigned long long block_lo, block_hi;
  if (threadIdx.x == 0) block_lo = block_hi = 0;
  __syncthreads();
  const int64_t* term = a.terms + (size_t)blockIdx.y * TERM_WORDS;
  const char* base = (const char*)term[0];
  int64_t start = term[3], origin = term[5], cols = term[6], pitch = term[7], nbytes = term[8];
  int64_t rows = term[4] - start, per_plane = rows * cols, n = term[2] * per_plane;
  uint64_t seed = (uint64_t)term[1], lo = 0, hi = 0;
  for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
    int64_t plane = i / per_plane, in_plane = i % per_plane, row = start + in_plane / cols,
            col = in_plane % cols;
    const char* p = base + plane * pitch + ((row - origin) * cols + col) * nbytes;
    uint64_t v = 1 + (nbytes == 1   ? (uint64_t)*(const uint8_t*)p
                      : nbytes == 2 ? (uint64_t)*(const uint16_t*)p
                                    : (uint64_t)*(const uint32_t*)p);
    uint64_t key =
        seed + (uint64_t)plane * DIGEST_A + (uint64_t)row * DIGEST_B + (uint64_t)col * DIGEST_C;
    lo += mix(key ^ v * DIGEST_D);
    hi += mix((key + DIGEST_E) * DIGEST_D ^ v * DIGEST_F);
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    lo += __shfl_xor_sync(FULL_WARP, lo, o);
    hi += __shfl_xor_sync(FULL_WARP, hi, o);
  }
  if ((threadIdx.x & 31) == 0) {
    atomicAdd(&block_lo, (unsigned long long)lo);
    atomicAdd(&block_hi, (unsigned long long)hi);
  }
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x * 256 < n) {
    atomicAdd((unsigned long long*)a.sums + 2 * blockIdx.y, block_lo);
    atomicAdd((unsigned long long*)a.sums + 2 * blockIdx.y + 1, block_hi);
  }
}
