// linear.cuh - the canonical order of y = x W^T, shared by linear_few and linear_many. The format
// of W is weights.cuh's.
//
// Canonical order of each output, a fold of two levels. Slices of K_SLICE k, each from zero; the
// slices of a super-slice of SUPER_SLICES folded in order, S = ((0 + s0) + s1) + ...; super-slices
// folded in order, ((0 + S0) + S1) + ... So blocks can share K by super-slices. No S is -0, so that
// 0 + S0 is S0, and one super-slice has the bits of a fold of one level. A slice of plain weights is one chain of mma in ascending steps. With scales
// it is a chain for every 32 k, or 16 where groups are so small: each from zero, then slice =
// fma(s, chain, slice), and with a minimum slice = fma(m, sum of x, slice), where the sum of x is a
// chain of mma too, with a row of ones. Scales of e4m3 on e2m1 are multiplied into the operands, so
// that the slice is one chain again; the scale of a row comes last. An x or a w in several parts is
// multiplied part by part in each step. All fixed by K and the format.
#include "weights.cuh"

constexpr int K_SLICE = 256, SLICE_CHUNKS = K_SLICE / K_CHUNK;
constexpr int SUPER_SLICES = 8, SUPER_CHUNKS = SUPER_SLICES * SLICE_CHUNKS;
constexpr int FOLDS = IS_SCALED_EARLY ? 0 : CHUNK_SCALES;  // per chunk

// x of one token as b operands, from the four k of each step: [part][step][register].
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

// One step of 16 k: the canonical sequence of mma. IS_FIRST: of a chain, from zero.
template <bool IS_FIRST = false, int PARTS>
DEVICE void multiply_step(float (&c)[4], const uint32_t (&w)[PARTS][4], const Operand& x,
                          int step CALLER) {
#pragma unroll
  for (int i = 0; i < ACT_PARTS; i++)
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
      if (IS_FIRST && i == 0 && j == 0)
        mma_first(c, w[j][0], w[j][1], w[j][2], w[j][3], x.part[i][step][0],
                  x.part[i][step][1] PASS_CALLER);
      else
        mma(c, w[j][0], w[j][1], w[j][2], w[j][3], x.part[i][step][0],
            x.part[i][step][1] PASS_CALLER);
    }
}

// The chain that fold f of a chunk takes: a step, or both.
template <int PARTS>
DEVICE void multiply_chain(float (&chain)[4], const uint32_t (&first)[PARTS][4],
                           const uint32_t (&second)[PARTS][4], const Operand& x, int f CALLER) {
  if (FOLDS == 2) {
    if (f == 0) multiply_step<true>(chain, first, x, 0 PASS_CALLER);
    else multiply_step<true>(chain, second, x, 1 PASS_CALLER);
  } else {
    multiply_step<true>(chain, first, x, 0 PASS_CALLER);
    multiply_step(chain, second, x, 1 PASS_CALLER);
  }
}

// Sums of x over the folds of a chunk, of tokens 2t and 2t + 1: the same for every row of W.
struct XSums {
  float of[FOLDS ? FOLDS : 1][2];
};

DEVICE XSums sum_x(const Operand& x CALLER) {
  XSums sums = {};
  if constexpr (HAS_MIN) {
    constexpr uint32_t ones[1][4] = {{ONE, ONE, ONE, ONE}};
#pragma unroll
    for (int f = 0; f < FOLDS; f++) {
      float chain[4];
      multiply_chain(chain, ones, ones, x, f PASS_CALLER);
      sums.of[f][0] = chain[0];
      sums.of[f][1] = chain[1];
    }
  }
  return sums;
}

// A chunk of weights: operands of both steps and what is left of their scales.
struct Chunk {
  Fragment step[2];
  Scale scale[FOLDS ? FOLDS : 1];
};

DEVICE Chunk chunk_of(const Codes& codes, const StoredScale (&stored)[2]) {
  Chunk chunk;
#pragma unroll
  for (int s = 0; s < 2; s++) {
    chunk.step[s] = fragment_of(codes, s);
    if constexpr (IS_SCALED_EARLY) scale_early(chunk.step[s], stored[CHUNK_SCALES == 2 ? s : 0]);
  }
#pragma unroll
  for (int f = 0; f < FOLDS; f++) chunk.scale[f] = scale_of(stored[f]);
  return chunk;
}

DEVICE void multiply_chunk(float (&c)[4], const Chunk& w, const Operand& x,
                           const XSums& sums CALLER) {
  if constexpr (FOLDS == 0) {
    multiply_step(c, w.step[0].part, x, 0 PASS_CALLER);
    multiply_step(c, w.step[1].part, x, 1 PASS_CALLER);
  } else {
#pragma unroll
    for (int f = 0; f < FOLDS; f++) {
      float chain[4];
      multiply_chain(chain, w.step[0].part, w.step[1].part, x, f PASS_CALLER);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        c[i] = fmaf(w.scale[f].s[i >> 1], chain[i], c[i]);
        if (HAS_MIN) c[i] = fmaf(w.scale[f].m[i >> 1], sums.of[f][i & 1], c[i]);
      }
    }
  }
}

DEVICE void fold(float (&sum)[4], const float (&slice)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = sum[i] + slice[i];
}
