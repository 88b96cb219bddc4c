/* What the host calls besides kernels: replay a launch list, move a batch of copies, fill.
 *
 * IS: the C half of the device's verbs. IS NOT: threads (pool.c), the digest (digest.c). Called
 * by: the device, via ctypes.
 */
#include "common.h"
#include "pool.h"

enum {
  WORTH_SHARING = 4 << 20
}; /* bytes; below, waking a sleeping thread costs more than it brings */

/* ---- replay ---- */

typedef struct {
  void (*fn)(const void *arguments, int tid, int nt);
  const void *arguments;
} flashrt_launch;

typedef struct {
  const flashrt_launch *launches;
  int n;
} launch_list;

static void replay_body(void *argument, int tid, int nt) {
  const launch_list *list = argument;
  for (int i = 0; i < list->n; i++) {
    if (i) flashrt_barrier(nt); /* the last one is the end of the region */
    list->launches[i].fn(list->launches[i].arguments, tid, nt);
  }
}

/* Launches in order, each seeing all that the ones before it wrote. */
void flashrt_replay(const flashrt_launch *launches, int n) {
  launch_list list = {launches, n};
  pool_run(replay_body, &list);
}

/* The same on the calling thread, for lists too short to wake the others for. */
void flashrt_replay_alone(const flashrt_launch *launches, int n) {
  launch_list list = {launches, n};
  pool_run_alone(replay_body, &list);
}

/* ---- copies ---- */

/* `height` rows of `width` bytes; the order of fields is that of core/copyplan.py. */
typedef struct {
  uint64_t src, dst, width, height, src_pitch, dst_pitch;
} flashrt_copy_desc;

typedef struct {
  const flashrt_copy_desc *copies;
  int n;
  uint64_t nbytes;
} copy_batch;

/* Bytes [begin, end) of a copy, its rows laid end to end. */
static void copy_part(const flashrt_copy_desc *c, uint64_t begin, uint64_t end) {
  while (begin < end) {
    uint64_t row = begin / c->width, col = begin % c->width;
    uint64_t n = c->width - col < end - begin ? c->width - col : end - begin;
    if (!col && c->src_pitch == c->width && c->dst_pitch == c->width) n = end - begin;
    const void *src = (const void *)(uintptr_t)(c->src + row * c->src_pitch + col);
    memcpy((void *)(uintptr_t)(c->dst + row * c->dst_pitch + col), src, n);
    begin += n;
  }
}

/* Threads take equal shares of the bytes of the whole batch, whatever its pieces; cuts fall on
 * cache lines of a piece. */
static void copy_body(void *argument, int tid, int nt) {
  const copy_batch *batch = argument;
  span mine = share((int64_t)batch->nbytes, tid, nt);
  uint64_t before = 0;
  for (int i = 0; i < batch->n && before < (uint64_t)mine.end; i++) {
    const flashrt_copy_desc *c = &batch->copies[i];
    uint64_t nbytes = c->width * c->height, begin = 0, end = nbytes;
    if (before < (uint64_t)mine.begin) begin = ((uint64_t)mine.begin - before + 63) & ~63ull;
    if (before + nbytes > (uint64_t)mine.end) end = ((uint64_t)mine.end - before + 63) & ~63ull;
    copy_part(c, begin, end < nbytes ? end : nbytes);
    before += nbytes;
  }
}

/* Copies of a batch do not overlap each other (core/copyplan.py says so), so they may run in any
 * order. */
void flashrt_copy(const flashrt_copy_desc *copies, int n) {
  copy_batch batch = {copies, n, 0};
  for (int i = 0; i < n; i++) batch.nbytes += copies[i].width * copies[i].height;
  pool_run_if(batch.nbytes >= WORTH_SHARING, copy_body, &batch);
}

typedef struct {
  char *dst;
  uint64_t nbytes;
  int byte;
} fill_range;

static void fill_body(void *argument, int tid, int nt) {
  const fill_range *range = argument;
  span mine = share((int64_t)range->nbytes, tid, nt);
  memset(range->dst + mine.begin, range->byte, (size_t)(mine.end - mine.begin));
}

void flashrt_fill(void *dst, uint64_t nbytes, int byte) {
  fill_range range = {dst, nbytes, byte};
  pool_run_if(nbytes >= WORTH_SHARING, fill_body, &range);
}
