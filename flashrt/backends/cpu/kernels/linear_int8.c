/* linear_int16, linear_int8: y = x w^T over codes in groups (stored.h), x rounded to integers and
 * dot products of integers. They take the place of op_linear where the device says so; e2m1 and
 * unsigned codes of up to 6 bits, and int8.
 *
 * Definition. Rows and K are filled up with zeros to units of 32 k. Of each row of x and each unit,
 * all in float32, with L = 127 for int8, and for int16 L = 32639, the most that two int8 give:
 *   a  = largest |x|
 *   dx = a / L, and q = round(x (L / a)), to nearest, ties to even: an integer of [-L, L];
 *        dx = 0 and q = 0 where a < 2^-100; dx = NaN and q = 0 where an x is infinite or NaN
 * A code is (u - z) s [+ m], as core/groups.py says, with u of 0..255: of e2m1 u = 2 v + 16, z = 16
 * and half the s of its group; of int8 u = code + 128, z = 128; of others u = code, and z half the
 * range, or 0 where there is a minimum. A block is the part of a unit within one group, 16 k or 32:
 *   D = sum of (u - z) q, Q = sum of q                      integers, exact in any order
 *   Y = fma(s dx, (float)D, Y), then, where there is a minimum, Y = fma(m, dx (float)Q, Y)
 * for ascending blocks of a slice of 256 k, from +0; and y = ((Y0 + Y1) + Y2) + ... as in linear.c.
 * So the bits do not depend on rows, threads, or the width of vectors, and a row with a NaN or an
 * infinity is NaN.
 *
 * Vectors hold a row of w per word: 4 bytes of consecutive k, whose products with 4 bytes of x are
 * added up in int16 as long as they fit, in int32 where the processor has that in one instruction.
 * An int16 is 256 h + l, two int8: a token has a column of h and one of l, and D is that of its two
 * sums; but where bytes of w must be widened to int16 anyway (PAIRS), x goes whole.
 * Weights that stream are asked for a little ahead: further ahead is slower than not asking.
 *
 * x is quantised by all threads, [slice][tile of tokens][unit][item][token]. Scratch: at most 84
 * bytes per row and unit; without it, rows go one by one. Then threads claim panels (few rows: w is
 * streamed once) or bands of panels (many rows: a band's slice is laid out in bytes in L1, and used
 * by all tokens), as in linear.c.
 */
#include "gathered.h"
#include "stored_vectors.h"
#include "tile.h"

enum {
  VECTORS = LANES / VL,
  QUADS = UNIT / 4, /* 4 k, of a unit */
#if defined __AVX512VNNI__ && defined __AVX512F__
  FEW = 16,          /* rows; with more, laying out pays; measured */
  STREAM_TOKENS = 4, /* of a tile of few rows */
#else
  FEW = 2,
  STREAM_TOKENS = 2,
#endif
  FEW_VECTORS = VECTORS < 4 ? VECTORS : 4, /* at once */
#if defined __AVX512F__
  COLUMNS = 12, /* of a tile: tokens, or two of each */
#else
  COLUMNS = 6,
#endif
  BAND_VECTORS = 2,
  BAND = BAND_VECTORS * VL, /* lanes */
  MOST_BLOCKS = SLICE / 16,
  AHEAD = 1536,            /* bytes prefetched ahead; measured */
  CLAIM = LANES / BAND * 4 /* bands at once */
};

/* ---- dot products ---- */

/* more_dots: sum, or 0 where is_first, plus the products of 4 bytes of w and of x, in DOT_BITS; or
 * of 2 int16, in 32 bits. IS_SIGNED: w is taken as signed. */
#if defined __AVX512VNNI__ && defined __AVX512F__
enum { DOT_BITS = 32, IS_SIGNED = 0 };
INLINE vi more_dots(vi sum, vu w, vu x, const int is_first) {
  if (is_first) sum = (vi){0};
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
#elif defined __AVXVNNI__ && defined __AVX2__ && !defined __AVX512F__
enum { DOT_BITS = 32, IS_SIGNED = 0 };
INLINE vi more_dots(vi sum, vu w, vu x, const int is_first) {
  if (is_first) sum = (vi){0};
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
#elif defined __AVX512BW__
enum { DOT_BITS = 16, IS_SIGNED = 0 };
#define DOT_NAME(name) _mm512_##name
typedef __m512i dot_vector;
#define DOT_REGISTER "v"
#elif defined __AVX2__ && defined __FMA__ && !defined __AVX512F__
enum { DOT_BITS = 16, IS_SIGNED = 0 };
#define DOT_NAME(name) _mm256_##name
typedef __m256i dot_vector;
#define DOT_REGISTER "x"
#elif defined __ARM_FEATURE_DOTPROD && defined __aarch64__
enum { DOT_BITS = 32, IS_SIGNED = 1 };
INLINE vi more_dots(vi sum, vu w, vu x, const int is_first) {
  if (is_first) sum = (vi){0};
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
}
#else
enum { DOT_BITS = 32, IS_SIGNED = 0 };
INLINE vi more_dots(vi sum, vu w, vu x, const int is_first) {
  if (is_first) sum = (vi){0};
  for (int b = 0; b < 4; b++) sum += (vi)(w >> 8 * b & 255) * ((vi)(x << (24 - 8 * b)) >> 24);
  return sum;
}
#endif

#if defined DOT_NAME
/* As asm, so that sums stay where they are: left the choice, GCC lets them wander and spills. */
INLINE vi more_dots(vi sum, vu w, vu x, const int is_first) {
  if (is_first) return (vi)DOT_NAME(maddubs_epi16)((dot_vector)w, (dot_vector)x);
  vi products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+" DOT_REGISTER(sum), "=&" DOT_REGISTER(products)
          : DOT_REGISTER(w), DOT_REGISTER(x));
  return sum;
}
INLINE vi more_pairs(vi sum, vu w, vu x, const int is_first) {
  if (is_first) return (vi)DOT_NAME(madd_epi16)((dot_vector)w, (dot_vector)x);
  vi products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
          : "+" DOT_REGISTER(sum), "=&" DOT_REGISTER(products)
          : DOT_REGISTER(w), DOT_REGISTER(x));
  return sum;
}
INLINE vu odd_bytes(vu w) { return (vu)DOT_NAME(srli_epi16)((dot_vector)w, 8); }
INLINE vi widened(vi dots) {
  return (vi)DOT_NAME(madd_epi16)((dot_vector)dots, DOT_NAME(set1_epi16)(1));
}
#else /* no PAIRS */
INLINE vi more_pairs(vi sum, vu w, vu x, const int is_first) { return (vi){0}; }
INLINE vu odd_bytes(vu w) { return w; }
INLINE vi widened(vi dots) { return dots; }
#endif

/* Where more code is no faster, it only compiles for longer. */
#if (defined __AVX2__ && defined __FMA__) || defined __AVX512F__ || defined __aarch64__
#define UNROLL_QUADS UNROLL
#else
#define UNROLL_QUADS
#endif

/* Ways to add up a unit: quads whose products fit int16 together, or PAIRS: of int16, in int32. */
enum { PAIRS = 0 };

/* 127 u added up twice per quad: 8 of 15 u fit, 4 of 28 and of 31, 2 of 63. */
INLINE int way_of(const int dtype) {
  if (DOT_BITS == 32) return QUADS;
  return dtype == DTYPE_U4 ? 8 : dtype == DTYPE_U6 ? 2 : dtype == DTYPE_I8 ? PAIRS : 4;
}

INLINE int n_steps(const int way) { return way == PAIRS ? 2 * QUADS : QUADS; }

/* Columns of a token whose x has n_terms int8. */
INLINE int columns_of(const int way, const int n_terms) { return way == PAIRS ? 1 : n_terms; }

/* z; `is_min`: there are minima. */
static int zero_of(int dtype, int is_min) {
  switch (dtype) {
    case DTYPE_I8:
      return IS_SIGNED ? 0 : 128;
    case DTYPE_E2M1:
      return 16;
    default:
      return is_min ? 0 : dtype == DTYPE_U4 ? 8 : dtype == DTYPE_U5 ? 16 : 32;
  }
}

/* ---- x: a unit is n_steps words of q of each column; of each token dx, and of each block -z Q,
 * dx Q ---- */

typedef struct {
  int way, n_terms, n_columns, n_blocks, zero; /* n_columns: of a token */
} x_form;

static inline x_form form_of(const stored_matrix *w, int n_terms) {
  int way = way_of(w->dtype);
  return (x_form){way, n_terms, columns_of(way, n_terms), w->group < UNIT ? UNIT / w->group : 1,
                  zero_of(w->dtype, has_min(w->scales))};
}

/* Per token. */
INLINE int words_of(const int way, const int n_columns, const int n_blocks) {
  return n_steps(way) * n_columns + 1 + 2 * n_blocks;
}
static inline int unit_words(const x_form *form) {
  return words_of(form->way, form->n_columns, form->n_blocks);
}

INLINE uint32_t pair_of(int even, int odd) {
  return (uint32_t)(even & 0xffff) | (uint32_t)odd << 16;
}

typedef uint64_t two_words __attribute__((vector_size(VL * 4)));

enum { X_VECTORS = UNIT / VL };

/* Bytes of q, four to a word, into words that are `stride` apart. */
INLINE void put_quads(const vi *q, int stride, uint32_t *out) {
  UNROLL
  for (int i = 0; i < X_VECTORS; i++) {
    two_words two = (two_words)(q[i] & 255); /* bytes 0 and 1 of a quad, then 2 and 3 */
    two |= two >> 24;
    UNROLL
    for (int j = 0; j < VL / 2; j += 2, out += stride)
      *out = (uint32_t)(two[j] & 0xffff) | (uint32_t)two[j + 1] << 16;
  }
}

/* int16 of q, two to a word: k and k + 2, of which the even bytes of w are. */
INLINE void put_pairs(const vi *q, int stride, uint32_t *out) {
  UNROLL
  for (int i = 0; i < X_VECTORS; i++) {
    UNROLL
    for (int j = 0; j < VL; j += 4, out += 2 * stride) {
      out[0] = pair_of(q[i][j], q[i][j + 2]);
      out[stride] = pair_of(q[i][j + 1], q[i][j + 3]);
    }
  }
}

/* A unit of one of n tokens. */
static inline void quantise_unit(const x_form *form, const float *x, int n_k, int n,
                                 uint32_t *out) {
  enum { ROUND_BITS = 0x4b400000 }; /* 1.5 * 2^23, whose last bits then hold the sum's integer */
  const float limit = form->n_terms == 2 ? 32639.0f : 127.0f;
  float filled[UNIT];
  if (n_k < UNIT) {
    for (int i = 0; i < UNIT; i++) filled[i] = i < n_k ? x[i] : 0;
    x = filled;
  }
  vi most = {0};
  for (int i = 0; i < UNIT; i += VL) {
    vi size = (vi)v_load(x + i) & 0x7fffffff;
    most = (vi)v_select(size > most, (vf)size, (vf)most);
  }
  int32_t top = 0;
  UNROLL
  for (int i = 0; i < VL; i++) top = most[i] > top ? most[i] : top;
  float a = s_from_bits((uint32_t)top), dx = 0, inverse = 0;
  int is_finite = top < 0x7f800000;
  if (!is_finite) dx = NAN;
  else if (a >= 0x1p-100f) dx = a / limit, inverse = limit / a;
  vi q[X_VECTORS], sum[2] = {{0}};
  UNROLL
  for (int i = 0; i < X_VECTORS; i++) {
    vi rounded = (vi)(v_load(x + i * VL) * inverse + s_from_bits(ROUND_BITS)) - ROUND_BITS;
    q[i] = is_finite ? rounded : (vi){0};
    sum[i / (X_VECTORS / 2)] += q[i];
  }
  const int stride = n * form->n_columns;
  if (form->way == PAIRS) {
    put_pairs(q, stride, out);
  } else if (form->n_terms == 1) {
    put_quads(q, stride, out);
  } else {
    vi high[X_VECTORS];
    UNROLL
    for (int i = 0; i < X_VECTORS; i++) high[i] = (q[i] + 128) >> 8;
    put_quads(high, stride, out);
    put_quads(q, stride, out + n); /* less 256 h: the last byte stays as it is */
  }
  out += n_steps(form->way) * stride;
  memcpy(out, &dx, 4);
  int32_t sums[2] = {0};
  for (int i = 0; i < VL; i++) sums[0] += sum[0][i], sums[1] += sum[1][i];
  if (form->n_blocks == 1) sums[0] += sums[1];
  for (int b = 0; b < form->n_blocks; b++) {
    float scaled_sum = dx * (float)sums[b];
    out[(1 + 2 * b) * n] = (uint32_t)(-form->zero * sums[b]);
    memcpy(out + (2 + 2 * b) * n, &scaled_sum, 4);
  }
}

/* A slice of n tokens from k0 on. */
static void quantise_slice(const x_form *form, const float *const *rows, int64_t k0, int n_k, int n,
                           uint32_t *out) {
  for (int k = 0; k < n_k; k += UNIT, out += n * unit_words(form)) {
    for (int t = 0; t < n; t++)
      quantise_unit(form, rows[t] + k0 + k, (int)min_of(UNIT, n_k - k), n, out + t);
  }
}

/* ---- a slice of lanes ---- */

/* Lanes of a panel's slice: codes as they are stored, or in bytes [unit][quad][lane]; their scales
 * are [group][s, m][lane]. */
typedef struct {
  const char *codes;
  const float *scales;
  int n_units, group_shift; /* k >> it: the group */
  int has_min;
} lanes_view;

typedef struct {
  vf sum[FEW_VECTORS][COLUMNS]; /* of each token */
} lane_sums;

INLINE void lay_out_scales(const int scales, const stored_matrix *m, const char *const *planes,
                           int n_k, int first, int n_lanes, float *out) {
  const int is_two_level = scales == SCALES_TWO_LEVEL || scales == SCALES_TWO_LEVEL_MIN;
  const float weight = m->dtype == DTYPE_E2M1 ? 0.5f : 1.0f;
  int n_groups = (int)ceil_div(n_k, m->group);
  int n_inner = is_two_level ? m->outer / m->group : n_groups;
  for (int i = 0; i < n_lanes; i += VL) {
    int lane = first + i;
    float *to = out + i;
    for (int begin = 0, outer = 0; begin < n_groups; begin += n_inner, outer++) {
      vf d = {0}, e = {0}, s, least;
      load_outer(scales, planes, outer * LANES + lane, lane, &d, &e);
      int end = (int)min_of(begin + n_inner, n_groups);
      for (int group = begin; group < end; group++, to += 2 * n_lanes) {
        load_inner(scales, planes, group * LANES + lane, lane, d, e, &s, &least);
        v_store(to, s * weight);
        v_store(to + n_lanes, least);
      }
    }
    if (n_k % UNIT) { /* a group that only fills up */
      v_store(to, (vf){0});
      v_store(to + n_lanes, (vf){0});
    }
  }
}

/* Scales of lanes [first, first + n_lanes) of a slice of n_k. */
static void lay_out(const stored_matrix *m, const char *const *planes, int n_k, int first,
                    int n_lanes, float *out) {
  switch (m->scales) {
#define LAY_OUT(scales)                                          \
  case scales:                                                   \
    lay_out_scales(scales, m, planes, n_k, first, n_lanes, out); \
    return;
    LAY_OUT(SCALES_F16)
    LAY_OUT(SCALES_F16_MIN)
    LAY_OUT(SCALES_F32)
    LAY_OUT(SCALES_F32_MIN)
    LAY_OUT(SCALES_TWO_LEVEL)
    LAY_OUT(SCALES_TWO_LEVEL_MIN)
    LAY_OUT(SCALES_E4M3_TIMES)
    LAY_OUT(SCALES_E4M3_OVER)
  }
}

/* Kinds: dtypes as they are stored, or BYTES, laid out. */
enum { BYTES = 100 };

INLINE int nbytes_of_unit(const int kind) {
  return kind == BYTES ? UNIT * BAND : UNIT * LANES / 8 * bits_of(kind);
}

/* u of 4 k, of VL lanes. */
INLINE vu quad_of(const int kind, const char *unit, const int quad, const int lane) {
  if (kind == BYTES) return v_load_words(unit + (quad * BAND + lane) * 4);
  vu bytes = load_half(kind, unit, quad / 2, quad % 2, lane);
  if (kind == DTYPE_U4) bytes &= 0x0f0f0f0fu;
  if (kind == DTYPE_I8 && IS_SIGNED) bytes ^= 0x80808080u;
  return bytes;
}

/* sum = fma(s dx, D, sum), and so on: a block whose products are `dots`. x: of the unit. */
INLINE void fold_block(lane_sums *c, vi dots[FEW_VECTORS][COLUMNS], const int way,
                       const int n_terms, const int block, const int n_vectors, const int n_tokens,
                       const uint32_t *x, const float *scales, const int n_lanes, int is_min) {
  const int n_columns = columns_of(way, n_terms);
  const uint32_t *dx = x + n_steps(way) * n_columns * n_tokens;
  const uint32_t *sums = dx + (1 + 2 * block) * n_tokens;
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    vf step = v_set(s_from_bits(dx[t]));
    vi less = (vi){0} + (int32_t)sums[t];
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      vi dot = n_columns == 1 ? dots[v][t] : (dots[v][t] << 8) + dots[v][n_tokens + t];
      vf d = __builtin_convertvector(dot + less, vf);
      c->sum[v][t] = v_fma(v_load(scales + v * VL) * step, d, c->sum[v][t]);
    }
  }
  if (!is_min) return;
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    vf q = v_set(s_from_bits(sums[n_tokens + t]));
    UNROLL
    for (int v = 0; v < n_vectors; v++)
      c->sum[v][t] = v_fma(v_load(scales + n_lanes + v * VL), q, c->sum[v][t]);
  }
}

/* dots: of quads [begin, end), all that fit together. */
INLINE void add_quads(vi dots[FEW_VECTORS][COLUMNS], const int kind, const int way, const int begin,
                      const int end, const char *unit, const int first, const int n_vectors,
                      const int n_columns, const uint32_t *x) {
  UNROLL_QUADS
  for (int step = begin; step < end; step++) {
    UNROLL
    for (int is_odd = 0; is_odd <= (way == PAIRS); is_odd++) {
      const int is_first = step == begin && !is_odd;
      vu w[FEW_VECTORS];
      UNROLL
      for (int v = 0; v < n_vectors; v++) {
        w[v] = quad_of(kind, unit, step, first + v * VL);
        if (way == PAIRS) w[v] = is_odd ? odd_bytes(w[v]) : w[v] & 0x00ff00ffu;
        KEEP(w[v]);
      }
      UNROLL
      for (int t = 0; t < n_columns; t++) {
        vu xt = (vu){0} + x[(way == PAIRS ? 2 * step + is_odd : step) * n_columns + t];
        UNROLL
        for (int v = 0; v < n_vectors; v++)
          dots[v][t] = way == PAIRS ? more_pairs(dots[v][t], w[v], xt, is_first)
                                    : more_dots(dots[v][t], w[v], xt, is_first);
        if (n_columns > 1) __asm__ volatile("" ::: "memory"); /* one x at a time */
      }
    }
  }
}

/* sums += a unit, of n_vectors from lane `first` on. `scales`: of its first group and lane. */
INLINE void add_unit(lane_sums *c, const int kind, const int way, const int n_terms,
                     const int n_blocks, const char *unit, const int first, const int n_vectors,
                     const int n_tokens, const uint32_t *x, const float *scales, const int n_lanes,
                     int is_min) {
  const int n_columns = columns_of(way, n_terms) * n_tokens;
  const int length = QUADS / n_blocks, fit = way == PAIRS || way > length ? length : way;
  UNROLL
  for (int block = 0; block < n_blocks; block++) {
    vi total[FEW_VECTORS][COLUMNS];
    UNROLL
    for (int begin = 0; begin < length; begin += fit) {
      vi dots[FEW_VECTORS][COLUMNS] = {{{0}}};
      add_quads(dots, kind, way, block * length + begin, block * length + begin + fit, unit, first,
                n_vectors, n_columns, x);
      UNROLL
      for (int v = 0; v < n_vectors; v++) {
        UNROLL
        for (int t = 0; t < n_columns; t++) {
          vi wide = way == PAIRS ? dots[v][t] : widened(dots[v][t]);
          total[v][t] = begin ? total[v][t] + wide : wide;
        }
      }
    }
    fold_block(c, total, way, n_terms, block, n_vectors, n_tokens, x, scales + block * 2 * n_lanes,
               n_lanes, is_min);
  }
}

/* Sums of n_vectors from lane `first` on, over a slice. */
INLINE void add_slice(lane_sums *c, const int kind, const int way, const int n_terms,
                      const int n_blocks, const lanes_view *s, const int first, const int n_vectors,
                      const int n_tokens, const uint32_t *x) {
  const int n_lanes = kind == BYTES ? BAND : LANES;
  const char *unit = s->codes;
  UNROLL
  for (int v = 0; v < n_vectors; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) c->sum[v][t] = (vf){0};
  }
  for (int i = 0; i < s->n_units; i++) {
    const float *scales = s->scales + (i * UNIT >> s->group_shift) * 2 * n_lanes + first;
    if (kind != BYTES && first == 0) {
      UNROLL
      for (int b = 0; b < nbytes_of_unit(kind); b += 64) __builtin_prefetch(unit + AHEAD + b);
    }
    add_unit(c, kind, way, n_terms, n_blocks, unit, first, n_vectors, n_tokens, x, scales, n_lanes,
             s->has_min);
    unit += nbytes_of_unit(kind);
    x += words_of(way, columns_of(way, n_terms), n_blocks) * n_tokens;
  }
}

/* y = s, or y += s, for the columns that exist. */
INLINE void fold(float *y, int64_t n_cols, vf s, int is_first) {
  if (n_cols >= VL) {
    v_store(y, is_first ? s : v_load(y) + s);
    return;
  }
  for (int i = 0; i < n_cols; i++) y[i] = is_first ? s[i] : y[i] + s[i];
}

/* Where sums go: column 0 is that of the first lane. */
typedef struct {
  float *y;
  int64_t stride, n_cols;
  int is_first;
} target;

INLINE void fold_sums(const target *to, const lane_sums *c, const int first, const int n_vectors,
                      const int n_tokens) {
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    UNROLL
    for (int v = 0; v < n_vectors; v++) {
      int lane = first + v * VL;
      fold(to->y + t * to->stride + lane, to->n_cols - lane, c->sum[v][t], to->is_first);
    }
  }
}

/* ---- by kind, blocks and tokens ---- */

typedef void (*slice_function)(const lanes_view *s, const uint32_t *x, const target *to);

INLINE void stream(const int kind, const int n_terms, const int n_blocks, const int n_tokens,
                   const lanes_view *s, const uint32_t *x, const target *to) {
  const int n_vectors = n_tokens == 1 || FEW > 2 ? FEW_VECTORS : FEW_VECTORS / 2;
  for (int first = 0; first < LANES; first += n_vectors * VL) {
    lane_sums c;
    add_slice(&c, kind, way_of(kind), n_terms, n_blocks, s, first, n_vectors, n_tokens, x);
    fold_sums(to, &c, first, n_vectors, n_tokens);
  }
}

#define STREAM(kind, terms, blocks, tokens)                                                        \
  static void stream_##kind##_##terms##_##blocks##_##tokens(const lanes_view *s,                   \
                                                            const uint32_t *x, const target *to) { \
    stream(kind, terms, blocks, tokens, s, x, to);                                                 \
  }
#if defined __AVX512VNNI__ && defined __AVX512F__
#define MORE_STREAMS(kind, terms) \
  STREAM(kind, terms, 1, 3)       \
  STREAM(kind, terms, 1, 4)       \
  STREAM(kind, terms, 2, 3)       \
  STREAM(kind, terms, 2, 4)
#define STREAM_NAMES(kind, terms, blocks)                                                \
  {NULL, stream_##kind##_##terms##_##blocks##_1, stream_##kind##_##terms##_##blocks##_2, \
   stream_##kind##_##terms##_##blocks##_3, stream_##kind##_##terms##_##blocks##_4}
#else
#define MORE_STREAMS(kind, terms)
#define STREAM_NAMES(kind, terms, blocks) \
  {NULL, stream_##kind##_##terms##_##blocks##_1, stream_##kind##_##terms##_##blocks##_2}
#endif
#define STREAMS(kind, terms) \
  STREAM(kind, terms, 1, 1)  \
  STREAM(kind, terms, 1, 2)  \
  STREAM(kind, terms, 2, 1)  \
  STREAM(kind, terms, 2, 2)  \
  MORE_STREAMS(kind, terms)
#define KIND(kind)                                                                \
  STREAMS(kind, 1)                                                                \
  STREAMS(kind, 2)                                                                \
  static void widen_##kind(const char *unit, int n_units, int first, char *out) { \
    widen(kind, unit, n_units, first, out);                                       \
  }

/* Codes of BAND lanes from `first` on, in bytes. */
INLINE void widen(const int kind, const char *unit, int n_units, int first, char *out) {
  for (; n_units > 0; n_units--, unit += nbytes_of_unit(kind)) {
    UNROLL
    for (int quad = 0; quad < QUADS; quad++) {
      UNROLL
      for (int v = 0; v < BAND_VECTORS; v++, out += VL * 4) {
        vu bytes = quad_of(kind, unit, quad, first + v * VL);
        memcpy(out, &bytes, sizeof bytes);
      }
    }
  }
}
KIND(DTYPE_U4)
KIND(DTYPE_U5)
KIND(DTYPE_U6)
KIND(DTYPE_I8)
KIND(DTYPE_E2M1)

#define TILE_OF(way, terms, blocks, tokens)                                                      \
  static void tile_##way##_##terms##_##blocks##_##tokens(const lanes_view *s, const uint32_t *x, \
                                                         const target *to) {                     \
    lane_sums sums, *c = &sums;                                                                  \
    __asm__("" : "+r"(c)); /* in memory: registers are the products' */                          \
    add_slice(c, BYTES, way, terms, blocks, s, 0, BAND_VECTORS, tokens, x);                      \
    fold_sums(to, c, 0, BAND_VECTORS, tokens);                                                   \
  }
#define TILES_TO_3(way, terms, blocks) TILE_OF(way, terms, blocks, 2) TILE_OF(way, terms, blocks, 3)
#define TILES_TO_6(way, terms, blocks) \
  TILE_OF(way, terms, blocks, 3)       \
  TILE_OF(way, terms, blocks, 4)       \
  TILE_OF(way, terms, blocks, 5)       \
  TILE_OF(way, terms, blocks, 6)
#define TILES_TO_12(way, terms, blocks) \
  TILES_TO_6(way, terms, blocks)        \
  TILE_OF(way, terms, blocks, 7)        \
  TILE_OF(way, terms, blocks, 8)        \
  TILE_OF(way, terms, blocks, 9)        \
  TILE_OF(way, terms, blocks, 10)       \
  TILE_OF(way, terms, blocks, 11)       \
  TILE_OF(way, terms, blocks, 12)
#define NAME(way, terms, blocks, tokens) tile_##way##_##terms##_##blocks##_##tokens
#define NAMES_TO_3(way, terms, blocks) \
  {NULL, NULL, NAME(way, terms, blocks, 2), NAME(way, terms, blocks, 3)}
#define THREE_TO_6(way, terms, blocks)                                                   \
  NAME(way, terms, blocks, 3), NAME(way, terms, blocks, 4), NAME(way, terms, blocks, 5), \
      NAME(way, terms, blocks, 6)
#define NAMES_TO_6(way, terms, blocks) {NULL, NULL, NULL, THREE_TO_6(way, terms, blocks)}
#define NAMES_TO_12(way, terms, blocks) \
  {NULL,                                \
   NULL,                                \
   NULL,                                \
   THREE_TO_6(way, terms, blocks),      \
   NAME(way, terms, blocks, 7),         \
   NAME(way, terms, blocks, 8),         \
   NAME(way, terms, blocks, 9),         \
   NAME(way, terms, blocks, 10),        \
   NAME(way, terms, blocks, 11),        \
   NAME(way, terms, blocks, 12)}
/* [terms - 1][blocks - 1][tokens] */
typedef const slice_function tile_table[2][2][COLUMNS + 1];
#if defined __AVX512F__
#define ONE_COLUMN 12
#define TWO_COLUMNS 6
#else
#define ONE_COLUMN 6
#define TWO_COLUMNS 3
#endif
#define JOIN(a, b) a##b
#define UP_TO(what, most) JOIN(what, most)
#define TILES(way)                                                                            \
  UP_TO(TILES_TO_, ONE_COLUMN)(way, 1, 1) UP_TO(TILES_TO_, ONE_COLUMN)(way, 1, 2)             \
      UP_TO(TILES_TO_, TWO_COLUMNS)(way, 2, 1) UP_TO(TILES_TO_, TWO_COLUMNS)(                 \
          way, 2, 2) static tile_table tiles_##way = {                                        \
          {UP_TO(NAMES_TO_, ONE_COLUMN)(way, 1, 1), UP_TO(NAMES_TO_, ONE_COLUMN)(way, 1, 2)}, \
          {UP_TO(NAMES_TO_, TWO_COLUMNS)(way, 2, 1), UP_TO(NAMES_TO_, TWO_COLUMNS)(way, 2, 2)}};
TILES(8)
#if defined DOT_NAME
TILES(4)
TILES(2)
UP_TO(TILES_TO_, ONE_COLUMN)(0, 1, 1) UP_TO(TILES_TO_, ONE_COLUMN)(0, 1, 2) static tile_table
    tiles_0 = {/* x goes whole: the terms are all the same */
               {UP_TO(NAMES_TO_, ONE_COLUMN)(0, 1, 1), UP_TO(NAMES_TO_, ONE_COLUMN)(0, 1, 2)},
               {UP_TO(NAMES_TO_, ONE_COLUMN)(0, 1, 1), UP_TO(NAMES_TO_, ONE_COLUMN)(0, 1, 2)}};
#else
#define tiles_4 tiles_8
#define tiles_2 tiles_8
#define tiles_0 tiles_8
#endif

typedef struct {
  int dtype;
  slice_function streams[2][2][STREAM_TOKENS + 1]; /* [terms - 1][blocks - 1][tokens] */
  void (*widen)(const char *unit, int n_units, int first, char *out);
} kind;

#define TERMS_ROW(kind, terms) {STREAM_NAMES(kind, terms, 1), STREAM_NAMES(kind, terms, 2)}
#define ROW(kind) {kind, {TERMS_ROW(kind, 1), TERMS_ROW(kind, 2)}, widen_##kind}
static const kind kinds[] = {ROW(DTYPE_U4), ROW(DTYPE_U5), ROW(DTYPE_U6), ROW(DTYPE_I8),
                             ROW(DTYPE_E2M1)};

static const kind *kind_of(const stored_matrix *w) {
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    if (kinds[i].dtype == w->dtype) return &kinds[i];
  }
  return NULL;
}

static slice_function tile_of(const x_form *form, int n_tokens) {
  tile_table *tiles = form->way == 8   ? &tiles_8
                      : form->way == 4 ? &tiles_4
                      : form->way == 2 ? &tiles_2
                                       : &tiles_0;
  return (*tiles)[form->n_terms - 1][form->n_blocks - 1][n_tokens];
}

/* ---- x in tiles of tokens ---- */

typedef struct {
  const linear_args *a;
  const stored_matrix *w;
  x_form form;
  const uint32_t *packed; /* NULL: no room; the row `first` is quantised where it is used */
  int first, n, n_tiles;  /* rows of a->x and a->y */
  int least, n_more;      /* tokens of a tile; the first n_more have one more */
} token_tiles;

static token_tiles tiles_of(const linear_args *a, const stored_matrix *w, int n_terms,
                            const uint32_t *packed, int first, int n) {
  x_form form = form_of(w, n_terms);
  int n_tiles = (int)ceil_div(n, n <= FEW ? STREAM_TOKENS : COLUMNS / form.n_columns);
  return (token_tiles){a, w, form, packed, first, n, n_tiles, n / n_tiles, n % n_tiles};
}
static inline int first_token(const token_tiles *x, int tile) {
  return tile * x->least + (int)min_of(tile, x->n_more);
}
static inline int slice_length(const token_tiles *x, int64_t k0) {
  return (int)min_of(SLICE, x->a->K - k0);
}
static inline int64_t packed_offset(const token_tiles *x, int64_t k0, int tile) {
  int64_t n_units = ceil_div(slice_length(x, k0), UNIT);
  return unit_words(&x->form) * (x->n * (k0 / UNIT) + first_token(x, tile) * n_units);
}

static void quantise_tile(const token_tiles *x, const float *const *rows, int64_t k0, int tile,
                          uint32_t *packed) {
  quantise_slice(&x->form, rows, k0, slice_length(x, k0),
                 first_token(x, tile + 1) - first_token(x, tile),
                 packed + packed_offset(x, k0, tile));
}

/* All threads. */
static void quantise(const token_tiles *x, uint32_t *packed, int tid, int nt) {
  int64_t K = x->a->K;
  span mine = share(ceil_div(K, SLICE) * x->n_tiles, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int tile = (int)(unit % x->n_tiles), m0 = first_token(x, tile);
    const float *rows[COLUMNS > STREAM_TOKENS ? COLUMNS : STREAM_TOKENS];
    for (int t = 0; m0 + t < first_token(x, tile + 1); t++)
      rows[t] = (const float *)x->a->x + (x->first + m0 + t) * K;
    quantise_tile(x, rows, unit / x->n_tiles * SLICE, tile, packed);
  }
}

/* ---- panels x slices x tiles ---- */

static lanes_view view_of(const stored_matrix *w, const char *codes, const float *scales,
                          int n_filled) {
  return (lanes_view){codes, scales, n_filled / UNIT, __builtin_ctz((unsigned)w->group),
                      has_min(w->scales)};
}

static void few_rows(const token_tiles *x, span panels) {
  _Alignas(64) float scales[MOST_BLOCKS * 2 * LANES];
  uint32_t slice_of_x[SLICE / UNIT * (2 * QUADS + 5)];
  const stored_matrix *w = x->w;
  const slice_function *run = kind_of(w)->streams[x->form.n_terms - 1][x->form.n_blocks - 1];
  for (int64_t panel = panels.begin; panel < panels.end; panel++) {
    float *y = x->a->y + x->first * (int64_t)x->a->y_stride + panel * LANES;
    for (int64_t k0 = 0; k0 < w->K; k0 += SLICE) {
      const char *planes[MOST_PLANES];
      int n_filled = (int)filled_length(w, k0);
      const char *codes = find_planes(w, slice_at(w, panel, k0), n_filled, planes);
      const uint32_t *packed = x->packed + packed_offset(x, k0, 0);
      if (!x->packed) {
        const float *row = (const float *)x->a->x + x->first * w->K;
        quantise_slice(&x->form, &row, k0, slice_length(x, k0), 1, slice_of_x);
        packed = slice_of_x;
      }
      lay_out(w, planes, slice_length(x, k0), 0, LANES, scales);
      lanes_view view = view_of(w, codes, scales, n_filled);
      target to = {y, x->a->y_stride, x->a->N - panel * LANES, k0 == 0};
      for (int tile = 0; tile < x->n_tiles; tile++) {
        int n_tokens = x->least + (tile < x->n_more);
        run[n_tokens](&view, packed, &to);
        packed += (int64_t)n_tokens * view.n_units * unit_words(&x->form);
        to.y += n_tokens * to.stride;
      }
    }
  }
}

/* Bands are counted through all panels. */
static void many_rows(const token_tiles *x, span bands) {
  enum { BANDS = LANES / BAND };
  _Alignas(64) float scales[MOST_BLOCKS * 2 * BAND];
  _Alignas(64) char bytes[SLICE * BAND];
  const stored_matrix *w = x->w;
  const kind *of = kind_of(w);
  slice_function least = tile_of(&x->form, x->least);
  slice_function more = x->n_more ? tile_of(&x->form, x->least + 1) : least;
  int64_t first = bands.begin / BANDS, last = (bands.end - 1) / BANDS, stride = x->a->y_stride;
  for (int64_t k0 = 0; k0 < w->K; k0 += SLICE) {
    int n_filled = (int)filled_length(w, k0);
    int64_t nbytes = slice_nbytes_of(w, n_filled);
    int n_ahead = (int)ceil_div(nbytes, 64 * BANDS * x->n_tiles); /* cache lines with each tile */
    for (int64_t i = bands.begin; i < bands.end; i++) {
      int64_t panel = i / BANDS;
      int lane = (int)(i % BANDS) * BAND;
      const char *planes[MOST_PLANES];
      const char *codes = find_planes(w, slice_at(w, panel, k0), n_filled, planes);
      lay_out(w, planes, slice_length(x, k0), lane, BAND, scales);
      of->widen(codes, n_filled / UNIT, lane, bytes);
      const char *ahead = panel < last ? slice_at(w, panel + 1, k0) /* or the first's next slice */
                                       : slice_at(w, first, k0 + SLICE);
      ahead += i % BANDS * x->n_tiles * n_ahead * 64;
      lanes_view view = view_of(w, bytes, scales, n_filled);
      target to = {x->a->y + x->first * stride + panel * LANES + lane, stride,
                   x->a->N - panel * LANES - lane, k0 == 0};
      const uint32_t *packed = x->packed + packed_offset(x, k0, 0);
      for (int tile = 0; tile < x->n_tiles; tile++) {
        int n_tokens = x->least + (tile < x->n_more);
        (tile < x->n_more ? more : least)(&view, packed, &to);
        packed += (int64_t)n_tokens * view.n_units * unit_words(&x->form);
        to.y += n_tokens * stride;
        for (int line = 0; line < n_ahead; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      }
    }
  }
}

/* Weights that stream for long enough go to threads in pieces, by claims; others in equal parts. */
static void share_few_rows(const token_tiles *x, int tid, int nt) {
  enum { MOST = 1 << 20, LEAST = 128 << 10 /* bytes of a piece, as in linear.c */ };
  int64_t n_panels = ceil_div(x->a->N, LANES), nbytes = x->w->panel_nbytes;
  if (n_panels * nbytes < (int64_t)nt * MOST) {
    few_rows(x, share(n_panels, tid, nt));
    return;
  }
  claim c = {.n = n_panels, .nt = nt};
  c.most = max_of(1, MOST / nbytes);
  c.least = max_of(1, LEAST / nbytes);
  while (flashrt_claim(&c)) few_rows(x, c.mine);
}

static void linear_of_integers(const linear_args *a, int n_terms, int tid, int nt) {
  const stored_matrix w = STORED(a, w, a->K);
  int n_rows = rows_of(a->cursor, a->T);
  if (n_rows < 1) return;
  token_tiles x = tiles_of(a, &w, n_terms, NULL, 0, n_rows);
  int64_t n_words = unit_words(&x.form) * n_rows * ceil_div(a->K, UNIT);
  uint32_t *packed = flashrt_scratch(n_words * (int64_t)sizeof *packed);
  if (!packed) {
    for (int row = 0; row < n_rows; row++) {
      x = tiles_of(a, &w, n_terms, NULL, row, 1);
      if (row) flashrt_barrier(nt); /* claims start anew */
      share_few_rows(&x, tid, nt);
    }
    return;
  }
  x.packed = packed;
  quantise(&x, packed, tid, nt);
  flashrt_barrier(nt);
  if (n_rows <= FEW) {
    share_few_rows(&x, tid, nt);
    return;
  }
  claim c = {.n = ceil_div(a->N, BAND), .most = CLAIM, .least = 1, .nt = nt};
  while (flashrt_claim(&c)) many_rows(&x, c.mine);
}

void op_linear_int8(const linear_args *a, int tid, int nt) { linear_of_integers(a, 1, tid, nt); }

void op_linear_int16(const linear_args *a, int tid, int nt) { linear_of_integers(a, 2, tid, nt); }

/* ---- gathered rows ---- */

/* `y`: of column 0 */
static linear_args args_of(const gathered *x, float *y, int64_t stride) {
  return (linear_args){.x = x->rows[0],
                       .w = x->w.base,
                       .y = y,
                       .T = x->n,
                       .K = (int32_t)x->w.K,
                       .N = (int32_t)x->N,
                       .y_stride = (int32_t)stride};
}

void flashrt_pack_integers(gathered *x, void *room) {
  x->packed = room;
  if (!room) return;
  const linear_args a = args_of(x, NULL, 0);
  token_tiles tiles = tiles_of(&a, &x->w, x->n_terms, room, 0, x->n);
  for (int64_t k0 = 0; k0 < x->w.K; k0 += SLICE) {
    for (int tile = 0; tile < tiles.n_tiles; tile++)
      quantise_tile(&tiles, x->rows + first_token(&tiles, tile), k0, tile, room);
  }
}

void flashrt_multiply_integers(const gathered *x, span panels, float *y, int64_t stride) {
  const linear_args a = args_of(x, y - panels.begin * LANES, stride);
  token_tiles tiles = tiles_of(&a, &x->w, x->n_terms, x->packed, 0, x->n);
  if (x->n <= FEW) few_rows(&tiles, panels);
  else many_rows(&tiles, (span){panels.begin * (LANES / BAND), panels.end * (LANES / BAND)});
}
