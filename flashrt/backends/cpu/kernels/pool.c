/* The thread pool. IS: the implementation of pool.h, of flashrt_barrier and flashrt_claim, and the
 * scratch that kernels share. IS NOT: work.
 *
 * A region is: the caller bumps `generation`, everyone runs the body, everyone meets at the
 * barrier. fork() waits until no region runs. The child has one thread, as POSIX leaves it; it
 * starts the others anew when it first needs them.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "common.h"
#include "float_mode.h"
#include "pool.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#endif

enum { MAX_THREADS = 256, CACHE_LINE = 64, SPIN_NS = 30000, N_YIELDS = 200, HUGE_PAGE = 2 << 20 };
enum { WAY_NS = 20000, N_WAYS = 100 }; /* who waits is awake within the first few */

/* A counter that threads can wait on. */
typedef struct {
  _Alignas(CACHE_LINE) atomic_uint value;
  atomic_uint sleepers;
} wait_word;

static struct {
  int n_threads;
  int n_wanted; /* 0, or after a fork as many as the parent had */
  int n_spins;
  pthread_t threads[MAX_THREADS];
  pool_body body; /* NULL: leave */
  void *argument;
  wait_word generation; /* regions begun */
  wait_word phase;      /* barriers passed */
  _Alignas(CACHE_LINE) atomic_uint n_arrived;
  _Alignas(CACHE_LINE) _Atomic int64_t n_claimed; /* units, since the last barrier */
} pool = {.n_threads = 1};

static pthread_mutex_t turn =
    PTHREAD_MUTEX_INITIALIZER; /* held through a region, a start and a stop */
static atomic_int n_waiting;   /* callers of pool_run that want it */
static struct {
  void *base;
  int64_t nbytes;
} workspace;

/* ---- waiting ---- */

static inline void relax(void) {
#if defined __x86_64__ || defined __i386__
  __builtin_ia32_pause();
#elif defined __aarch64__
  __asm__ volatile("yield");
#endif
}

#ifdef __linux__
static void sleep_while(wait_word *word, unsigned seen) {
  syscall(SYS_futex, &word->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}
static void wake_all(wait_word *word) {
  syscall(SYS_futex, &word->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
static void forget_sleepers(void) {}
#else
static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t woken = PTHREAD_COND_INITIALIZER;
static void sleep_while(wait_word *word, unsigned seen) {
  pthread_mutex_lock(&sleep_mutex);
  while (atomic_load(&word->value) == seen) pthread_cond_wait(&woken, &sleep_mutex);
  pthread_mutex_unlock(&sleep_mutex);
}
static void wake_all(wait_word *word) {
  (void)word;
  pthread_mutex_lock(&sleep_mutex);
  pthread_cond_broadcast(&woken);
  pthread_mutex_unlock(&sleep_mutex);
}
/* In a forked child: a thread that is no more may have held the mutex. */
static void forget_sleepers(void) {
  pthread_mutex_init(&sleep_mutex, NULL);
  pthread_cond_init(&woken, NULL);
}
#endif

static void wait_while(wait_word *word, unsigned seen) {
  for (int n = pool.n_spins; n > 0; n--) {
    if (atomic_load_explicit(&word->value, memory_order_acquire) != seen) return;
    relax();
  }
  /* Between two replays a host's own work takes longer than that; whoever else wants this core gets
   * it meanwhile. */
  for (int n = N_YIELDS; n > 0; n--) {
    sched_yield();
    if (atomic_load_explicit(&word->value, memory_order_acquire) != seen) return;
  }
  atomic_fetch_add(&word->sleepers, 1);
  while (atomic_load(&word->value) == seen) sleep_while(word, seen);
  atomic_fetch_sub(&word->sleepers, 1);
}

/* Sequentially consistent against the sleeper's count: either we see the sleeper, or it sees the
 * new value. */
static void advance(wait_word *word) {
  atomic_fetch_add(&word->value, 1);
  if (atomic_load(&word->sleepers)) wake_all(word);
}

void flashrt_barrier(int nt) {
  if (nt == 1) return;
  unsigned seen = atomic_load_explicit(&pool.phase.value, memory_order_relaxed);
  if (atomic_fetch_add(&pool.n_arrived, 1) + 1 == (unsigned)nt) {
    atomic_store_explicit(&pool.n_arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.n_claimed, 0, memory_order_relaxed);
    advance(&pool.phase);
  } else {
    wait_while(&pool.phase, seen);
  }
}

int flashrt_claim(claim *c) {
  if (c->nt == 1) { /* nobody to share with, and no barrier to start anew */
    c->mine = (span){c->mine.end, min_of(c->mine.end + c->most, c->n)};
    return c->mine.begin < c->n;
  }
  int64_t taken = atomic_load_explicit(&pool.n_claimed, memory_order_relaxed), piece;
  do {
    if (taken >= c->n) return 0;
    piece = max_of(c->least, ceil_div(c->n - taken, 2 * c->nt));
    piece = min_of(min_of(c->most, piece), c->n - taken);
  } while (!atomic_compare_exchange_weak_explicit(&pool.n_claimed, &taken, taken + piece,
                                                  memory_order_relaxed, memory_order_relaxed));
  c->mine = (span){taken, taken + piece};
  return 1;
}

/* ---- threads ---- */

/* Every body runs in the default mode: threads are born with their creator's. */
static void run_body(pool_body body, void *argument, int tid, int nt) {
  float_mode callers = enter_default_mode();
  body(argument, tid, nt);
  leave_default_mode(callers);
}

static void *work(void *tid_as_pointer) {
  int tid = (int)(intptr_t)tid_as_pointer;
  for (unsigned seen = 0;; seen++) {
    wait_while(&pool.generation, seen);
    if (!pool.body) return NULL;
    run_body(pool.body, pool.argument, tid, pool.n_threads);
    flashrt_barrier(pool.n_threads);
  }
}

static void forget_threads(void) {
  pool.n_threads = 1;
  atomic_store(&pool.generation.value, 0);
  atomic_store(&pool.generation.sleepers, 0);
  atomic_store(&pool.phase.sleepers, 0);
  atomic_store(&pool.n_arrived, 0);
  atomic_store(&pool.n_claimed, 0);
}

static int spins_of(int n_threads) {
  if (n_threads > sysconf(_SC_NPROCESSORS_ONLN)) return 1; /* whoever we wait for needs this core */
  struct timespec start, stop;
  enum { SAMPLE = 1000 };
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < SAMPLE; i++) relax();
  clock_gettime(CLOCK_MONOTONIC, &stop);
  double ns = (double)(stop.tv_sec - start.tv_sec) * 1e9 + (double)(stop.tv_nsec - start.tv_nsec);
  double spins = SPIN_NS * SAMPLE / (ns > 1 ? ns : 1);
  return spins < 100 ? 100 : spins > 100000 ? 100000 : (int)spins;
}

/* With the turn held. */
static void stop_threads(void) {
  pool.body = NULL;
  if (pool.n_threads > 1) advance(&pool.generation);
  for (int tid = 1; tid < pool.n_threads; tid++) pthread_join(pool.threads[tid], NULL);
  forget_threads();
}

/* With the turn held. 0, or -1 when the system refuses; then the pool has one thread. */
static int start_threads(int n_threads) {
  pool.n_wanted = 0;
  pool.n_spins = spins_of(n_threads);
  int n = 1;
  while (n < n_threads && !pthread_create(&pool.threads[n], NULL, work, (void *)(intptr_t)n)) n++;
  pool.n_threads = n;
  if (n == n_threads) return 0;
  stop_threads();
  return -1;
}

/* ---- regions ---- */

/* With the turn held. */
static void run_region(pool_body body, void *argument) {
  int nt = pool.n_threads;
  if (nt > 1) {
    pool.body = body;
    pool.argument = argument;
    advance(&pool.generation);
  }
  run_body(body, argument, 0, nt);
  flashrt_barrier(nt);
}

static void take_turn(void) {
  atomic_fetch_add_explicit(&n_waiting, 1, memory_order_relaxed);
  pthread_mutex_lock(&turn);
  atomic_fetch_sub_explicit(&n_waiting, 1, memory_order_relaxed);
}

void pool_give_way(void) {
  const struct timespec pause = {0, WAY_NS};
  for (int i = 0; i < N_WAYS && atomic_load_explicit(&n_waiting, memory_order_relaxed); i++) {
    nanosleep(&pause, NULL);
  }
}

void pool_run(void (*before)(void *), pool_body body, void *argument) {
  take_turn();
  if (before) before(argument);
  if (pool.n_wanted) start_threads(pool.n_wanted); /* where that fails, one thread goes on */
  run_region(body, argument);
  pthread_mutex_unlock(&turn);
}

void pool_run_alone(void (*before)(void *), pool_body body, void *argument) {
  take_turn();
  if (before) before(argument);
  run_body(body, argument, 0, 1);
  pthread_mutex_unlock(&turn);
}

void pool_run_if_awake(pool_body body, void *argument) {
  if (pthread_mutex_trylock(&turn) == 0) {
    int is_awake = !atomic_load_explicit(&pool.generation.sleepers, memory_order_relaxed);
    if (is_awake) run_region(body, argument);
    pthread_mutex_unlock(&turn);
    if (is_awake) return;
  }
  run_body(body, argument, 0, 1);
}

void pool_run_if(int is_worth_sharing, pool_body body, void *argument) {
  if (is_worth_sharing) pool_run(NULL, body, argument);
  else run_body(body, argument, 0, 1);
}

/* ---- start and fork ---- */

static void before_fork(void) { pthread_mutex_lock(&turn); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&turn); }
static void after_fork_in_child(void) {
  if (pool.n_threads > 1) pool.n_wanted = pool.n_threads; /* else as many as were wanted before */
  forget_threads();
  pthread_mutex_init(&turn, NULL);
  atomic_store(&n_waiting, 0);
  forget_sleepers();
}
static void watch_forks(void) {
  pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* Threads [1, n_threads) are started, those of an earlier start are stopped. 0, or -1 when the
 * system refuses; then the pool has one thread. */
int flashrt_pool_start(int n_threads) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (n_threads < 1 || n_threads > MAX_THREADS) return -1;
  pthread_once(&once, watch_forks);
  pthread_mutex_lock(&turn);
  int status = 0;
  if (n_threads != pool.n_threads) {
    stop_threads();
    status = start_threads(n_threads);
  }
  pool.n_wanted = 0;
  pthread_mutex_unlock(&turn);
  return status;
}

/* ---- scratch ---- */

/* Reserves at least nbytes for flashrt_scratch, touched once so that no launch meets a page fault.
 * 0, or -1: no memory, and what was reserved before stays. To be called before kernels run, never
 * by them. */
int64_t flashrt_workspace(int64_t nbytes) {
  pthread_mutex_lock(&turn);
  int status = 0;
  if (nbytes > workspace.nbytes) {
    void *base = NULL;
    if (posix_memalign(&base, HUGE_PAGE, (size_t)nbytes)) {
      status = -1;
    } else {
#ifdef MADV_HUGEPAGE
      madvise(base, (size_t)nbytes, MADV_HUGEPAGE); /* a hint: kernels walk far through it */
#endif
      memset(base, 0, (size_t)nbytes);
      free(workspace.base);
      workspace.base = base;
      workspace.nbytes = nbytes;
    }
  }
  pthread_mutex_unlock(&turn);
  return status;
}

void *flashrt_scratch(int64_t nbytes) { return nbytes <= workspace.nbytes ? workspace.base : NULL; }
