/* Weights to panels. IS: the MATRIX layout of common.h, at the speed of memory: reading a
 * checkpoint is mostly this. IS NOT: file reading or dtype conversion.
 */
#include "common.h"
#include "pool.h"

typedef struct {
  const uint16_t *src;
  uint16_t *dst;
  int64_t N, K;
} matrix_pair;

enum { K_BLOCK = 32, WORTH_SHARING = 64 << 10 /* elements */ };

/* Columns [k0, k1) of one panel; a panel short of rows is completed with zeros. */
static void pack_block(const matrix_pair *m, int64_t panel, int64_t k0, int64_t k1) {
  uint32_t *words = (uint32_t *)(m->dst + panel * m->K * LANES); /* [K][16] */
  int64_t row = panel * LANES, K = m->K;
  const uint16_t *src = m->src + row * K;
  if (m->N - row >= LANES) {
    for (int64_t k = k0; k < k1; k++) {
      for (int r = 0; r < 16; r++)
        words[k * 16 + r] = src[r * K + k] | (uint32_t)src[(r + 16) * K + k] << 16;
    }
    return;
  }
  for (int64_t k = k0; k < k1; k++) {
    for (int r = 0; r < LANES; r++) {
      uint16_t x = row + r < m->N ? src[r * K + k] : 0;
      m->dst[matrix_index(row + r, k, K)] = x;
    }
  }
}

static void pack_body(void *argument, int tid, int nt) {
  const matrix_pair *m = argument;
  span mine = share(ceil_div(m->N, LANES), tid, nt);
  for (int64_t panel = mine.begin; panel < mine.end; panel++) {
    for (int64_t k = 0; k < m->K; k += K_BLOCK) pack_block(m, panel, k, min_of(k + K_BLOCK, m->K));
  }
}

/* src [N, K] bf16 in C order -> dst, panels. */
void flashrt_pack_matrix(const uint16_t *src, uint16_t *dst, int64_t N, int64_t K) {
  matrix_pair m = {src, dst, N, K};
  pool_run_if(N * K >= WORTH_SHARING, pack_body, &m);
}
