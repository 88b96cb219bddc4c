/* What the host calls besides kernels: replay a launch list.
 *
 * IS: the C half of the device's verbs. IS NOT: threads (pool.c), copies (copy.c), the digest
 * (digest.c).
 */
#include "common.h"
#include "pool.h"

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
