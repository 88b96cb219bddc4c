/* Batches of copies, and fill.
 *
 * IS: bytes moved at the speed of memory. IS NOT: what to move (core/copylist.py).
 */
#include "common.h"
#include "pool.h"

enum {
  WORTH_SHARING = 4 << 20, /* bytes; below, waking a sleeping thread costs more than it brings */
  WORTH_SHARING_AWAKE = 2 << 20, /* the same while the threads still wait for work */
  WORTH_STREAMING = 1 << 20,     /* bytes of a batch; more would leave a core's cache by itself */
  PAGE = 4096                    /* shorter rows are not worth a stream of their own */
};

/* `height` rows of `width` bytes; the order of fields is that of core/copylist.py. */
typedef struct {
  uint64_t src, dst, width, height, src_pitch, dst_pitch;
} flashrt_copy_desc;

typedef struct {
  const flashrt_copy_desc *copies;
  int n;
  uint64_t nbytes;
} copy_batch;

/* memcpy past the caches: lines of dst are not read only to be overwritten. */
static void stream(char *dst, const char *src, uint64_t n) {
#if defined __AVX2__
  enum { STEP = 128, AHEAD = 1024 };
  uint64_t head = -(uintptr_t)dst & 31;
  if (head > n) head = n;
  memcpy(dst, src, head);
  dst += head, src += head, n -= head;
  for (; n >= STEP; dst += STEP, src += STEP, n -= STEP) {
    __m256i v[STEP / 32];
    _mm_prefetch(src + AHEAD, _MM_HINT_T0);
    _mm_prefetch(src + AHEAD + 64, _MM_HINT_T0);
    UNROLL for (int i = 0; i < STEP / 32; i++) v[i] = _mm256_loadu_si256((const __m256i *)src + i);
    UNROLL for (int i = 0; i < STEP / 32; i++) _mm256_stream_si256((__m256i *)dst + i, v[i]);
  }
#endif
  memcpy(dst, src, n);
}

/* Bytes [begin, end) of a copy, its rows laid end to end. */
static void copy_part(const flashrt_copy_desc *c, uint64_t begin, uint64_t end, int is_streamed) {
  while (begin < end) {
    uint64_t row = begin / c->width, col = begin % c->width;
    uint64_t n = c->width - col < end - begin ? c->width - col : end - begin;
    if (!col && c->src_pitch == c->width && c->dst_pitch == c->width) n = end - begin;
    const void *src = (const void *)(uintptr_t)(c->src + row * c->src_pitch + col);
    void *dst = (void *)(uintptr_t)(c->dst + row * c->dst_pitch + col);
    if (is_streamed && n >= PAGE) stream(dst, src, n);
    else memcpy(dst, src, n);
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
    copy_part(c, begin, end < nbytes ? end : nbytes, batch->nbytes >= WORTH_STREAMING);
    before += nbytes;
  }
#if defined __AVX2__
  _mm_sfence(); /* streamed stores are weakly ordered */
#endif
}

/* Copies of a batch do not overlap each other (core/copylist.py says so), so they may run in any
 * order. */
void flashrt_copy(const flashrt_copy_desc *copies, int n) {
  copy_batch batch = {copies, n, 0};
  for (int i = 0; i < n; i++) batch.nbytes += copies[i].width * copies[i].height;
  int is_middling = batch.nbytes >= WORTH_SHARING_AWAKE && batch.nbytes < WORTH_SHARING;
  if (is_middling) pool_run_if_awake(copy_body, &batch);
  else pool_run_if(batch.nbytes >= WORTH_SHARING, copy_body, &batch);
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
