// few.cuh - what products for up to 32 tokens share, whatever the format of their weights.
//
// IS: where sums go, shared memory of a block, and the norm that a block makes of its rows of x.
// IS NOT: products, see linear_few.cuh, which a kernel may include for several formats.
#pragma once

// Where a sum goes: y = sum; y = y + sum; or y = silu(sum) times that of the row tile which the
// second half of the block's warps multiplies, I / 16 tiles further on; or a sum over PICKS row tiles
// of as many experts.
enum Epilogue { STORE, ADD, SILU, SUM };

#ifndef PICKS
#define PICKS 1
#endif

// Row tiles of a block, each with WARPS warps of its own.
DEVICE constexpr int parts(Epilogue e) { return e == SILU ? 2 : e == SUM ? PICKS : 1; }
DEVICE constexpr int threads(Epilogue e) { return 32 * WARPS * parts(e); }

// Of super-slices, by token tile and lane: in shared memory, for registers are short.
typedef float Totals[TOKEN_TILES][32][4];

template <Epilogue E>
struct FewShared {
  float part[2][threads(E) / 32][TOKEN_TILES][32][4];  // of slices, by turns
  Totals totals[parts(E)];                             // of each first warp
};

// What a block multiplies x with: row tile `tile` of w [N, K], and for SILU that `half` further on.
// y has `n_out` columns, `stride` apart by rows.
struct Product {
  const void* w;
  void* y;
  int N, n_out, stride, tile, half;
};

// Pairs of an activation whose rows a kernel keeps to itself lie as operands want them: of four k
// first the high parts, then the low ones. No load takes them apart.
#ifdef NORM_THREADS
constexpr bool IS_ORDERED = ACT_PARTS == 2;
#else
constexpr bool IS_ORDERED = false;
#endif

#ifdef NORM_THREADS
DEVICE void store_operand4(act_t* p, float x, float y, float z, float w) {
#if ACT_PARTS == 2
  uint4 v;
  bf16_split(x, y, v.x, v.z);
  bf16_split(z, w, v.y, v.w);
  *reinterpret_cast<uint4*>(p) = v;
#else
  store_act4(p, x, y, z, w);
#endif
}

// The block's rows of x, normed: [rows][K] in shared memory. part: a float per row and warp of
// norm.cu.
template <int N_WARPS, class Args>
DEVICE const act_t* norm_rows(float* part, const Args& a, int rows) {
  constexpr int NORM_WARPS = NORM_THREADS / 32;
  constexpr bool IS_KEPT = sizeof(act_t) == sizeof(float);  // x, where its norm will be
  DYNAMIC_SHARED(act_t, to);
  int lane = threadIdx.x & 31;
  for (int i = threadIdx.x >> 5; i < rows * NORM_WARPS; i += N_WARPS) {
    size_t row = (size_t)(i / NORM_WARPS) * a.K;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < NORM_VECTORS; j++) {
      int c = 4 * (j * NORM_THREADS + i % NORM_WARPS * 32 + lane);
      if (c >= a.K) continue;
      float4 v = *reinterpret_cast<const float4*>(a.x + row + c);
      if constexpr (IS_KEPT) *reinterpret_cast<float4*>(to + row + c) = v;
      sum = fmaf(v.x, v.x, sum);
      sum = fmaf(v.y, v.y, sum);
      sum = fmaf(v.z, v.z, sum);
      sum = fmaf(v.w, v.w, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) part[i] = sum;
  }
  __syncthreads();
  for (int t = 0; t < rows; t++) {
    float sum = part[t * NORM_WARPS];
#pragma unroll
    for (int w = 1; w < NORM_WARPS; w++) sum = sum + part[t * NORM_WARPS + w];
    float scale = rsqrt_f32(sum / (float)a.K + a.eps);
    act_t* y = to + (size_t)t * a.K;
    for (int c = 4 * threadIdx.x; c < a.K; c += 4 * 32 * N_WARPS) {
      float4 v = IS_KEPT ? *reinterpret_cast<const float4*>(y + c)
                         : *reinterpret_cast<const float4*>(a.x + (size_t)t * a.K + c),
             g = *reinterpret_cast<const float4*>(a.norm + c);
      store_operand4(y + c, v.x * scale * g.x, v.y * scale * g.y, v.z * scale * g.z,
                     v.w * scale * g.w);
    }
  }
  __syncthreads();
  return to;
}
#endif
