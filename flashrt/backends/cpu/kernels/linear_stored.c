/* linear, of weights that are not bfloat16: float32, float16, and codes in groups (stored.h).
 *
 * The order of sums is that of linear.c; what is multiplied is the value of core/groups.py, so that
 * a matrix of codes gives the bits of the same matrix in float32.
 *
 * A code's value is one fma, of the code where it lies in its word: byte b of a word, masked, is
 * q 2^(8b), and s 2^(-8b) is exact for the scales in use, so
 *   fma(q 2^(8b), s 2^(-8b), m) = round(q s + m),
 * with m = -zero s, exact too, where there is no minimum: zero is a power of two. (Then a value of
 * zero is +0 where (q - zero) s may be -0. Chains begin at +0, so this shows only after products
 * have vanished below 2^-150, and is the same for all rows.) Scales s 2^(-8b) and m of a slice are
 * laid out in float32 first, in L1. A slice with a scale that is not 0, nor of 2^-100 to 2^100, and
 * the few kinds of code that have no such m, are widened element by element.
 * IS: one panel and a few rows, its weights streamed once; and bands widened for many rows.
 */
#include "linear_stored.h"
#include "stored_vectors.h"

enum {
  VECTORS = LANES / VL,
  STEP = 8,              /* k of a word of nibbles */
  AHEAD_NBYTES = 4 << 10 /* prefetched; measured */
};

/* ---- scales of a slice ---- */

/* Fills the tables of a slice; returns whether all scales are in range. `weight` is what s is
 * multiplied by, `zero` what -s is, for m, or 0. */
INLINE int lay_out_as(const stored_matrix *of, const int scales, const char *const *planes,
                      int n_filled, float weight, float zero, float *tables_of_slice) {
  const int32_t least = 0x0d800000 /* 2^-100 */, most = 0x71800000 /* 2^100 */;
  const int is_two_level = scales == SCALES_TWO_LEVEL || scales == SCALES_TWO_LEVEL_MIN;
  const int is_f16 = is_two_level || scales == SCALES_F16 || scales == SCALES_F16_MIN;
  vi is_out = {0};
  int n_groups = (int)ceil_div(n_filled, of->group);
  int n_inner = is_two_level ? of->outer / of->group : n_groups;
  for (int lane = 0; lane < LANES; lane += VL) {
    float *table = tables_of_slice + lane;
    for (int first = 0, outer = 0; first < n_groups; first += n_inner, outer++) {
      vf d = {0}, e = {0}, s, m;
      load_outer(scales, planes, outer * LANES + lane, lane, &d, &e);
      if (is_two_level) is_out |= ((vi)d & 0x7fffffff) > most; /* infinite or NaN, as f16 go */
      int end = (int)min_of(first + n_inner, n_groups);
      for (int group = first; group < end; group++, table += TABLES * LANES) {
        load_inner(scales, planes, group * LANES + lane, lane, d, e, &s, &m);
        if (!is_two_level) {
          vi size = (vi)s & 0x7fffffff;
          is_out |= size > most;
          if (!is_f16) is_out |= (size < least) & (size > 0);
        }
        if (!has_min(scales)) m = s * v_set(-zero);
        s *= weight;
        v_store(table, s);
        v_store(table + LANES, s * 0x1p-8f);
        v_store(table + 2 * LANES, s * 0x1p-16f);
        v_store(table + 3 * LANES, s * 0x1p-24f);
        v_store(table + 4 * LANES, m);
      }
    }
  }
  int32_t any = 0;
  for (int i = 0; i < VL; i++) any |= is_out[i];
  return !any;
}

static int lay_out(const stored_matrix *of, const char *const *planes, int n_filled, float weight,
                   float zero, float *table) {
  switch (of->scales) {
#define LAY_OUT(scales) \
  case scales:          \
    return lay_out_as(of, scales, planes, n_filled, weight, zero, table);
    LAY_OUT(SCALES_F16)
    LAY_OUT(SCALES_F16_MIN)
    LAY_OUT(SCALES_F32)
    LAY_OUT(SCALES_F32_MIN)
    LAY_OUT(SCALES_TWO_LEVEL)
    LAY_OUT(SCALES_TWO_LEVEL_MIN)
    LAY_OUT(SCALES_E4M3_TIMES)
    LAY_OUT(SCALES_E4M3_OVER)
  }
  return 0;
}

/* ---- codes in vectors ---- */

INLINE int is_of_bytes(const int kind) { /* codes at whole k, not in words */
  return kind == DTYPE_F32 || kind == DTYPE_F16 || kind == DTYPE_E4M3;
}

/* Bytes of a unit. */
INLINE int unit_nbytes(const int kind) {
  return UNIT * LANES / 8 * (kind == KIND_I8_MIN ? 8 : bits_of(kind));
}

INLINE uint32_t mask_of(const int kind) { return kind == DTYPE_U4 ? 15u : 255u; }

/* The values of byte `byte`, from the tables of the group. */
INLINE vf value_of(const int kind, vu bytes, const int byte, const float *table, vf m) {
  const int is_i8 = kind == DTYPE_I8 || kind == KIND_I8_MIN, is_down = byte == 3 && is_i8;
  vu code = is_down ? bytes >> 24 : bytes & mask_of(kind) << 8 * byte;
  const int at = is_down ? 0 : byte; /* how far up the code lies */
  vf value = __builtin_convertvector((vi)code, vf);
  if (kind == KIND_I8_MIN) value = value - (float)(128u << 8 * at);
  FMA_FROM(value, table + at * LANES, m);
  return value;
}

/* Where an fma of vectors is a call per lane, more code is no faster, and compiles for a minute. */
#if (defined __AVX2__ && defined __FMA__) || defined __AVX512F__ || defined __aarch64__
#define UNROLL_STEPS UNROLL
#else
#define UNROLL_STEPS
#endif

/* ---- a tile: values into chains, or into memory ---- */

typedef struct {
  vf sum[VECTORS][STORED_TOKENS];
} panel_chains;

/* n_tokens > 0: chains += values x; else values are stored, [k][n_vectors]. */
INLINE void use_values(panel_chains *c, vf value, const float *x, const int v, const int n_vectors,
                       const int n_tokens, float *out) {
  if (!n_tokens) {
    v_store(out + v * VL, value);
    return;
  }
  if (n_tokens > 1) KEEP(value);
  UNROLL
  for (int t = 0; t < n_tokens; t++) {
    vf xt = v_set(x[t]);
    FMA_INTO(c->sum[v][t], value, xt);
  }
}

/* n_k of the slice from k on, for the vectors from lane `first` on. Kinds in words take n_k up to a
 * multiple of STEP. */
INLINE void use_codes(panel_chains *c, const int kind, const slice_view *s, int k, int n_k,
                      const int first, const int n_vectors, const int n_tokens, const float *x,
                      float *out) {
  const int x_step = n_tokens, out_step = n_vectors * VL;
  if (is_of_bytes(kind)) {
    const int step_nbytes = LANES * bits_of(kind) / 8;
    const char *at = s->codes + (int64_t)k * step_nbytes + first * (bits_of(kind) / 8);
    for (int i = 0; i < n_k; i++, at += step_nbytes, x += x_step, out += out_step) {
      if (n_tokens) __builtin_prefetch(at + AHEAD_NBYTES);
      if (kind == DTYPE_F32 && n_tokens) __builtin_prefetch(at + AHEAD_NBYTES + 64);
      const float *table = kind == DTYPE_E4M3
                               ? s->tables + ((k + i) >> s->group_shift) * (TABLES * LANES) + first
                               : NULL;
      UNROLL
      for (int v = 0; v < n_vectors; v += 16 / VL) {
        vf w[16 / VL];
        if (kind == DTYPE_E4M3) load_e4m3(at + v * VL, w);
        UNROLL
        for (int j = 0; j < 16 / VL; j++) {
          int lane = (v + j) * VL;
          if (kind == DTYPE_E4M3)
            w[j] = v_fma(w[j], v_load(table + lane), v_load(table + 4 * LANES + lane));
          else if (kind == DTYPE_F16) w[j] = load_f16(at + lane * 2);
          else w[j] = v_load((const float *)at + lane);
          use_values(c, w[j], x, v + j, n_vectors, n_tokens, out);
        }
      }
    }
    return;
  }
  const char *unit = s->codes + k / UNIT * unit_nbytes(kind);
  for (int end = k + n_k; k < end; k += UNIT, unit += unit_nbytes(kind)) {
    UNROLL_STEPS
    for (int word = 0; word < UNIT / STEP; word++) {
      const float *table =
          s->tables + ((k + word * STEP) >> s->group_shift) * (TABLES * LANES) + first;
      if (n_tokens) {
        UNROLL
        for (int b = 0; b < unit_nbytes(kind) / 4; b += 64)
          __builtin_prefetch(unit + AHEAD_NBYTES + word * unit_nbytes(kind) / 4 + b);
      }
      vf m[VECTORS];
      UNROLL
      for (int v = 0; v < n_vectors; v++) {
        m[v] = v_load(table + 4 * LANES + v * VL);
        KEEP(m[v]);
      }
      UNROLL_STEPS
      for (int is_high = 0; is_high < 2; is_high++) {
        vu bytes[VECTORS];
        UNROLL
        for (int v = 0; v < n_vectors; v++)
          bytes[v] = load_half(kind, unit, word, is_high, first + v * VL);
        UNROLL_STEPS
        for (int byte = 0; byte < 4; byte++, x += x_step, out += out_step) {
          UNROLL
          for (int v = 0; v < n_vectors; v++) {
            vf value = value_of(kind, bytes[v], byte, table + v * VL, m[v]);
            use_values(c, value, x, v, n_vectors, n_tokens, out);
          }
        }
      }
    }
  }
}

/* ---- by kind and tokens ---- */

/* A chain of CHAIN k from k on. */
typedef void (*chain_function)(panel_chains *c, const slice_view *s, int k, const float *x);
/* The slice's values of BAND lanes from `first` on. */
typedef void (*widen_function)(const slice_view *s, int first, float *out);

INLINE void chain(panel_chains *c, const int kind, const slice_view *s, int k, const float *x,
                  const int n_tokens) {
  panel_chains sums; /* in registers */
  UNROLL
  for (int v = 0; v < VECTORS; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) sums.sum[v][t] = (vf){0};
  }
  use_codes(&sums, kind, s, k, CHAIN, 0, VECTORS, n_tokens, x, NULL);
  UNROLL
  for (int v = 0; v < VECTORS; v++) {
    UNROLL
    for (int t = 0; t < n_tokens; t++) c->sum[v][t] = sums.sum[v][t];
  }
}

#define CHAIN_OF(kind, tokens)                                                     \
  static void chain_##kind##_##tokens(panel_chains *c, const slice_view *s, int k, \
                                      const float *x) {                            \
    chain(c, kind, s, k, x, tokens);                                               \
  }
#if defined __AVX512F__
#define MORE_CHAINS(kind) CHAIN_OF(kind, 3) CHAIN_OF(kind, 4)
#define CHAIN_NAMES(kind) \
  {NULL, chain_##kind##_1, chain_##kind##_2, chain_##kind##_3, chain_##kind##_4}
#else
#define MORE_CHAINS(kind)
#define CHAIN_NAMES(kind) {NULL, chain_##kind##_1, chain_##kind##_2}
#endif
#define KIND(kind)                                                       \
  CHAIN_OF(kind, 1)                                                      \
  CHAIN_OF(kind, 2)                                                      \
  MORE_CHAINS(kind)                                                      \
  static void widen_##kind(const slice_view *s, int first, float *out) { \
    use_codes(NULL, kind, s, 0, s->n_k, first, BAND / VL, 0, NULL, out); \
  }
KIND(DTYPE_F32)
KIND(DTYPE_F16)
KIND(DTYPE_U4)
KIND(DTYPE_U5)
KIND(DTYPE_U6)
KIND(DTYPE_I8)
KIND(KIND_I8_MIN)
KIND(DTYPE_E4M3)
KIND(DTYPE_E2M1)

typedef struct {
  int dtype;
  float weight, zero; /* of `lay_out`, without minima */
  chain_function chains[STORED_TOKENS + 1];
  widen_function widen;
} kind;

#define ROW(kind, dtype, weight, zero) {dtype, weight, zero, CHAIN_NAMES(kind), widen_##kind}
static const kind kinds[] = {
    ROW(DTYPE_F32, DTYPE_F32, 1, 0),     ROW(DTYPE_F16, DTYPE_F16, 1, 0),
    ROW(DTYPE_U4, DTYPE_U4, 1, 8),       ROW(DTYPE_U5, DTYPE_U5, 1, 16),
    ROW(DTYPE_U6, DTYPE_U6, 1, 32),      ROW(DTYPE_I8, DTYPE_I8, 1, 128),
    ROW(DTYPE_E4M3, DTYPE_E4M3, 256, 0), ROW(DTYPE_E2M1, DTYPE_E2M1, 0.5f, 8),
};
static const kind int8_with_minima = ROW(KIND_I8_MIN, DTYPE_I8, 1, 0);

static const kind *kind_of(const stored_matrix *m) {
  if (m->dtype == DTYPE_I8 && has_min(m->scales)) return &int8_with_minima;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    if (kinds[i].dtype == m->dtype) return &kinds[i];
  }
  return NULL;
}

/* ---- slices ---- */

void flashrt_open_slice(open_slice *s, const stored_matrix *m, int64_t panel, int64_t k0) {
  const kind *of = kind_of(m);
  int n_filled = (int)filled_length(m, k0), n_k = (int)min_of(SLICE, m->K - k0);
  const char *codes = find_planes(m, slice_at(m, panel, k0), n_filled, s->planes);
  s->of = m;
  s->view = (slice_view){codes, s->tables, __builtin_ctz((unsigned)m->group | 1u << 30), n_k};
  s->is_fast = !m->group || (!(m->dtype == DTYPE_E2M1 && has_min(m->scales)) &&
                             lay_out(m, s->planes, n_filled, of->weight, of->zero, s->tables));
}

/* BAND lanes from `first` on, element by element. */
static void widen_slowly(const open_slice *s, int first, float *out) {
  for (int k = 0; k < s->view.n_k; k++) {
    for (int lane = first; lane < first + BAND; lane++) {
      scale_pair scale = scale_at(s->of, s->planes, lane, k);
      *out++ = scaled(s->of, code_at(s->of, s->view.codes, lane, k), scale);
    }
  }
}

void flashrt_widen_band(const open_slice *s, int band, float *wide) {
  if (s->is_fast) kind_of(s->of)->widen(&s->view, band * BAND, wide);
  else widen_slowly(s, band * BAND, wide);
}

/* A chain from widened lanes, [band][SLICE][BAND]: for the rest of K, and slices that are slow. */
static void chain_of_wide(panel_chains *c, const float *wide, int k, int n_k, const float *x,
                          int n_tokens) {
  for (int v = 0; v < VECTORS; v++) {
    const float *w = wide + (v * VL / BAND * SLICE + k) * BAND + v * VL % BAND;
    for (int t = 0; t < n_tokens; t++) {
      vf sum = {0};
      for (int i = 0; i < n_k; i++)
        sum = v_fma(v_load(w + i * BAND), v_set(x[i * n_tokens + t]), sum);
      c->sum[v][t] = sum;
    }
  }
}

/* y = s, or y += s, for the columns that exist. */
static void fold(float *y, int64_t n_cols, vf s, int is_first) {
  if (n_cols >= VL) {
    v_store(y, is_first ? s : v_load(y) + s);
    return;
  }
  for (int i = 0; i < n_cols; i++) y[i] = is_first ? s[i] : y[i] + s[i];
}

/* The sums of a slice for a tile of rows, added to y. */
static void stream_tile(const open_slice *s, const float *wide, const float *x, int n_tokens,
                        float *y, int64_t y_stride, int64_t n_cols, int is_first) {
  const kind *of = kind_of(s->of);
  const int n_whole = s->is_fast ? s->view.n_k / CHAIN * CHAIN : 0;
  panel_chains sum, c;
  for (int k = 0; k < s->view.n_k; k += CHAIN, x += CHAIN * n_tokens) {
    if (k < n_whole) of->chains[n_tokens](&c, &s->view, k, x);
    else chain_of_wide(&c, wide, k, (int)min_of(CHAIN, s->view.n_k - k), x, n_tokens);
    for (int v = 0; v < VECTORS; v++) {
      for (int t = 0; t < n_tokens; t++)
        sum.sum[v][t] = k ? sum.sum[v][t] + c.sum[v][t] : c.sum[v][t];
    }
  }
  for (int v = 0; v < VECTORS; v++) {
    for (int t = 0; t < n_tokens; t++)
      fold(y + t * y_stride + v * VL, n_cols - v * VL, sum.sum[v][t], is_first);
  }
}

void flashrt_stream_stored(const stored_matrix *m, int64_t panel, const float *x, int n_rows,
                           int n_tiles, float *y, int64_t y_stride, int64_t n_cols) {
  for (int64_t k0 = 0; k0 < m->K; k0 += SLICE) {
    open_slice s;
    flashrt_open_slice(&s, m, panel, k0);
    _Alignas(64) float wide[SLICE * LANES];
    if (!s.is_fast || s.view.n_k % CHAIN) {
      for (int band = 0; band < BANDS; band++)
        flashrt_widen_band(&s, band, wide + band * SLICE * BAND);
    }
    for (int tile = 0, row = 0; tile < n_tiles; tile++) {
      int n_tokens = n_rows / n_tiles + (tile < n_rows % n_tiles);
      stream_tile(&s, wide, x, n_tokens, y + row * y_stride, y_stride, n_cols, k0 == 0);
      x += s.view.n_k * n_tokens;
      row += n_tokens;
    }
  }
}
