/* Stored weights: where the rows of a MATRIX lie, of any dtype, and their values one by one.
 *
 * IS: the storage of matrices in panels of 32 rows, and the value of an element as core/groups.py
 * defines it. IS NOT: fast; linear_stored.c has vectors. Included by: linear, embed, draft, pack.
 *
 * Values, [panel][k][32 rows]: bfloat16 (its lanes as in common.h), float16, float32.
 *
 * Codes: a panel is one even stream of slices of 256 k (the last one is shorter: K up to a multiple
 * of 32). A slice is its planes of scales, [groups of the slice][32 rows] in the order of `Scales`,
 * one element per row where there is one for all columns, then units of 32 k:
 *   uint4, e2m1   [4 words][32 rows]: the word of 8 k has k = 0..3 in the low nibbles of its bytes,
 *                 k = 4..7 in the high ones
 *   uint5, uint6  the same words of low nibbles, then words of high bits, 1 or 2: byte b of them
 *                 has the bits of k = b mod 4, the words' low nibbles and high nibbles in turn
 *   int8          [8 words][32 rows]: 4 k per word, plus 128
 *   e4m3          [32 k][32 rows], a byte each
 * So a vector of rows becomes one of bytes of 4 consecutive k per row by a shift and masks.
 * What fills up rows, K or groups is zero. layouts.py says the same in numpy.
 */
#pragma once
#include "common.h"

enum {
  UNIT = 32,      /* k that codes are filled up to */
  MOST_PLANES = 4 /* of scales */
};

typedef struct {
  int item_nbytes, size; /* of a plane: columns per element, 0: one for all */
} plane_shape;

typedef struct {
  const char *base;
  int64_t K, panel_nbytes, slice_nbytes; /* slice_nbytes: of all but the last */
  int dtype, group, outer, scales;       /* group 0: values, not codes */
  int n_planes;
  plane_shape planes[MOST_PLANES];
} stored_matrix;

static inline int bits_of(int dtype) {
  switch (dtype) {
    case DTYPE_U4:
    case DTYPE_E2M1:
      return 4;
    case DTYPE_U5:
      return 5;
    case DTYPE_U6:
      return 6;
    case DTYPE_I8:
    case DTYPE_E4M3:
      return 8;
    case DTYPE_F32:
      return 32;
    default:
      return 16;
  }
}

static inline void add_plane(stored_matrix *m, int item_nbytes, int size) {
  m->planes[m->n_planes++] = (plane_shape){item_nbytes, size};
}

static inline void add_planes(stored_matrix *m) {
  int group = m->group, outer = m->outer;
  switch (m->scales) {
    case SCALES_F16_MIN:
      add_plane(m, 2, group); /* fall through */
    case SCALES_F16:
      add_plane(m, 2, group);
      return;
    case SCALES_F32_MIN:
      add_plane(m, 4, group); /* fall through */
    case SCALES_F32:
      add_plane(m, 4, group);
      return;
    case SCALES_TWO_LEVEL:
      add_plane(m, 2, outer);
      add_plane(m, 1, group);
      return;
    case SCALES_TWO_LEVEL_MIN:
      add_plane(m, 2, outer);
      add_plane(m, 2, outer);
      add_plane(m, 1, group);
      add_plane(m, 1, group);
      return;
    default:
      add_plane(m, 1, group);
      add_plane(m, 4, 0);
      return;
  }
}

static inline int has_min(int scales) {
  return scales == SCALES_F16_MIN || scales == SCALES_F32_MIN || scales == SCALES_TWO_LEVEL_MIN;
}

/* Elements per row of a plane in a slice of n_k (filled up). */
static inline int64_t plane_length(plane_shape plane, int64_t n_k) {
  return plane.size ? ceil_div(n_k, plane.size) : 1;
}

/* k of the slice at k0, with what it is filled up with. */
static inline int64_t filled_length(const stored_matrix *m, int64_t k0) {
  int64_t n_k = min_of(SLICE, m->K - k0);
  return m->group ? ceil_div(n_k, UNIT) * UNIT : n_k;
}

static inline int64_t slice_nbytes_of(const stored_matrix *m, int64_t n_k) {
  int64_t nbytes = n_k * bits_of(m->dtype) / 8 * LANES;
  for (int i = 0; i < m->n_planes; i++) {
    nbytes += plane_length(m->planes[i], n_k) * m->planes[i].item_nbytes * LANES;
  }
  return nbytes;
}

static inline stored_matrix stored_matrix_of(const void *base, int dtype, int group, int outer,
                                             int scales, int64_t K) {
  stored_matrix m = {
      .base = base, .K = K, .dtype = dtype, .group = group, .outer = outer, .scales = scales};
  if (group) add_planes(&m);
  int64_t last = (K - 1) / SLICE * SLICE;
  m.slice_nbytes = slice_nbytes_of(&m, SLICE);
  m.panel_nbytes = last / SLICE * m.slice_nbytes + slice_nbytes_of(&m, filled_length(&m, last));
  return m;
}
#define STORED(a, name, columns)                                                       \
  stored_matrix_of((a)->name, (a)->name##_dtype, (a)->name##_group, (a)->name##_outer, \
                   (a)->name##_scales, columns)

static inline const char *slice_at(const stored_matrix *m, int64_t panel, int64_t k0) {
  return m->base + panel * m->panel_nbytes + k0 / SLICE * m->slice_nbytes;
}

/* The planes of the slice at `at`, of n_k (filled up); returns its codes. */
static inline const char *find_planes(const stored_matrix *m, const char *at, int64_t n_k,
                                      const char *planes[MOST_PLANES]) {
  for (int i = 0; i < m->n_planes; i++) {
    planes[i] = at;
    at += plane_length(m->planes[i], n_k) * m->planes[i].item_nbytes * LANES;
  }
  return at;
}

/* ---- one element ---- */

/* Exact; also for those below the smallest normal number. NaN stays NaN. */
static inline float from_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
  if (rest >= 0x1fu << 23) /* infinity, NaN */
    return s_from_bits(sign | 0x7f800000u | (rest & 0x7fffffu));
  if (rest < 1u << 23) /* subnormal: m 2^-24 */
    return s_from_bits(sign | s_bits((float)(half & 0x3ff) * 0x1p-24f));
  return s_from_bits(sign | (rest + (112u << 23)));
}

static inline float from_e4m3(uint8_t code) {
  uint32_t sign = (uint32_t)(code & 0x80) << 24, rest = code & 0x7f;
  if (rest == 0x7f) return NAN;
  if (rest < 8) return s_from_bits(sign | s_bits((float)rest * 0x1p-9f));
  return s_from_bits(sign | ((rest << 20) + (120u << 23)));
}

static inline float from_e2m1(int code) {
  static const float values[16] = {0,    0.5f,  1,    1.5f,  2,    3,    4,    6,
                                   -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
  return values[code & 15];
}

/* What codes stand for, of row `lane` at k of the slice: q - zero. Without a minimum unsigned codes
 * are centred. */
static inline float code_at(const stored_matrix *m, const char *codes, int lane, int64_t k) {
  const uint32_t *words = (const uint32_t *)codes + lane;
  int64_t unit = k / UNIT;
  int word = (int)(k % UNIT / 8), byte = (int)(k % 4), is_high = (int)(k % 8 / 4);
  int turn = 2 * word + is_high, is_centred = !has_min(m->scales);
  uint32_t low;
  switch (m->dtype) {
    case DTYPE_I8:
      return (float)((int)(words[k / 4 * LANES] >> 8 * byte & 255) - 128);
    case DTYPE_E4M3:
      return from_e4m3((uint8_t)codes[k * LANES + lane]);
    case DTYPE_U5:
      words += unit * 5 * LANES;
      low = words[word * LANES] >> (8 * byte + 4 * is_high) & 15;
      low |= (words[4 * LANES] >> (8 * byte + turn) & 1) << 4;
      return (float)((int)low - 16 * is_centred);
    case DTYPE_U6:
      words += unit * 6 * LANES;
      low = words[word * LANES] >> (8 * byte + 4 * is_high) & 15;
      low |= (words[(4 + turn / 4) * LANES] >> (8 * byte + turn % 4 * 2) & 3) << 4;
      return (float)((int)low - 32 * is_centred);
    default:
      low = words[(unit * 4 + word) * LANES] >> (8 * byte + 4 * is_high) & 15;
      return m->dtype == DTYPE_E2M1 ? from_e2m1((int)low) : (float)((int)low - 8 * is_centred);
  }
}

typedef struct {
  float s, m;
} scale_pair;

static inline float f16_at(const char *plane, int64_t index) {
  return from_f16(((const uint16_t *)plane)[index]);
}

/* s and m of row `lane` for k of the slice, whose planes these are; m is not used without minima. */
static inline scale_pair scale_at(const stored_matrix *m, const char *const *planes, int lane,
                                  int64_t k) {
  int64_t at = k / m->group * LANES + lane;
  int64_t outer = m->outer ? k / m->outer * LANES + lane : 0;
  switch (m->scales) {
    case SCALES_F16:
      return (scale_pair){f16_at(planes[0], at), 0};
    case SCALES_F16_MIN:
      return (scale_pair){f16_at(planes[0], at), f16_at(planes[1], at)};
    case SCALES_F32:
      return (scale_pair){((const float *)planes[0])[at], 0};
    case SCALES_F32_MIN:
      return (scale_pair){((const float *)planes[0])[at], ((const float *)planes[1])[at]};
    case SCALES_TWO_LEVEL:
      return (scale_pair){f16_at(planes[0], outer) * (float)((const int8_t *)planes[1])[at], 0};
    case SCALES_TWO_LEVEL_MIN:
      return (scale_pair){f16_at(planes[0], outer) * (float)((const uint8_t *)planes[2])[at],
                          -(f16_at(planes[1], outer) * (float)((const uint8_t *)planes[3])[at])};
    default: {
      float f = from_e4m3(((const uint8_t *)planes[0])[at]), g = ((const float *)planes[1])[lane];
      return (scale_pair){m->scales == SCALES_E4M3_TIMES ? f * g : f / g, 0};
    }
  }
}

static inline float scaled(const stored_matrix *m, float code, scale_pair scale) {
  return has_min(m->scales) ? s_fma(code, scale.s, scale.m) : code * scale.s;
}

/* Columns [begin, end) of row n of N, widened to float32; NaN where there is no such row. */
static inline void gather_row(const stored_matrix *m, int64_t N, int64_t n, span columns,
                              float *out) {
  if (n < 0 || n >= N) {
    for (int64_t k = columns.begin; k < columns.end; k++) out[k] = NAN;
    return;
  }
  int lane = (int)(n % LANES);
  if (!m->group) {
    const char *panel = slice_at(m, n / LANES, 0);
    int slot = lane_slot(lane, m->dtype);
    for (int64_t k = columns.begin; k < columns.end; k++) {
      int64_t at = k * LANES + slot;
      out[k] = m->dtype == DTYPE_F32    ? ((const float *)panel)[at]
               : m->dtype == DTYPE_BF16 ? from_bf16(((const uint16_t *)panel)[at])
                                        : from_f16(((const uint16_t *)panel)[at]);
    }
    return;
  }
  const char *planes[MOST_PLANES], *codes = NULL;
  scale_pair scale = {0, 0};
  for (int64_t k = columns.begin; k < columns.end; k++) {
    int64_t k0 = k / SLICE * SLICE;
    int is_first = k == columns.begin;
    if (is_first || k == k0)
      codes = find_planes(m, slice_at(m, n / LANES, k0), filled_length(m, k0), planes);
    if (is_first || k % m->group == 0) scale = scale_at(m, planes, lane, k - k0);
    out[k] = scaled(m, code_at(m, codes, lane, k - k0), scale);
  }
}
