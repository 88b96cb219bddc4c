/* Weights to panels. IS: the storage of stored.h, at the speed of memory: reading a checkpoint is
 * mostly this. IS NOT: file reading or dtype conversion, nor a check of shapes: see layouts.py.
 */
#include "pack.h"
#include "pool.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { K_BLOCK = 32, WORTH_SHARING = 64 << 10 /* elements */ };

/* ---- values ---- */

/* Columns [k0, k1) of one panel, value by value; rows that are NULL become zeros. */
static void pack_block(const void *const *rows, char *panel, int64_t k0, int64_t k1, int dtype) {
  for (int r = 0; r < LANES; r++) {
    int slot = lane_slot(r, dtype);
    for (int64_t k = k0; k < k1; k++) {
      if (dtype == DTYPE_F32)
        ((uint32_t *)panel)[k * LANES + slot] = rows[r] ? ((const uint32_t *)rows[r])[k] : 0;
      else ((uint16_t *)panel)[k * LANES + slot] = rows[r] ? ((const uint16_t *)rows[r])[k] : 0;
    }
  }
}

#ifdef __SSE2__
/* Columns [k, k + 8) of the 8 rows in the slots from `slot` on, all there, 2 bytes a value. */
static inline void pack_eight(const void *const *rows, char *panel, int64_t k, int slot,
                              int dtype) {
  __m128i v[8], w[8];
  for (int i = 0; i < 8; i++) {
    int r = dtype == DTYPE_BF16 ? (slot + i) / 2 + (slot + i) % 2 * 16 : slot + i;
    v[i] = _mm_loadu_si128((const __m128i *)((const uint16_t *)rows[r] + k));
  }
  for (int i = 0; i < 4; i++) { /* pairs of rows i, i + 4, and so on twice more */
    w[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);
    w[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    v[2 * i] = _mm_unpacklo_epi16(w[i], w[i + 4]);
    v[2 * i + 1] = _mm_unpackhi_epi16(w[i], w[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    w[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);
    w[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  }
  for (int i = 0; i < 8; i++)
    _mm_storeu_si128((__m128i *)((uint16_t *)panel + (k + i) * LANES + slot), w[i]);
}
#endif

/* A panel of K values a row; a block's rows are a cache line each. */
static void pack_values(const void *const *rows, char *panel, int64_t K, int dtype) {
  int64_t done = 0;
#ifdef __SSE2__
  int is_whole = dtype != DTYPE_F32;
  for (int r = 0; r < LANES; r++) is_whole &= rows[r] != NULL;
  if (is_whole) done = K / 8 * 8;
  for (int64_t k0 = 0; k0 < done; k0 += K_BLOCK) {
    for (int slot = 0; slot < LANES; slot += 8) {
      for (int64_t k = k0; k < min_of(k0 + K_BLOCK, done); k += 8)
        pack_eight(rows, panel, k, slot, dtype);
    }
  }
#endif
  for (int64_t k = done; k < K; k += K_BLOCK)
    pack_block(rows, panel, k, min_of(k + K_BLOCK, K), dtype);
}

static void pack_body(void *argument, int tid, int nt) {
  const row_source *s = argument;
  span mine = share(ceil_div(s->N, LANES), tid, nt);
  for (int64_t panel = mine.begin; panel < mine.end; panel++) pack_panel(s, panel);
}

/* src [N, K] in C order, bfloat16, float16 or float32 -> dst, panels. */
void flashrt_pack_matrix(const void *src, void *dst, int64_t N, int64_t K, int dtype) {
  row_source s = {.bytes = src,
                  .row_nbytes = K * bits_of(dtype) / 8,
                  .N = N,
                  .m = stored_matrix_of(dst, dtype, 0, 0, 0, K)};
  pool_run_if(N * K >= WORTH_SHARING, pack_body, &s);
}

/* ---- codes and scales ---- */

typedef struct {
  const uint8_t *codes;            /* [N, K] */
  const void *scales[MOST_PLANES]; /* [N, ceil(K / size)] or [N, 1] */
  stored_matrix m;
  int64_t N;
} planes_pair;

/* Four codes, a byte each. */
static inline uint32_t four_at(const uint8_t *codes) {
  uint32_t four;
  memcpy(&four, codes, sizeof four);
  return four;
}

/* A row of UNIT codes to its words of a unit, LANES apart. */
INLINE void pack_words(const uint8_t *codes, uint32_t *words, const int dtype) {
  uint32_t high[2] = {0, 0};
  for (int word = 0; word < UNIT / 8; word++) {
    uint32_t four[2] = {four_at(codes + word * 8), four_at(codes + word * 8 + 4)};
    if (dtype == DTYPE_I8) {
      words[2 * word * LANES] = four[0] ^ 0x80808080u;
      words[(2 * word + 1) * LANES] = four[1] ^ 0x80808080u;
      continue;
    }
    words[word * LANES] = (four[0] & 0x0f0f0f0fu) | (four[1] & 0x0f0f0f0fu) << 4;
    for (int is_high = 0; is_high < 2; is_high++) {
      int turn = 2 * word + is_high;
      if (dtype == DTYPE_U5) high[0] |= (four[is_high] >> 4 & 0x01010101u) << turn;
      else if (dtype == DTYPE_U6)
        high[turn / 4] |= (four[is_high] >> 4 & 0x03030303u) << turn % 4 * 2;
    }
  }
  for (int i = 0; i < bits_of(dtype) - 4 && dtype != DTYPE_I8; i++)
    words[(4 + i) * LANES] = high[i];
}

/* The codes of the slice at k0 of a panel. */
static void pack_codes(const planes_pair *p, int64_t panel, int64_t k0, char *out) {
  int64_t K = p->m.K;
  int dtype = p->m.dtype;
  for (int64_t k = k0; k < k0 + filled_length(&p->m, k0); k += UNIT) {
    for (int lane = 0; lane < LANES; lane++) {
      int64_t n = panel * LANES + lane;
      const uint8_t *codes = p->codes + n * K + k;
      uint8_t filled[UNIT] = {0};
      if (n >= p->N || K - k < UNIT) {
        if (n < p->N) memcpy(filled, codes, (size_t)(K - k));
        codes = filled;
      }
      uint32_t *words = (uint32_t *)out + lane;
      switch (dtype) {
        case DTYPE_E4M3:
          for (int i = 0; i < UNIT; i++) out[i * LANES + lane] = (char)codes[i];
          break;
        case DTYPE_I8:
          pack_words(codes, words, DTYPE_I8);
          break;
        case DTYPE_U5:
          pack_words(codes, words, DTYPE_U5);
          break;
        case DTYPE_U6:
          pack_words(codes, words, DTYPE_U6);
          break;
        default:
          pack_words(codes, words, DTYPE_U4);
          break;
      }
    }
    out += UNIT * LANES * bits_of(dtype) / 8;
  }
}

/* A plane of scales of the slice at k0 of a panel. */
static void pack_scales(const planes_pair *p, int plane, int64_t panel, int64_t k0, char *out) {
  plane_shape shape = p->m.planes[plane];
  int64_t length = plane_length(shape, filled_length(&p->m, k0));
  int64_t row_length = plane_length(shape, p->m.K), first = shape.size ? k0 / shape.size : 0;
  for (int lane = 0; lane < LANES; lane++) {
    int64_t n = panel * LANES + lane;
    const char *row = (const char *)p->scales[plane] + n * row_length * shape.item_nbytes;
    for (int64_t i = 0; i < length; i++) {
      char *to = out + (i * LANES + lane) * shape.item_nbytes;
      if (n < p->N && first + i < row_length)
        memcpy(to, row + (first + i) * shape.item_nbytes, (size_t)shape.item_nbytes);
      else memset(to, 0, (size_t)shape.item_nbytes);
    }
  }
}

static void pack_planes_body(void *argument, int tid, int nt) {
  const planes_pair *p = argument;
  span mine = share(ceil_div(p->N, LANES), tid, nt);
  for (int64_t panel = mine.begin; panel < mine.end; panel++) {
    for (int64_t k0 = 0; k0 < p->m.K; k0 += SLICE) {
      const char *planes[MOST_PLANES];
      char *at = (char *)slice_at(&p->m, panel, k0);
      pack_codes(p, panel, k0, (char *)find_planes(&p->m, at, filled_length(&p->m, k0), planes));
      for (int i = 0; i < p->m.n_planes; i++) pack_scales(p, i, panel, k0, (char *)planes[i]);
    }
  }
}

/* Rows of codes [N, K], a byte each, and their planes of scales -> dst, panels. */
void flashrt_pack_planes(const uint8_t *codes, const void *const *scales, void *dst, int64_t N,
                         int64_t K, int dtype, int group, int outer, int kind) {
  planes_pair p = {
      .codes = codes, .N = N, .m = stored_matrix_of(dst, dtype, group, outer, kind, K)};
  for (int i = 0; i < p.m.n_planes; i++) p.scales[i] = scales[i];
  pool_run_if(N * K >= WORTH_SHARING, pack_planes_body, &p);
}

/* ---- blocks, as GGUF files have them ---- */

int64_t block_nbytes(int type) {
  switch (type) {
    case BLOCK_Q4_0:
      return 18;
    case BLOCK_Q4_1:
      return 20;
    case BLOCK_Q5_0:
      return 22;
    case BLOCK_Q5_1:
      return 24;
    case BLOCK_Q8_0:
      return 34;
    case BLOCK_Q4_K:
      return 144;
    case BLOCK_Q5_K:
      return 176;
    default:
      return 210; /* Q6_K */
  }
}

/* 32 codes from nibbles of 32 bytes: the low ones, or with shift 4 the high ones. */
INLINE void nibbles(const uint8_t *q, int shift, uint8_t *codes) {
  for (int i = 0; i < UNIT; i++) codes[i] = q[i] >> shift & 15;
}

/* The low nibbles of 16 bytes, then the high ones. */
INLINE void halves(const uint8_t *q, uint8_t *codes) {
  for (int i = 0; i < UNIT / 2; i++) {
    codes[i] = q[i] & 15;
    codes[i + UNIT / 2] = q[i] >> 4;
  }
}

INLINE void fifth_bits(const uint8_t *h, uint8_t *codes) {
  uint32_t bits = four_at(h);
  for (int i = 0; i < UNIT; i++) codes[i] |= (uint8_t)((bits >> i & 1) << 4);
}

/* Codes of the unit `u` of a block. formats/blocks.py says in numpy where they lie. */
INLINE void unit_codes(const uint8_t *b, int u, uint8_t *codes, const int type) {
  switch (type) {
    case BLOCK_Q4_0:
      halves(b + 2, codes);
      return;
    case BLOCK_Q4_1:
      halves(b + 4, codes);
      return;
    case BLOCK_Q5_0:
      halves(b + 6, codes);
      fifth_bits(b + 2, codes);
      return;
    case BLOCK_Q5_1:
      halves(b + 8, codes);
      fifth_bits(b + 4, codes);
      return;
    case BLOCK_Q8_0:
      memcpy(codes, b + 2, UNIT);
      return;
    case BLOCK_Q4_K:
      nibbles(b + 16 + u / 2 * UNIT, u % 2 * 4, codes);
      return;
    case BLOCK_Q5_K:
      nibbles(b + 48 + u / 2 * UNIT, u % 2 * 4, codes);
      for (int i = 0; i < UNIT; i++) codes[i] |= (uint8_t)((b[16 + i] >> u & 1) << 4);
      return;
    default: { /* Q6_K: each half of the block has 64 bytes of nibbles and 32 of pairs */
      int half = u / 4, v = u % 4;
      nibbles(b + half * 64 + v % 2 * UNIT, v / 2 * 4, codes);
      const uint8_t *high = b + 128 + half * UNIT;
      for (int i = 0; i < UNIT; i++) codes[i] |= (uint8_t)((high[i] >> 2 * v & 3) << 4);
      return;
    }
  }
}

INLINE void put(const char *plane, int64_t index, const uint8_t *from, int nbytes) {
  memcpy((char *)plane + index * nbytes, from, (size_t)nbytes);
}

/* 8 scales and 8 minima of 6 bits each, from 12 bytes. */
static inline void six_bit_scales(const uint8_t *s, uint8_t *scale, uint8_t *minimum) {
  for (int i = 0; i < 4; i++) {
    scale[i] = s[i] & 63;
    minimum[i] = s[4 + i] & 63;
    scale[4 + i] = (uint8_t)((s[8 + i] & 15) | s[i] >> 6 << 4);
    minimum[4 + i] = (uint8_t)(s[8 + i] >> 4 | s[4 + i] >> 6 << 4);
  }
}

/* Scales of the block that begins at unit `u` of the slice. */
INLINE void block_scales(const uint8_t *b, const char *const *planes, int u, int lane,
                         const int type) {
  int64_t at = (int64_t)u * LANES + lane;
  switch (type) {
    case BLOCK_Q4_1:
    case BLOCK_Q5_1:
      put(planes[1], at, b + 2, 2); /* fall through */
    case BLOCK_Q4_0:
    case BLOCK_Q5_0:
    case BLOCK_Q8_0:
      put(planes[0], at, b, 2);
      return;
    case BLOCK_Q4_K:
    case BLOCK_Q5_K: {
      uint8_t scale[8], minimum[8];
      six_bit_scales(b + 4, scale, minimum);
      put(planes[0], lane, b, 2);
      put(planes[1], lane, b + 2, 2);
      for (int i = 0; i < 8; i++) {
        put(planes[2], (int64_t)i * LANES + lane, scale + i, 1);
        put(planes[3], (int64_t)i * LANES + lane, minimum + i, 1);
      }
      return;
    }
    default:
      put(planes[0], lane, b + 208, 2);
      for (int i = 0; i < 16; i++) put(planes[1], (int64_t)i * LANES + lane, b + 192 + i, 1);
      return;
  }
}

/* A row's part of a slice: n_units from `blocks` on, or zeros where it is NULL. */
INLINE void pack_lane(const uint8_t *blocks, const char *const *planes, char *codes, int n_units,
                      int lane, const int type, const int dtype) {
  static const uint8_t nothing[256];
  const int units_of_block = type >= BLOCK_Q4_K ? 8 : 1;
  for (int u = 0; u < n_units; u++) {
    const uint8_t *b = blocks ? blocks + u / units_of_block * block_nbytes(type) : nothing;
    uint8_t unit[UNIT] = {0};
    if (blocks) unit_codes(b, u % units_of_block, unit, type);
    pack_words(unit, (uint32_t *)(codes + u * UNIT * LANES * bits_of(dtype) / 8) + lane, dtype);
    if (u % units_of_block == 0) block_scales(b, planes, u, lane, type);
  }
}

#define PACK_LANE(type, dtype)                                    \
  case type:                                                      \
    pack_lane(blocks, planes, codes, n_units, lane, type, dtype); \
    break

static void pack_blocks(const row_source *s, const void *const *rows, int64_t panel) {
  int64_t nbytes = block_nbytes(s->type), elements = s->type >= BLOCK_Q4_K ? 256 : 32;
  for (int64_t k0 = 0; k0 < s->m.K; k0 += SLICE) {
    const char *planes[MOST_PLANES];
    int64_t n_k = filled_length(&s->m, k0);
    char *codes = (char *)find_planes(&s->m, slice_at(&s->m, panel, k0), n_k, planes);
    int n_units = (int)(n_k / UNIT);
    for (int lane = 0; lane < LANES; lane++) {
      const uint8_t *blocks = rows[lane] ? (const uint8_t *)rows[lane] + k0 / elements * nbytes : 0;
      switch (s->type) {
        PACK_LANE(BLOCK_Q4_0, DTYPE_U4);
        PACK_LANE(BLOCK_Q4_1, DTYPE_U4);
        PACK_LANE(BLOCK_Q5_0, DTYPE_U5);
        PACK_LANE(BLOCK_Q5_1, DTYPE_U5);
        PACK_LANE(BLOCK_Q8_0, DTYPE_I8);
        PACK_LANE(BLOCK_Q4_K, DTYPE_U4);
        PACK_LANE(BLOCK_Q5_K, DTYPE_U5);
        PACK_LANE(BLOCK_Q6_K, DTYPE_U6);
      }
    }
  }
}

void pack_panel(const row_source *s, int64_t panel) {
  const void *rows[LANES];
  for (int r = 0; r < LANES; r++) {
    int64_t n = panel * LANES + r;
    rows[r] = n < s->N ? s->bytes + (s->order ? s->order[n] : n) * s->row_nbytes : NULL;
  }
  if (s->type) pack_blocks(s, rows, panel);
  else
    pack_values(rows, (char *)slice_at(&s->m, 0, 0) + panel * s->m.panel_nbytes, s->m.K,
                s->m.dtype);
}
