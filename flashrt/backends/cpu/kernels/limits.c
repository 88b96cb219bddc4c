/* The machine's own limits, measured by the same threads as the kernels: what benchmarks put
 * beside each number.
 * IS: multiply-add peak, read bandwidth. IS NOT: timing; the caller has the
 * clock.
 */
#include "common.h"
#include "pool.h"

enum { CHAINS = 12 }; /* enough to hide the latency of an fma, few enough for 16 registers */

typedef struct {
  const void *base;
  int64_t n; /* iterations, or bytes */
} limit_job;

/* Results go here, so that no compiler drops the work. */
static volatile float fma_sink;
static volatile uint32_t read_sink;

static void fma_body(void *argument, int tid, int nt) {
  (void)nt;
  vf chain[CHAINS], factor = v_set(1.0001f), term = v_set(1e-9f);
  UNROLL
  for (int i = 0; i < CHAINS; i++) chain[i] = v_set(1.0f + 0.01f * (float)(i + tid));
  for (int64_t n = ((const limit_job *)argument)->n; n > 0; n--) {
    UNROLL
    for (int i = 0; i < CHAINS; i++) chain[i] = v_fma(chain[i], factor, term);
  }
  UNROLL
  for (int i = 1; i < CHAINS; i++) chain[0] = chain[0] + chain[i];
  fma_sink = chain[0][0];
}

static int team_size;
static void count_body(void *argument, int tid, int nt) {
  (void)argument;
  if (!tid) team_size = nt;
}

/* Runs `iterations` rounds of independent fused multiply-adds on every thread; returns the FLOP
 * done. */
double flashrt_fma_peak(long iterations) {
  limit_job job = {NULL, iterations};
  pool_run(NULL, count_body, NULL);
  pool_run(NULL, fma_body, &job);
  return 2.0 * VL * CHAINS * (double)iterations * team_size;
}

static void read_body(void *argument, int tid, int nt) {
  const limit_job *job = argument;
  enum { STEP = VL * 4 * 4 };
  span mine = share(job->n / STEP, tid, nt);
  vu sum[4] = {{0}};
  const char *base = job->base;
  for (int64_t i = mine.begin; i < mine.end; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) sum[j] ^= v_load_words(base + i * STEP + j * VL * 4);
  }
  vu all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  uint32_t word = 0;
  for (int i = 0; i < VL; i++) word ^= all[i];
  read_sink = word;
}

/* Reads nbytes once, each thread a contiguous share. */
void flashrt_read_stream(const void *base, uint64_t nbytes) {
  limit_job job = {base, (int64_t)nbytes};
  pool_run(NULL, read_body, &job);
}
