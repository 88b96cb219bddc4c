/* Keys and values of one byte: a row of a head is codes and one scale, x = code * scale.
 *
 * IS: the choice of the scale, rounding to a code, and the way back; the same on every backend. IS
 * NOT: where codes lie (common.h). Included by: rope.c, attention.c.
 */
#pragma once
#include <float.h>
#include <math.h>

#include "common.h"

static inline int is_code(int dtype) { return dtype == DTYPE_I8 || dtype == DTYPE_E4M3; }

static inline float scale_of_row(const float *x, int64_t D, int dtype) {
  float largest = 0;
  for (int64_t d = 0; d < D; d++) {
    float size = fabsf(x[d]);
    if (!(size <= FLT_MAX)) return NAN;
    largest = s_max(size, largest);
  }
  float scale = largest / (dtype == DTYPE_I8 ? 127.0f : 448.0f);
  return scale < 1e-30f ? 0.0f : scale;
}

/* To nearest, ties to even; x is at most 448 but for rounding. */
static inline uint8_t to_e4m3(float x) {
  float size = fabsf(x);
  uint32_t bits = s_bits(size), sign = s_bits(x) >> 24 & 0x80, code;
  if (size < 0x1p-6f) code = (uint32_t)rintf(size * 0x1p9f);
  else code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3);
  return (uint8_t)(sign | (code < 0x7e ? code : 0x7e));
}
static inline float from_e4m3(uint8_t code) {
  uint32_t e = code >> 3 & 15, m = code & 7, sign = (uint32_t)(code & 0x80) << 24;
  if (e == 0) return s_from_bits(s_bits((float)m * 0x1p-9f) | sign);
  return s_from_bits(sign | (e + 120) << 23 | m << 20);
}

static inline uint8_t to_code(float x, float scale, int dtype) {
  if (!(scale > 0)) return 0;
  float q = x / scale;
  return dtype == DTYPE_I8 ? (uint8_t)(int8_t)rintf(q) : to_e4m3(q);
}
static inline float from_code(uint8_t code, int dtype) {
  return dtype == DTYPE_I8 ? (float)(int8_t)code : from_e4m3(code);
}
