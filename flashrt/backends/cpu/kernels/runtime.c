/* What the host calls besides kernels: replay a launch list.
 *
 * IS: the C half of the device's verbs, and moving a launch from run to run (core/runs.py). IS NOT:
 * threads (pool.c), copies (copy.c), the digest (digest.c).
 */
#include "common.h"
#include "pool.h"

enum { MOST_ARGUMENTS = 1024 /* bytes */ };

typedef struct {
  void (*fn)(const void *arguments, int tid, int nt);
  const void *arguments; /* pointers first, n_params of them */
  int nbytes, n_params;
  int moves_at; /* bytes from `arguments` to the table of runs and the strides; 0: it stays */
  int is_joint; /* its threads wait for each other within a run, or share claims */
} flashrt_launch;

typedef struct {
  const flashrt_launch *launches;
  int n;
  const void *table; /* what is written to `at` first */
  int table_nbytes;
  void *at;
} launch_list;

/* Of each run of the table, one call: on a copy of the arguments, moved there. Threads go from run
 * to run without waiting for each other, where the kernel allows it, and change places: who has the
 * larger share of one run has the smaller of the next. */
static void run_moving(const flashrt_launch *l, int tid, int nt) {
  _Alignas(16) char copy[MOST_ARGUMENTS];
  const int32_t *runs;
  const char *moves = (const char *)l->arguments + l->moves_at;
  memcpy(&runs, moves, sizeof runs);
  const int32_t (*strides)[3] = (const void *)(moves + sizeof runs);
  for (int i = 0; i < runs[RUNS_COUNT]; i++) {
    const int32_t *run = runs + RUNS_FIRST + i * RUN_WORDS;
    memcpy(copy, l->arguments, (size_t)l->nbytes);
    char **operands = (char **)copy;
    for (int p = 0; p < l->n_params; p++) {
      operands[p] += (int64_t)run[RUN_LANE] * strides[p][0] * RUNS_STRIDE_UNIT +
                     (int64_t)run[RUN_FIRST_ROW] * strides[p][1] + (int64_t)i * strides[p][2];
    }
    if (i && l->is_joint) flashrt_barrier(nt);
    l->fn(copy, (tid + i) % nt, nt);
  }
}

static void replay_body(void *argument, int tid, int nt) {
  const launch_list *list = argument;
  for (int i = 0; i < list->n; i++) {
    const flashrt_launch *l = &list->launches[i];
    if (i) flashrt_barrier(nt); /* the last one is the end of the region */
    if (l->moves_at) run_moving(l, tid, nt);
    else l->fn(l->arguments, tid, nt);
  }
}

static void write_table(void *argument) {
  const launch_list *list = argument;
  if (list->table_nbytes) memcpy(list->at, list->table, (size_t)list->table_nbytes);
}

/* Launches in order, each seeing all that the ones before it wrote. No other replay comes between
 * the writing of the table and the launches. */
void flashrt_replay(const flashrt_launch *launches, int n, const void *table, int table_nbytes,
                    void *at) {
  launch_list list = {launches, n, table, table_nbytes, at};
  pool_run(write_table, replay_body, &list);
}

/* The same on the calling thread, for lists too short to wake the others for. */
void flashrt_replay_alone(const flashrt_launch *launches, int n, const void *table,
                          int table_nbytes, void *at) {
  launch_list list = {launches, n, table, table_nbytes, at};
  pool_run_alone(write_table, replay_body, &list);
}
