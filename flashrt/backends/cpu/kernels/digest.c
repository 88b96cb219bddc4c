/* The state digest. IS: the sums that core/digest.py defines, over elements as they are stored. IS
 * NOT: the definition, nor the folding into hexadecimal digits.
 *
 * Terms are added modulo 2^64, so any order gives the same sums: elements are visited in storage
 * order, by all threads.
 */
#include <stdatomic.h>

#include "common.h"
#include "pool.h"

/* Rows [start, stop) of a region; fields in the order of DigestTerm.FORMAT, the offset made an
 * address. */
typedef struct {
  uint64_t address, seed;
  int64_t planes, start, stop, origin, cols, pitch, elem_nbytes, layout;
} flashrt_digest_term;

typedef struct {
  uint64_t lo, hi;
} digest_sums;

enum { WORTH_SHARING = 16 << 10 /* elements */ };

INLINE uint64_t mix(uint64_t z) {
  z = (z ^ z >> 32) * DIGEST_G;
  z = (z ^ z >> 29) * DIGEST_H;
  return z ^ z >> 32;
}

/* One run of n elements whose keys are key, key + step, key + 2 step, ...: along columns step is
 * DIGEST_C, along rows it is DIGEST_B. */
#define DEFINE_RUN(name, type)                                                        \
  static digest_sums name(const type *bits, int64_t n, uint64_t key, uint64_t step) { \
    digest_sums sums = {0, 0};                                                        \
    for (int64_t i = 0; i < n; i++) {                                                 \
      uint64_t k = key + (uint64_t)i * step, v = (uint64_t)bits[i] + 1;               \
      sums.lo += mix(k ^ v * DIGEST_D);                                               \
      sums.hi += mix((k + DIGEST_E) * DIGEST_D ^ v * DIGEST_F);                       \
    }                                                                                 \
    return sums;                                                                      \
  }
DEFINE_RUN(run_of_8, uint8_t)
DEFINE_RUN(run_of_16, uint16_t)
DEFINE_RUN(run_of_32, uint32_t)

static digest_sums run(const char *base, int64_t index, int64_t n, uint64_t key, uint64_t step,
                       int64_t elem_nbytes) {
  if (elem_nbytes == 1) return run_of_8((const uint8_t *)base + index, n, key, step);
  if (elem_nbytes == 2) return run_of_16((const uint16_t *)base + index, n, key, step);
  return run_of_32((const uint32_t *)base + index, n, key, step);
}

/* A group of 32 lanes of which [first, last) count. Pairs of bfloat16 are put back in the order of
 * lanes. */
static digest_sums lanes(const char *base, int64_t index, int first, int last, uint64_t key,
                         uint64_t step, int64_t elem_nbytes) {
  uint16_t natural[LANES];
  if (elem_nbytes != 2)
    return run(base, index + first, last - first, key + (uint64_t)first * step, step, elem_nbytes);
  for (int lane = 0; lane < LANES; lane++) {
    natural[lane] = ((const uint16_t *)base)[index + lane_slot(lane, DTYPE_BF16)];
  }
  return run_of_16(natural + first, last - first, key + (uint64_t)first * step, step);
}

static void add(digest_sums *sums, digest_sums more) {
  sums->lo += more.lo;
  sums->hi += more.hi;
}

/* Columns [begin, end) of plain rows. */
static digest_sums plain_row(const flashrt_digest_term *t, const char *plane, uint64_t key,
                             int64_t row, int64_t begin, int64_t end) {
  int64_t index = (row - t->origin) * t->cols + begin;
  return run(plane, index, end - begin, key + (uint64_t)row * DIGEST_B + (uint64_t)begin * DIGEST_C,
             DIGEST_C, t->elem_nbytes);
}

/* The rows of one granule that lie in [start, stop). `granule` counts from row `origin`. */
static digest_sums granule_rows(const flashrt_digest_term *t, const char *plane, uint64_t key,
                                int64_t granule) {
  int64_t row = t->origin + granule * LANES;
  int first = (int)max_of(t->start - row, 0), last = (int)min_of(t->stop - row, LANES);
  int64_t col_blocks = ceil_div(t->cols, LANES);
  digest_sums sums = {0, 0};
  if (t->layout == LAYOUT_ROWS_IN_LANES) {
    for (int64_t col = 0; col < t->cols; col++) {
      uint64_t k = key + (uint64_t)row * DIGEST_B + (uint64_t)col * DIGEST_C;
      add(&sums, lanes(plane, (granule * t->cols + col) * LANES, first, last, k, DIGEST_B,
                       t->elem_nbytes));
    }
    return sums;
  }
  for (int64_t block = 0; block < col_blocks; block++) {
    int n_cols = (int)min_of(t->cols - block * LANES, LANES);
    for (int r = first; r < last; r++) {
      uint64_t k = key + (uint64_t)(row + r) * DIGEST_B + (uint64_t)block * LANES * DIGEST_C;
      add(&sums, lanes(plane, ((granule * col_blocks + block) * LANES + r) * LANES, 0, n_cols, k,
                       DIGEST_C, t->elem_nbytes));
    }
  }
  return sums;
}

typedef struct {
  const flashrt_digest_term *terms;
  int n;
  _Atomic uint64_t (*out)[2];
} digest_batch;

/* A term's units: chunks of a plain row, or granules; thread tid takes its share of each term's. */
static digest_sums term_part(const flashrt_digest_term *t, int tid, int nt) {
  enum { CHUNK = 4096 };
  int64_t first_granule = (t->start - t->origin) / LANES;
  int64_t chunks = ceil_div(t->cols, CHUNK);
  int64_t units_per_plane = t->layout == LAYOUT_PLAIN
                                ? (t->stop - t->start) * chunks
                                : ceil_div(t->stop - t->origin, LANES) - first_granule;
  digest_sums sums = {0, 0};
  if (t->start >= t->stop) return sums;
  span mine = share(t->planes * units_per_plane, tid, nt);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    int64_t p = i / units_per_plane, unit = i % units_per_plane;
    const char *plane = (const char *)(uintptr_t)t->address + p * t->pitch;
    uint64_t key = t->seed + (uint64_t)p * DIGEST_A;
    if (t->layout == LAYOUT_PLAIN) {
      int64_t begin = unit % chunks * CHUNK;
      add(&sums, plain_row(t, plane, key, t->start + unit / chunks, begin,
                           min_of(begin + CHUNK, t->cols)));
    } else {
      add(&sums, granule_rows(t, plane, key, first_granule + unit));
    }
  }
  return sums;
}

static void digest_body(void *argument, int tid, int nt) {
  const digest_batch *batch = argument;
  for (int i = 0; i < batch->n; i++) {
    digest_sums sums = term_part(&batch->terms[i], tid, nt);
    atomic_fetch_add(&batch->out[i][0], sums.lo);
    atomic_fetch_add(&batch->out[i][1], sums.hi);
  }
}

/* out [n][2]: sums lo and hi of each term. */
void flashrt_digest(const flashrt_digest_term *terms, int n, uint64_t (*out)[2]) {
  digest_batch batch = {terms, n, (_Atomic uint64_t (*)[2])out};
  int64_t n_elements = 0;
  for (int i = 0; i < n; i++)
    n_elements += terms[i].planes * (terms[i].stop - terms[i].start) * terms[i].cols;
  memset(out, 0, (size_t)n * sizeof *out);
  pool_run_if(n_elements >= WORTH_SHARING, digest_body, &batch);
}
