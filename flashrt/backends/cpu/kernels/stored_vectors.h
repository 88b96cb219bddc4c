/* Stored weights in vectors of rows: the scales of a group, and codes as bytes.
 *
 * IS: VL rows at once of what stored.h has one by one. IS NOT: the values that come of them.
 * Included by: linear_stored.c, linear_int8.c.
 */
#pragma once
#include "stored.h"

/* Kinds of weights, as constants: dtypes, and int8 with minima, whose bias of 128 cannot be part of
 * m. */
enum { KIND_I8_MIN = 100 };

/* ---- scales ---- */

#if defined __F16C__ && defined __AVX2__ && defined __FMA__
INLINE vf load_f16(const void *p) {
#if defined __AVX512F__
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
}
#else
INLINE vf load_f16(const void *p) {
  vf y;
  for (int i = 0; i < VL; i++) y[i] = from_f16(((const uint16_t *)p)[i]);
  return y;
}
#endif

/* VL bytes. Left the choice, GCC converts them one by one. */
#if defined __AVX512F__
INLINE vi widen_u8(const void *p) {
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE vi widen_i8(const void *p) {
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
#elif defined __AVX2__ && defined __FMA__
INLINE vi widen_u8(const void *p) {
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
INLINE vi widen_i8(const void *p) {
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
#else
INLINE vi widen_u8(const void *p) {
  vi y;
  for (int i = 0; i < VL; i++) y[i] = ((const uint8_t *)p)[i];
  return y;
}
INLINE vi widen_i8(const void *p) {
  vi y;
  for (int i = 0; i < VL; i++) y[i] = ((const int8_t *)p)[i];
  return y;
}
#endif

INLINE vf load_u8(const void *p) { return __builtin_convertvector(widen_u8(p), vf); }
INLINE vf load_i8(const void *p) { return __builtin_convertvector(widen_i8(p), vf); }

/* e4m3 times 2^-8 of 16 lanes: as float16 the bits mean that, subnormals included. */
INLINE void load_e4m3(const void *p, vf *out) {
#if defined __F16C__ && defined __AVX2__ && defined __FMA__
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
  __m256i rest = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbfff));
  __m256i most = _mm256_set1_epi16(0x3f80);
  __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(rest, most), most);
  rest = _mm256_or_si256(rest, is_nan);
#if defined __AVX512F__
  out[0] = (vf)_mm512_cvtph_ps(rest);
#else
  out[0] = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(rest));
  out[1] = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(rest, 1));
#endif
#else
  for (int v = 0; v < 16 / VL; v++) {
    for (int i = 0; i < VL; i++) out[v][i] = from_e4m3(((const uint8_t *)p)[v * VL + i]) * 0x1p-8f;
  }
#endif
}

/* What the groups of an outer one share: d and -e, or g. */
INLINE void load_outer(const int scales, const char *const *planes, int64_t at, int lane, vf *d,
                       vf *e) {
  if (scales == SCALES_TWO_LEVEL || scales == SCALES_TWO_LEVEL_MIN)
    *d = load_f16(planes[0] + 2 * at);
  if (scales == SCALES_TWO_LEVEL_MIN) *e = -load_f16(planes[1] + 2 * at);
  if (scales == SCALES_E4M3_TIMES || scales == SCALES_E4M3_OVER)
    *d = v_load((const float *)planes[1] + lane);
}

/* s and m of VL rows of a group. */
INLINE void load_inner(const int scales, const char *const *planes, int64_t at, int lane, vf d,
                       vf e, vf *s, vf *m) {
  *m = v_set(-0.0f);
  switch (scales) {
    case SCALES_F16_MIN:
      *m = load_f16(planes[1] + 2 * at); /* fall through */
    case SCALES_F16:
      *s = load_f16(planes[0] + 2 * at);
      return;
    case SCALES_F32_MIN:
      *m = v_load((const float *)planes[1] + at); /* fall through */
    case SCALES_F32:
      *s = v_load((const float *)planes[0] + at);
      return;
    case SCALES_TWO_LEVEL:
      *s = d * load_i8(planes[1] + at);
      return;
    case SCALES_TWO_LEVEL_MIN:
      *s = d * load_u8(planes[2] + at);
      *m = e * load_u8(planes[3] + at);
      return;
    default: {
      vf f[16 / VL];
      load_e4m3(planes[0] + at - lane % 16, f);
      vf whole = f[lane % 16 / VL] * 256.0f;
      *s = scales == SCALES_E4M3_TIMES ? whole * d : whole / d;
      return;
    }
  }
}

/* ---- codes in vectors ---- */

INLINE vu shifted(vu words, const int left) { return left < 0 ? words >> -left : words << left; }

#if defined __AVX512BW__
INLINE vu look_up(vu table, vu bytes) {
  return (vu)_mm512_shuffle_epi8((__m512i)table, (__m512i)bytes);
}
#elif defined __AVX2__ && defined __FMA__
INLINE vu look_up(vu table, vu bytes) {
  return (vu)_mm256_shuffle_epi8((__m256i)table, (__m256i)bytes);
}
#else
INLINE vu look_up(vu table, vu bytes) {
  const uint8_t *values = (const uint8_t *)&table;
  vu y = {0};
  for (int i = 0; i < VL; i++) {
    for (int b = 0; b < 32; b += 8) y[i] |= (uint32_t)values[bytes[i] >> b & 15] << b;
  }
  return y;
}
#endif

/* 2 v + 16 of each e2m1 code, in every 16 bytes. */
INLINE vu e2m1_table(void) {
  vu table;
  for (int i = 0; i < VL; i += 4) {
    table[i] = 0x13121110, table[i + 1] = 0x1c181614;
    table[i + 2] = 0x0d0e0f10, table[i + 3] = 0x04080a0c;
  }
  return table;
}

/* The codes of half a step, k = 0..3 or 4..7 of word `word`: a byte each, of VL rows. What lies in
 * other nibbles (uint4) is masked later. */
INLINE vu load_half(const int kind, const char *unit, const int word, const int is_high,
                    const int lane) {
  if (kind == DTYPE_I8 || kind == KIND_I8_MIN)
    return v_load_words(unit + ((2 * word + is_high) * LANES + lane) * 4);
  vu nibbles = v_load_words(unit + (word * LANES + lane) * 4);
  if (is_high) nibbles = nibbles >> 4;
  if (kind == DTYPE_U4) return nibbles;
  nibbles &= 0x0f0f0f0fu;
  if (kind == DTYPE_E2M1) return look_up(e2m1_table(), nibbles);
  const int turn = 2 * word + is_high;
  if (kind == DTYPE_U5) {
    vu high = v_load_words(unit + (4 * LANES + lane) * 4);
    return nibbles | (shifted(high, 4 - turn) & 0x10101010u);
  }
  vu high = v_load_words(unit + ((4 + turn / 4) * LANES + lane) * 4);
  return nibbles | (shifted(high, 4 - turn % 4 * 2) & 0x30303030u);
}
