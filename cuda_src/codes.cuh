// codes.cuh - keys and values of one byte: a row of a head is codes and one scale, x = code * scale.
//
// IS: the choice of the scale, rounding to a code, and codes as bfloat16, which holds each of them.
// The same values as on the other backends. CACHE_CODES: 1 int8, 2 float8 e4m3.
#pragma once

constexpr float LARGEST_CODE = CACHE_CODES == 1 ? 127.0f : 448.0f;

// Of a row whose elements lie over the lanes: `largest` is this lane's |x|, NaN if one is not
// finite.
DEVICE float scale_of_row(float largest) {
  bool is_finite = largest <= 3.402823466e38f;
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    float other = __shfl_xor_sync(FULL_WARP, largest, o);
    is_finite = is_finite && other <= 3.402823466e38f;
    largest = other > largest || !(other <= 3.402823466e38f) ? other : largest;
  }
  float scale = largest / LARGEST_CODE;
  if (!is_finite || !(largest <= 3.402823466e38f)) return __uint_as_float(0x7fc00000u);
  return scale < 1e-30f ? 0.0f : scale;
}

DEVICE uint8_t to_code(float x, float scale) {
  if (!(scale > 0.0f)) return 0;
  float q = x / scale;
  if (CACHE_CODES == 1) return (uint8_t)(signed char)rintf(q);
  float size = fabsf(q);
  uint32_t bits = __float_as_uint(size), sign = __float_as_uint(q) >> 24 & 0x80, code;
  if (size < 0.015625f) code = (uint32_t)rintf(size * 512.0f);
  else code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3);
  return (uint8_t)(sign | (code < 0x7e ? code : 0x7e));
}

DEVICE float code_value(uint32_t code) {
  if (CACHE_CODES == 1) return (float)(signed char)code;
  uint32_t e = code >> 3 & 15, m = code & 7, sign = (code & 0x80) << 24;
  float size = e ? __uint_as_float((e + 120) << 23 | m << 20) : (float)m * 0.001953125f;
  return __uint_as_float(__float_as_uint(size) | sign);
}

// Codes 2 i and 2 i + 1 of a word of four, as a pair of bfloat16.
DEVICE uint32_t code_pair(uint32_t word, int i) {
  uint32_t low = __float_as_uint(code_value(word >> 16 * i & 0xff)),
           high = __float_as_uint(code_value(word >> (16 * i + 8) & 0xff));
  return low >> 16 | (high & 0xffff0000u);
}
