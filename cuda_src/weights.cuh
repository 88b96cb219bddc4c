// weights.cuh - how weights lie in memory, in every format, and what values they are.
//
// IS: index functions, and the way from stored bits to bfloat16 operands of mma and to scales.
// Shared by linear_few, linear_many, embed, draft_input; packed by backends/cuda/layouts.py.
// IS NOT: sums, see linear.cuh.
//
// The format of a launch's matrix W [N, K] is constant: W_DTYPE, and for codes in groups W_GROUP,
// W_OUTER, W_SCALES (core/groups.py says what they mean).
//
// A row tile is 16 rows: ceil(K / 32) chunks of 32 k, then the planes of scales; zeros beyond N and
// K. A chunk is two steps of 16 k, in operands of mma: lane 4g + t takes k = 8t + 4 step + {0..3}
// of rows g and g + 8, in place of mma's 2t, 2t+1, 2t+8, 2t+9: a sum does not care which k is
// called which, and so one 16-byte load of x at 8t serves both steps. Where groups are of 16, a
// step is a group: k = 16 step + 4t + {0..3}. A step is four registers: pair 0 of rows g and g + 8,
// pair 1 of both; i counts them.
//   16 bits: [step][lane][i], a register a word
//    8 bits: [lane][step][pair], a word of four codes: bytes 0 and 2 of row g, 1 and 3 of g + 8
//    4 bits: [lane][step], a word: register i in bits 4i.. and 16 + 4i..
//    5 bits: the low four so, then bit 4 of all codes: [lane] 16 bits, register i of a step in bits
//            4 step + i and 8 + 4 step + i
//    6 bits: the low four so, then bits 4 and 5: [lane] 32 bits, in bits 8 step + 2i and 16 more
// A plane of scales is [group][g][2 rows], so that a lane loads those of its two rows at once; last
// comes the scale of a row, [g][2 rows]. float32 matrices are in C order, as `dense` reads them.
//
// No #pragma once, here and in linear.cuh and linear_few.cuh: a kernel of matrices in several formats
// includes them once for each, in namespaces (linears.cuh).

#ifndef W_DTYPE
#define W_DTYPE DTYPE_BF16
#define W_GROUP 0
#define W_OUTER 0
#define W_SCALES -1
#endif

constexpr int K_CHUNK = 32;
// First k of lane 4g + t in a step of a chunk: LANE_K t + STEP_K step.
constexpr int LANE_K = W_GROUP == 16 ? 4 : 8, STEP_K = W_GROUP == 16 ? 16 : 4;
constexpr bool IS_C_ORDER = W_DTYPE == DTYPE_F32;
constexpr int W_BITS = IS_C_ORDER                                      ? 32
                       : W_DTYPE == DTYPE_BF16 || W_DTYPE == DTYPE_F16 ? 16
                       : W_DTYPE == DTYPE_I8 || W_DTYPE == DTYPE_E4M3  ? 8
                       : W_DTYPE == DTYPE_U6                           ? 6
                       : W_DTYPE == DTYPE_U5                           ? 5
                                                                       : 4;
constexpr int W_PARTS = IS_C_ORDER ? 3 : W_DTYPE == DTYPE_F16 ? 2 : 1;  // in bfloat16
constexpr int CHUNK_BYTES = 64 * W_BITS, CODE_WORDS = ceil_div(W_BITS, 2);

constexpr bool HAS_MIN =
    W_SCALES == SCALES_F16_MIN || W_SCALES == SCALES_F32_MIN || W_SCALES == SCALES_TWO_LEVEL_MIN;
constexpr bool IS_TWO_LEVEL = W_SCALES == SCALES_TWO_LEVEL || W_SCALES == SCALES_TWO_LEVEL_MIN;
constexpr bool HAS_ROW_SCALE = W_SCALES == SCALES_E4M3_TIMES || W_SCALES == SCALES_E4M3_OVER;
// 2 bits times 4 fit into the 8 of bfloat16: such a scale needs no fold of its own.
constexpr bool IS_SCALED_EARLY = HAS_ROW_SCALE && W_DTYPE == DTYPE_E2M1;
// Bits of a code are a subnormal bfloat16, and become operands by one multiplication. No factor is
// large enough for a code as it is: an operand is code / UNIT, or code times early scale / SUM_UNIT,
// exactly, and so a sum is the true one over SUM_UNIT, in all its roundings. The last step makes up
// for it. Integers n are n 2^-133, times 2^127; an e2m1 is 2^-126 of its value, and 2^126 times a
// scale of up to 448 would be none.
constexpr bool IS_INTEGER =
    W_DTYPE == DTYPE_I8 || W_DTYPE == DTYPE_U4 || W_DTYPE == DTYPE_U5 || W_DTYPE == DTYPE_U6;
constexpr float UNIT = IS_INTEGER ? 64.0f : IS_SCALED_EARLY ? 0x1p126f : 1.0f;
constexpr float SUM_UNIT = IS_SCALED_EARLY ? 256.0f : UNIT;
constexpr int N_PLANES = W_GROUP == 0 ? 0 : (1 + HAS_MIN) * (1 + IS_TWO_LEVEL);
constexpr int CHUNK_SCALES = W_GROUP == 0 ? 0 : W_GROUP == 16 ? 2 : 1;  // per row and chunk

// Bytes of an element of plane p, and the columns that share one; outer planes come first.
DEVICE constexpr bool is_outer(int p) { return IS_TWO_LEVEL && p <= HAS_MIN; }
DEVICE constexpr int plane_bytes(int p) {
  return HAS_ROW_SCALE                                          ? 1
         : W_SCALES == SCALES_F32 || W_SCALES == SCALES_F32_MIN ? 4
         : IS_TWO_LEVEL && !is_outer(p)                         ? 1
                                                                : 2;
}
DEVICE constexpr int plane_size(int p) { return is_outer(p) ? W_OUTER : W_GROUP; }
// Groups of plane p that `columns` columns from a multiple of them on lie in.
DEVICE constexpr int plane_groups(int p, int columns) {
  return columns < plane_size(p) ? 1 : columns / plane_size(p);
}
DEVICE constexpr int chunk_scale_bytes() {  // of a row tile
  int n = 0;
  for (int p = 0; p < N_PLANES; p++) n += plane_groups(p, K_CHUNK) * 16 * plane_bytes(p);
  return n;
}

// Offsets in a row tile: of a plane, of the scales of rows, of the end.
DEVICE size_t plane_offset(int p, int n_chunks) {
  size_t n = (size_t)n_chunks * CHUNK_BYTES;
  for (int i = 0; i < p && i < N_PLANES; i++)
    n += (size_t)ceil_div(n_chunks * K_CHUNK, plane_size(i)) * 16 * plane_bytes(i);
  return n;
}
DEVICE size_t row_scale_offset(int n_chunks) { return plane_offset(N_PLANES, n_chunks); }
DEVICE size_t tile_bytes(int n_chunks) {
  return row_scale_offset(n_chunks) + (HAS_ROW_SCALE ? 16 * 4 : 0);
}

// ---- codes

// What a lane holds of a chunk; of float32 [step][row][k].
struct Codes {
  uint32_t word[CODE_WORDS];
};

// Of a chunk in memory, or in shared memory. IS_STREAM: read once, from memory.
template <bool IS_STREAM>
DEVICE Codes load_codes(const uint8_t* chunk, int lane) {
  Codes c;
  if constexpr (W_BITS >= 8) {
#pragma unroll
    for (int i = 0; i < CODE_WORDS / 4; i++) {
      const uint8_t* p = chunk + 16 * (32 * i + lane);
      uint4 v = IS_STREAM ? load_stream(p) : *reinterpret_cast<const uint4*>(p);
      c.word[4 * i] = v.x;
      c.word[4 * i + 1] = v.y;
      c.word[4 * i + 2] = v.z;
      c.word[4 * i + 3] = v.w;
    }
  } else {
    const uint8_t* p = chunk + 8 * lane;
    uint2 v = IS_STREAM ? load_stream8(p) : *reinterpret_cast<const uint2*>(p);
    c.word[0] = v.x;
    c.word[1] = v.y;
    if constexpr (W_BITS == 5)
      c.word[CODE_WORDS - 1] = *reinterpret_cast<const uint16_t*>(chunk + 256 + 2 * lane);
    if constexpr (W_BITS == 6)
      c.word[CODE_WORDS - 1] = *reinterpret_cast<const uint32_t*>(chunk + 256 + 4 * lane);
  }
  return c;
}

constexpr uint32_t MINUS_ZERO = 0x80008000;
// Minus the code that stands for 0, over UNIT, in both halves; bytes of integers are made 128 more.
constexpr int LOG_ZERO = W_BITS - 1;
constexpr uint32_t MINUS_CODE_ZERO =
    HAS_MIN && W_BITS < 8 ? MINUS_ZERO : (0x8000u | (121 + LOG_ZERO) << 7) * 0x00010001u;
constexpr uint32_t ONE = IS_INTEGER ? 0x3c803c80 : 0x3f803f80;  // over SUM_UNIT

// 8 bits of e4m3 in each half, as bfloat16: its exponent is 120 more. No NaN: packing has moved
// them into scales.
DEVICE uint32_t bf16_of_e4m3(uint32_t pair) {
  uint32_t bits = (pair & 0x007f007f) << 4 | (pair & 0x00800080) << 8;
  return bf16_fma(bits, 0x7b807b80, MINUS_ZERO);  // 2^120
}

// Register i of a step: the codes of two k, less the one for 0, over UNIT, as bfloat16; exact.
DEVICE uint32_t bf16_of_codes(const Codes& c, int step, int i) {
  if constexpr (W_BITS == 16) return c.word[(4 * step + i) % CODE_WORDS];
  if constexpr (W_BITS == 8) {
    uint32_t word = c.word[(2 * step + i / 2) % CODE_WORDS];
    if constexpr (W_DTYPE == DTYPE_E4M3) return bf16_of_e4m3(word >> 8 * (i % 2));
    // plus 128, of all four at once
    uint32_t codes = opaque(word ^ 0x80808080);
    return bf16_fma(codes >> 8 * (i % 2) & 0x00ff00ff, 0x7f007f00, MINUS_CODE_ZERO);
  }
  uint32_t pair = c.word[step] >> 4 * i;
  if constexpr (W_DTYPE == DTYPE_E2M1) {
    uint32_t bits = (pair & 0x00070007) << 6 | (pair & 0x00080008) << 12;
    return IS_SCALED_EARLY ? bits : bf16_fma(bits, 0x7e807e80, MINUS_ZERO);
  }
  uint32_t bits = pair & 0x000f000f, high = c.word[CODE_WORDS - 1];
  if constexpr (W_BITS == 5) {
    int at = 4 * step + i;  // bytes of the halves apart, and the bit to bit 4
    high = __byte_perm(high, 0, 0x4140);
    bits |= (at < 4 ? high << (4 - at) : high >> (at - 4)) & 0x00100010;
  }
  if constexpr (W_BITS == 6) {
    int at = 8 * step + 2 * i;
    bits |= (at < 4 ? high << (4 - at) : high >> (at - 4)) & 0x00300030;
  }
  return bf16_fma(bits, 0x7f007f00, MINUS_CODE_ZERO);
}

// Operands of a step; several parts where bfloat16 is too short.
struct Fragment {
  uint32_t part[W_PARTS][4];
};

DEVICE Fragment fragment_of(const Codes& c, int step) {
  Fragment f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (W_DTYPE == DTYPE_F32) {
      const uint32_t* pair = c.word + (8 * step + 4 * (i % 2) + 2 * (i / 2)) % CODE_WORDS;
      bf16_split(__uint_as_float(pair[0]), __uint_as_float(pair[1]), f.part[0][i],
                 f.part[W_PARTS / 2][i], f.part[W_PARTS - 1][i]);
    } else if constexpr (W_DTYPE == DTYPE_F16) {
      uint32_t pair = c.word[(4 * step + i) % CODE_WORDS];
      bf16_split(f16_low(pair), f16_high(pair), f.part[0][i], f.part[W_PARTS - 1][i]);
    } else {
      f.part[0][i] = bf16_of_codes(c, step, i);
    }
  }
  return f;
}

// ---- scales

// What a lane holds of the scales of a group: those of rows g and g + 8, by plane.
struct StoredScale {
  uint2 plane[N_PLANES ? N_PLANES : 1];
};

// at: of the group, in plane p.
DEVICE uint2 load_scale(int p, const uint8_t* at, int g) {
  at += 2 * plane_bytes(p) * g;
  if (plane_bytes(p) == 4) return *reinterpret_cast<const uint2*>(at);
  if (plane_bytes(p) == 2) return uint2{*reinterpret_cast<const uint32_t*>(at), 0};
  return uint2{*reinterpret_cast<const uint16_t*>(at), 0};
}

// s, and the minimum m, of rows g and g + 8. With a scale of the row: without that.
struct Scale {
  float s[2], m[2];
};

DEVICE float e4m3_to_float(uint32_t code) {
  uint32_t magnitude = (code & 0x7f) << 20, sign = (code & 0x80) << 24;
  float x = __uint_as_float(magnitude) * 0x1p120f;
  return __uint_as_float(sign | ((code & 0x7f) == 0x7f ? 0x7fc00000 : __float_as_uint(x)));
}

DEVICE Scale scale_of(const StoredScale& stored) {
  Scale scale = {};
#pragma unroll
  for (int row = 0; row < 2; row++) {
    auto wide = [&](int p) {  // an element of two bytes or four
      uint2 v = stored.plane[p % (N_PLANES ? N_PLANES : 1)];
      if (plane_bytes(p) == 4) return __uint_as_float(row ? v.y : v.x);
      return row ? f16_high(v.x) : f16_low(v.x);
    };
    auto byte = [&](int p) {
      return stored.plane[p % (N_PLANES ? N_PLANES : 1)].x >> 8 * row & 0xff;
    };
    auto number = [&](int p, uint32_t flip) {  // of a byte: its bits below those of 2^23
      uint32_t x = stored.plane[p % (N_PLANES ? N_PLANES : 1)].x ^ flip;
      return __uint_as_float(__byte_perm(x, 0x4b000000, 0x7440 | row)) -
             (8388608.0f + (flip & 0xff));
    };
    if constexpr (W_SCALES == SCALES_TWO_LEVEL) {
      scale.s[row] = wide(0) * number(1, 0x8080);
    } else if constexpr (W_SCALES == SCALES_TWO_LEVEL_MIN) {
      scale.s[row] = wide(0) * number(2, 0);
      scale.m[row] = -(wide(1) * number(3, 0));
    } else if constexpr (HAS_ROW_SCALE) {
      scale.s[row] = e4m3_to_float(byte(0));
    } else {
      scale.s[row] = wide(0);
      if constexpr (HAS_MIN) scale.m[row] = wide(1);
    }
  }
  return scale;
}

// Codes over UNIT times their e4m3 scales, as operands over SUM_UNIT; exact (IS_SCALED_EARLY).
DEVICE void scale_early(Fragment& f, const StoredScale& stored) {
  uint32_t high = __byte_perm(stored.plane[0].x, 0, 0x1404);  // of the halves: each byte
  uint32_t both = bf16_fma((high >> 4 & 0x07f007f0) | (high & 0x80008000), 0x7b807b80, MINUS_ZERO);
  both = bf16_fma(both, 0x7a807a80, MINUS_ZERO);  // 2^118: UNIT / SUM_UNIT
#pragma unroll
  for (int i = 0; i < 4; i++)
    f.part[0][i] =
        bf16_fma(f.part[0][i], __byte_perm(both, 0, i % 2 ? 0x3232 : 0x1010), MINUS_ZERO);
}

DEVICE float with_row_scale(float x, float g) {
  return W_SCALES == SCALES_E4M3_OVER ? x / g : HAS_ROW_SCALE ? x * g : x;
}
// The same of a sum of operands.
DEVICE float sum_with_row_scale(float sum, float g) { return with_row_scale(sum * SUM_UNIT, g); }

// ---- single elements

// W[n][k .. k + 3], k a multiple of 4; what lies beyond K is anything.
DEVICE float4 load_quad(const void* w, int n, int k, int K) {
  float v[4] = {};
  if constexpr (IS_C_ORDER) {
    const float* row = static_cast<const float*>(w) + (size_t)n * K;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (k + i < K) v[i] = row[k + i];
  } else {
    int n_chunks = ceil_div(K, K_CHUNK), g = n % 8;
    bool is_second = n % 16 >= 8;
    const uint8_t* tile = static_cast<const uint8_t*>(w) + n / 16 * tile_bytes(n_chunks);
    Codes codes = load_codes<false>(tile + (size_t)(k / K_CHUNK) * CHUNK_BYTES,
                                    4 * g + k % (4 * LANE_K) / LANE_K);
    Fragment steps[2] = {fragment_of(codes, 0), fragment_of(codes, 1)};
    bool is_step1 = k / STEP_K % 2;
#pragma unroll
    for (int i = 0; i < W_PARTS; i++) {
      const uint32_t (&s0)[4] = steps[0].part[i], (&s1)[4] = steps[1].part[i];
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        uint32_t a = is_step1 ? s1[2 * pair] : s0[2 * pair],
                 b = is_step1 ? s1[2 * pair + 1] : s0[2 * pair + 1], bits = is_second ? b : a;
        v[2 * pair] = v[2 * pair] + bf16_low(bits) * UNIT;
        v[2 * pair + 1] = v[2 * pair + 1] + bf16_high(bits) * UNIT;
      }
    }
    if constexpr (N_PLANES > 0) {
      StoredScale stored;
#pragma unroll
      for (int p = 0; p < N_PLANES; p++)
        stored.plane[p] = load_scale(
            p, tile + plane_offset(p, n_chunks) + k / plane_size(p) * 16 * plane_bytes(p), g);
      Scale both = scale_of(stored);
      float s = is_second ? both.s[1] : both.s[0], m = is_second ? both.m[1] : both.m[0];
      if constexpr (HAS_ROW_SCALE) {
        const float* rows = reinterpret_cast<const float*>(tile + row_scale_offset(n_chunks));
        s = with_row_scale(s, rows[2 * g + is_second]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = HAS_MIN ? fmaf(v[i], s, m) : v[i] * s;
    }
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}
