// linear.cuh - how weights lie in memory, and the canonical order of y = x W^T. Shared by
// linear_few, linear_many, embed.
//
// W [N, K] is stored as operands of mma: row tiles of 16, each a run of ceil(K / 32) chunks of 32 k
// (zeros beyond N and K), a chunk two steps of 16 k, a step 32 lanes x 16 bytes. Within a chunk
// lane 4g + t takes k = 8t + 4 step + {0..3} of rows g and g + 8, in place of mma's 2t, 2t+1, 2t+8,
// 2t+9: a sum does not care which k is called which, and so one 16-byte load of x at 8t serves both
// steps.
//
// Canonical order of each output: chains of K_SLICE k in ascending steps, each from zero; their
// sums folded in order, ((0 + s0) + s1) + ...; an x in several parts (ACT_PARTS) is added part by
// part in each step. Fixed by K alone.
#pragma once

constexpr int K_CHUNK = 32, K_SLICE = 256, SLICE_CHUNKS = K_SLICE / K_CHUNK;
constexpr int CHUNK_VECTORS = 2 * 32;  // uint4 per chunk of a row tile: [step][lane]

// Index, in units of 4 elements, of W[n][k .. k + 3]; k a multiple of 4.
DEVICE size_t matrix_quad(int n, int k, int K) {
  size_t chunk = (size_t)(n / 16) * ceil_div(K, K_CHUNK) + k / K_CHUNK;
  int lane = 4 * (n % 8) + k % K_CHUNK / 8, step = k / 4 % 2;
  return ((chunk * 2 + step) * 32 + lane) * 2 + n % 16 / 8;
}

#ifdef ACT_PARTS
// x[k .. k + 7] of one token as b operands: [part][step][register].
struct Operand {
  uint32_t part[ACT_PARTS][2][2];
};

#if ACT_PARTS > 1
DEVICE Operand unpack_operand(uint4 first, uint4 second) {
  Operand x;
  uint4 v[2] = {first, second};
#pragma unroll
  for (int s = 0; s < 2; s++) {
#if ACT_PARTS == 3
    bf16_split(__uint_as_float(v[s].x), __uint_as_float(v[s].y), x.part[0][s][0], x.part[1][s][0],
               x.part[2][s][0]);
    bf16_split(__uint_as_float(v[s].z), __uint_as_float(v[s].w), x.part[0][s][1], x.part[1][s][1],
               x.part[2][s][1]);
#else
    x.part[0][s][0] = __byte_perm(v[s].x, v[s].y, 0x5410);
    x.part[0][s][1] = __byte_perm(v[s].z, v[s].w, 0x5410);
    x.part[1][s][0] = __byte_perm(v[s].x, v[s].y, 0x7632);
    x.part[1][s][1] = __byte_perm(v[s].z, v[s].w, 0x7632);
#endif
  }
  return x;
}
#else
DEVICE Operand unpack_operand(uint4 v) { return Operand{{{{v.x, v.y}, {v.z, v.w}}}}; }
#endif

// One step of 16 k: the canonical sequence of mma. The registers of `w` are (row g: two pairs, row
// g + 8: two pairs).
DEVICE void multiply_step(float (&c)[4], uint4 w, const Operand& x, int step CALLER) {
#pragma unroll
  for (int i = 0; i < ACT_PARTS; i++)
    mma(c, w.x, w.z, w.y, w.w, x.part[i][step][0], x.part[i][step][1] PASS_CALLER);
}

DEVICE void fold(float (&sum)[4], const float (&slice)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = sum[i] + slice[i];
}
#endif
