/* Weights to panels. IS: the storage of stored.h, at the speed of memory: reading a checkpoint is
 * mostly this. IS NOT: file reading or dtype conversion, nor a check of shapes: see layouts.py.
 */
#include "pool.h"
#include "stored.h"

enum { K_BLOCK = 32, WORTH_SHARING = 64 << 10 /* elements */ };

/* ---- values ---- */

typedef struct {
  const void *src;
  void *dst;
  int64_t N, K;
  int dtype;
} matrix_pair;

/* Columns [k0, k1) of one panel; a panel short of rows is completed with zeros. */
static void pack_block(const matrix_pair *m, int64_t panel, int64_t k0, int64_t k1) {
  int64_t row = panel * LANES, K = m->K;
  int n_rows = (int)min_of(LANES, m->N - row);
  if (m->dtype == DTYPE_F32) {
    const uint32_t *src = (const uint32_t *)m->src + row * K;
    uint32_t *dst = (uint32_t *)m->dst + row * K;
    for (int64_t k = k0; k < k1; k++) {
      for (int r = 0; r < LANES; r++) dst[k * LANES + r] = r < n_rows ? src[r * K + k] : 0;
    }
    return;
  }
  const uint16_t *src = (const uint16_t *)m->src + row * K;
  uint16_t *dst = (uint16_t *)m->dst + row * K;
  if (m->dtype == DTYPE_BF16 && n_rows == LANES) {
    uint32_t *words = (uint32_t *)dst; /* [K][16] */
    for (int64_t k = k0; k < k1; k++) {
      for (int r = 0; r < 16; r++)
        words[k * 16 + r] = src[r * K + k] | (uint32_t)src[(r + 16) * K + k] << 16;
    }
    return;
  }
  for (int64_t k = k0; k < k1; k++) {
    for (int r = 0; r < LANES; r++)
      dst[k * LANES + lane_slot(r, m->dtype)] = r < n_rows ? src[r * K + k] : 0;
  }
}

static void pack_body(void *argument, int tid, int nt) {
  const matrix_pair *m = argument;
  span mine = share(ceil_div(m->N, LANES), tid, nt);
  for (int64_t panel = mine.begin; panel < mine.end; panel++) {
    for (int64_t k = 0; k < m->K; k += K_BLOCK) pack_block(m, panel, k, min_of(k + K_BLOCK, m->K));
  }
}

/* src [N, K] in C order, bfloat16, float16 or float32 -> dst, panels. */
void flashrt_pack_matrix(const void *src, void *dst, int64_t N, int64_t K, int dtype) {
  matrix_pair m = {src, dst, N, K, dtype};
  pool_run_if(N * K >= WORTH_SHARING, pack_body, &m);
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
