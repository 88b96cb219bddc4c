/* Weights from files to panels, by all threads at once.
 *
 * IS: parts of files read, hashed in the order of the list and packed, each by the thread that read
 * it, while its cache has the bytes. IS NOT: which bytes are which weights (weights/direct.py), nor
 * packing itself (pack.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "pack.h"
#include "pool.h"
#include "xxh3.h"

/* The order of fields is that of core/direct.py. */
typedef struct {
  const void *before; /* bytes that are hashed first */
  int64_t n_before;
  int64_t file, offset, nbytes; /* a file that is negative: nothing more */
  void *to;                     /* storage of whole panels */
  const int64_t *order;
  int64_t N, K, row_nbytes;
  int64_t type, dtype, group, outer, scales;
} flashrt_part;

typedef struct {
  const flashrt_part *parts;
  int64_t n, most_nbytes;
  xxh3_state *hash;
  _Atomic int64_t next, n_hashed, failed; /* failed: n, or the first part that was not read */
  atomic_int why;
} part_list;

static int read_part(const flashrt_part *part, char *out) {
  for (int64_t done = 0; done < part->nbytes;) {
    ssize_t count = pread((int)part->file, out + done, (size_t)(part->nbytes - done),
                          (off_t)(part->offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count < 0 ? errno : ENODATA;
    done += count;
  }
  return 0;
}

static void give_up(part_list *list, int64_t i, int why) {
  int64_t others = atomic_load(&list->failed);
  while (i < others && !atomic_compare_exchange_weak(&list->failed, &others, i)) {
  }
  atomic_store(&list->why, why);
}

/* Whether all parts before were hashed; not, where one of them cannot be read. */
static int in_turn(part_list *list, int64_t i) {
  enum { N_YIELDS = 100 };
  int n_yields = 0;
  while (atomic_load_explicit(&list->n_hashed, memory_order_acquire) != i) {
    if (atomic_load_explicit(&list->failed, memory_order_relaxed) < i) return 0;
    if (++n_yields < N_YIELDS) sched_yield();
    else nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL); /* its core was taken away */
  }
  return 1;
}

static void pack_part(const flashrt_part *part, const char *bytes) {
  row_source source = {.bytes = bytes,
                       .row_nbytes = part->row_nbytes,
                       .order = part->order,
                       .N = part->N,
                       .type = (int)part->type,
                       .m = stored_matrix_of(part->to, (int)part->dtype, (int)part->group,
                                             (int)part->outer, (int)part->scales, part->K)};
  for (int64_t panel = 0; panel < ceil_div(part->N, LANES); panel++) pack_panel(&source, panel);
}

static void load_body(void *argument, int tid, int nt) {
  part_list *list = argument;
  void *room = NULL;
  int is_short = posix_memalign(&room, 4096, (size_t)max_of(list->most_nbytes, 1));
  for (;;) {
    int64_t i = atomic_fetch_add(&list->next, 1);
    if (i >= list->n || atomic_load_explicit(&list->failed, memory_order_relaxed) < i) break;
    const flashrt_part *part = &list->parts[i];
    int is_read = part->file >= 0, why = is_read && is_short ? ENOMEM : 0;
    if (is_read && !why) why = read_part(part, room);
    if (why) {
      give_up(list, i, why);
      break;
    }
    if (!in_turn(list, i)) break;
    xxh3_update(list->hash, part->before, (uint64_t)part->n_before);
    if (is_read) xxh3_update(list->hash, room, (uint64_t)part->nbytes);
    atomic_store_explicit(&list->n_hashed, i + 1, memory_order_release);
    if (is_read) pack_part(part, room);
  }
  if (!is_short) free(room);
}

/* Returns n, or the first part that cannot be read, and why (an errno). */
int64_t flashrt_load(const flashrt_part *parts, int64_t n, xxh3_state *hash, int *why) {
  part_list list = {.parts = parts, .n = n, .hash = hash, .failed = n};
  for (int64_t i = 0; i < n; i++)
    if (parts[i].file >= 0) list.most_nbytes = max_of(list.most_nbytes, parts[i].nbytes);
  pool_run(NULL, load_body, &list);
  *why = atomic_load(&list.why);
  return atomic_load(&list.failed);
}

int64_t flashrt_hash_nbytes(void) { return (int64_t)sizeof(xxh3_state); }
void flashrt_hash_begin(xxh3_state *hash) { xxh3_begin(hash); }
void flashrt_hash_end(const xxh3_state *hash, uint64_t *out) { xxh3_end(hash, out); }
