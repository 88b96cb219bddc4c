/* The thread pool: n threads run one function at once, the caller being thread 0.
 *
 * IS: start, run, barrier. IS NOT: a scheduler: kernels split their work by (tid, nt), or by
 * claims (common.h), and no bit depends on which thread did what. Included by: runtime.c and
 * whoever runs something on all threads outside a replay.
 *
 * Waiting spins for about 30 us, then yields two hundred times, then sleeps in the kernel: a
 * replay's barriers are a fraction of a microsecond apart, and a thread that spins longer takes the
 * core from whoever it waits for when cores are shared.
 */
#pragma once

typedef void (*pool_body)(void *argument, int tid, int nt);

/* Runs body on all threads and returns when all are done. One region at a time; other callers wait
 * their turn. `before` is called first, within the turn; NULL for nothing. */
void pool_run(void (*before)(void *), pool_body body, void *argument);

/* Runs body on the calling thread alone, in turn with the regions: what they share is its own. */
void pool_run_alone(void (*before)(void *), pool_body body, void *argument);

/* Between two regions of one caller: others that wait have their turn first. Without it who has
 * just given the turn up has it again before a sleeper is awake. */
void pool_give_way(void);

/* Runs body on all threads if these still wait for work, and none has gone to sleep; else, and
 * while a region runs, on the calling thread alone. */
void pool_run_if_awake(pool_body body, void *argument);

/* Runs body on the calling thread alone when the work is too small to share. */
void pool_run_if(int is_worth_sharing, pool_body body, void *argument);
