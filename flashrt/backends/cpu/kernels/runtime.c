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
  void *moved;           /* the same for the lane that is alone in a replay */
  int nbytes, n_params;
  int moves_at; /* bytes from `arguments` to the table of runs and the strides; 0: it stays */
  int is_joint; /* its threads wait for each other within a run, or share claims */
} flashrt_launch;

typedef struct {
  const flashrt_launch *launches;
  int n;
  int first, end;    /* those of them that this region runs */
  const void *table; /* what is written to `at` first */
  int table_nbytes;
  void *at;
  int64_t *lane; /* that `moved` is for */
  int is_alone;  /* one run: `moved` serves */
} launch_list;

/* The arguments as run i of the table has them. */
static void move(const flashrt_launch *l, const int32_t *runs, int i, void *to) {
  const int32_t *run = runs + RUNS_FIRST + i * RUN_WORDS;
  const int32_t (*strides)[3] =
      (const void *)((const char *)l->arguments + l->moves_at + sizeof(void *));
  memcpy(to, l->arguments, (size_t)l->nbytes);
  char **operands = to;
  for (int p = 0; p < l->n_params; p++) {
    operands[p] += (int64_t)run[RUN_LANE] * strides[p][0] * RUNS_STRIDE_UNIT +
                   (int64_t)run[RUN_FIRST_ROW] * strides[p][1] + (int64_t)i * strides[p][2];
  }
}

/* Of each run of the table, one call. Threads go from run to run without waiting for each other,
 * where the kernel allows it, and change places: who has the larger share of one run has the
 * smaller of the next. */
static void run_each(const flashrt_launch *l, int tid, int nt) {
  _Alignas(16) char moved[MOST_ARGUMENTS];
  const int32_t *runs;
  memcpy(&runs, (const char *)l->arguments + l->moves_at, sizeof runs);
  for (int i = 0; i < runs[RUNS_COUNT]; i++) {
    move(l, runs, i, moved);
    if (i && l->is_joint) flashrt_barrier(nt);
    l->fn(moved, (tid + i) % nt, nt);
  }
}

static void replay_body(void *argument, int tid, int nt) {
  const launch_list *list = argument;
  for (int i = list->first; i < list->end; i++) {
    const flashrt_launch *l = &list->launches[i];
    if (i > list->first) flashrt_barrier(nt); /* the last one is the end of the region */
    if (list->is_alone) l->fn(l->moved, tid, nt);
    else if (l->moves_at) run_each(l, tid, nt);
    else l->fn(l->arguments, tid, nt);
  }
}

/* Before the launches, in their turn: the table, and the moved arguments of a lane that is alone
 * and was not so in the replay before. */
static void prepare(void *argument) {
  launch_list *list = argument;
  if (!list->table_nbytes) return;
  memcpy(list->at, list->table, (size_t)list->table_nbytes);
  const int32_t *runs = list->at;
  list->is_alone = runs[RUNS_COUNT] == 1;
  if (!list->is_alone || *list->lane == runs[RUNS_FIRST + RUN_LANE]) return;
  *list->lane = runs[RUNS_FIRST + RUN_LANE];
  for (int i = 0; i < list->n; i++) {
    const flashrt_launch *l = &list->launches[i];
    if (l->moves_at) move(l, runs, 0, l->moved);
  }
}

/* Launches in order, each seeing all that the ones before it wrote. No other replay comes between
 * the writing of the table and the launches. */
void flashrt_replay(const flashrt_launch *launches, int n, const void *table, int table_nbytes,
                    void *at, int64_t *lane) {
  launch_list list = {launches, n, 0, n, table, table_nbytes, at, lane, 0};
  pool_run(prepare, replay_body, &list);
}

/* The same in a region per launch, between which replays of other arenas have their turn: for lists
 * that take seconds. No other replay of this arena may come meanwhile. */
void flashrt_replay_giving_way(const flashrt_launch *launches, int n, const void *table,
                               int table_nbytes, void *at, int64_t *lane) {
  for (int i = 0; i < n; i++) {
    launch_list list = {launches, n, i, i + 1, table, table_nbytes, at, lane, 0};
    if (i) pool_give_way();
    pool_run(prepare, replay_body, &list);
  }
}

/* The same on the calling thread, for lists too short to wake the others for. */
void flashrt_replay_alone(const flashrt_launch *launches, int n, const void *table,
                          int table_nbytes, void *at, int64_t *lane) {
  launch_list list = {launches, n, 0, n, table, table_nbytes, at, lane, 0};
  pool_run_alone(prepare, replay_body, &list);
}
