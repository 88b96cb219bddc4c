// fiber.h - fibers, barriers, warp collectives and the launch loop. Part of simt.h.
#pragma once
#include <sys/mman.h>

#if !defined(__x86_64__)
#error "the SIMT shim switches fibers in x86-64 assembly; other processors need their own simt_swap"
#endif

// Save callee-saved registers and the stack pointer into *save, continue where `load` was saved.
extern "C" void simt_swap(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(.text
.p2align 5
.type simt_swap,@function
simt_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx; jmp *%rcx
.size simt_swap,.-simt_swap)");  // jmp, not ret: the return predictor would miss every time

extern "C" char __bss_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

namespace simt {

constexpr int MAX_THREADS = 1024, STACK_BYTES = 64 << 10, DYNAMIC_BYTES = 256 << 10,
              CANARY_BYTES = 256;
constexpr int MAX_COPIES = 64;
// seed bit: threads that exited count as arrived (sm_70 and later)
constexpr uint64_t LENIENT = 1ull << 63;
constexpr char POISON = char(0xFF);  // NaN in every float format
constexpr uint64_t STACK_CANARY = 0x5ca1ab1e0ddba11;

enum State : uint8_t { RUNNABLE, AT_BARRIER, IN_WARP_OP, DONE };

struct alignas(64) Fiber {
  void* stack;
  uint3 index;
  unsigned linear, mask;  // linear thread id; mask of the collective it waits in
  State state;
  uint8_t barrier;
  int line;  // where it waits
  const char* file;
  void (*function)(Fiber*, unsigned);  // collective: run once, by the last lane to arrive
  void* operands;                      // of this lane, on its own stack
};

// cp.async: issued copies, done only when waited for.
struct AsyncCopies {
  struct Copy {
    void* dst;
    const void* src;
    int nbytes, valid, line;
    const char* file;
  };
  int n, n_groups, group_end[MAX_COPIES];
  Copy copy[MAX_COPIES];
};

struct Barrier {
  int arrived, expected, any_next, any;
};

SIMT_STATE Fiber* current;
SIMT_STATE Fiber* fibers;              // lane l of warp w is fibers[32 w + l]
SIMT_STATE AsyncCopies* async_copies;  // per thread
SIMT_STATE Fiber* ready[MAX_THREADS];  // ring of runnable fibers
SIMT_STATE unsigned ready_head, n_ready, n_threads, n_live;
SIMT_STATE unsigned waiting[MAX_THREADS / 32];  // lanes of each warp that wait in a collective
SIMT_STATE Barrier barriers[16];
SIMT_STATE char *stacks, *dynamic_shared;
SIMT_STATE void* main_stack;
SIMT_STATE void (*thunk)(void**);
SIMT_STATE void** parameters;
SIMT_STATE char* error_text;
SIMT_STATE int error_size, has_failed;
SIMT_STATE uint64_t random_state, n_syncs, n_switches;
SIMT_STATE uint32_t block_epoch, warp_epoch[MAX_THREADS / 32];  // synchronisations passed (race.h)
SIMT_STATE bool is_lenient;

inline unsigned random_below(unsigned n) {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned(((random_state >> 32) * n) >> 32);
}

inline void make_ready(Fiber* f) {
  f->state = RUNNABLE;
  ready[(ready_head + n_ready++) % MAX_THREADS] = f;
}

inline Fiber* take_ready() {
  if (!n_ready) return nullptr;
  if (random_state)
    std::swap(ready[ready_head], ready[(ready_head + random_below(n_ready)) % MAX_THREADS]);
  Fiber* f = ready[ready_head];
  ready_head = (ready_head + 1) % MAX_THREADS;
  n_ready--;
  return f;
}

// Leave the current fiber for a runnable one; for launch() if there is none.
inline void yield() {
  Fiber *me = current, *next = take_ready();
  n_switches++;
  if (next == me) return;
  current = next;
  simt_swap(&me->stack, next ? next->stack : main_stack);
}

// Abandon the launch with a message.
[[noreturn]] inline void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(error_text, error_size, format, args);
  va_end(args);
  has_failed = 1;
  simt_swap(&current->stack, main_stack);
  abort();
}

inline void release(int id) {
  Barrier& b = barriers[id];
  b.arrived = 0;
  b.any = b.any_next;
  b.any_next = 0;
  block_epoch++;
  for (unsigned i = 0; i < n_threads; i++) {
    Fiber& f = fibers[i];
    if (f.state == AT_BARRIER && f.barrier == id && &f != current) make_ready(&f);
  }
}

// Returns the disjunction of all threads' predicates.
inline int wait_barrier(int id, int expected, int predicate, int line, const char* file) {
  Barrier& b = barriers[id];
  Fiber* me = current;
  n_syncs++;
  if (b.arrived && b.expected != expected)
    fail("%s:%d: barrier %d: %d threads expected here, %d elsewhere", file, line, id, expected,
         b.expected);
  me->barrier = id;
  me->line = line;
  me->file = file;
  me->state = AT_BARRIER;
  b.expected = expected;
  b.arrived++;
  b.any_next |= predicate;
  bool is_last = b.arrived == (id == 0 && is_lenient ? int(n_live) : expected);
  if (!is_last) {
    yield();
    return b.any;
  }
  for (unsigned i = 0; i < n_threads; i++) {  // every thread must wait at the same source line
    Fiber& f = fibers[i];
    if (f.state == AT_BARRIER && f.barrier == id && (f.line != line || strcmp(f.file, file)))
      fail("divergent barrier %d: thread %u at %s:%d, thread %u at %s:%d", id, me->linear, file,
           line, f.linear, f.file, f.line);
  }
  me->state = RUNNABLE;
  release(id);
  if (random_state) {  // the last to arrive need not be the first to leave
    make_ready(me);
    yield();
  }
  return b.any;
}

// Lanes of `mask` meet; the last one runs `function` once with everybody's operands.
inline void collective(unsigned mask, void (*function)(Fiber*, unsigned), void* operands, int line,
                       const char* file) {
  Fiber* me = current;
  unsigned warp = me->linear / 32, lane = me->linear % 32;
  Fiber* lanes = fibers + 32 * warp;
  n_syncs++;
  if (!(mask >> lane & 1))
    fail("%s:%d: thread %u is not in its own mask %08x", file, line, me->linear, mask);
  me->mask = mask;
  me->function = function;
  me->operands = operands;
  me->line = line;
  me->file = file;
  me->state = IN_WARP_OP;
  waiting[warp] |= 1u << lane;
  if ((waiting[warp] & mask) != mask) {
    yield();
    return;
  }
  for (unsigned m = mask; m; m &= m - 1) {
    Fiber& f = lanes[__builtin_ctz(m)];
    if (f.mask != mask || f.function != function || f.line != line)
      fail("warp %u disagrees: lane %u at %s:%d mask %08x, lane %u at %s:%d mask %08x", warp, lane,
           file, line, mask, f.linear % 32, f.file, f.line, f.mask);
  }
  if (function) function(lanes, mask);
  waiting[warp] &= ~mask;
  warp_epoch[warp]++;
  for (unsigned m = mask; m; m &= m - 1) {
    Fiber* f = lanes + __builtin_ctz(m);
    if (f != me) make_ready(f);
  }
  me->state = RUNNABLE;
  if (random_state) {
    make_ready(me);
    yield();
  }
}

inline void run_thread() {
  thunk(parameters);
  if (async_copies[current->linear].n)
    fail("thread %u ended with %d cp.async never waited for", current->linear,
         async_copies[current->linear].n);
  current->state = DONE;
  n_live--;
  if (is_lenient && barriers[0].arrived && barriers[0].arrived == int(n_live)) release(0);
  yield();
  abort();
}

// Nothing can run and somebody lives: say who waits where.
inline void report_deadlock() {
  unsigned n_done = 0;
  for (unsigned i = 0; i < n_threads; i++) n_done += fibers[i].state == DONE;
  int n = snprintf(error_text, error_size, "deadlock: %u of %u threads exited", n_done, n_threads);
  for (unsigned i = 0; i < n_threads && n < error_size - 160; i++) {
    Fiber& f = fibers[i];
    if (f.state == DONE) continue;
    State state = f.state;
    unsigned count = 0, last = i;
    for (unsigned j = i; j < n_threads; j++)
      if (fibers[j].state == state && fibers[j].line == f.line) {
        count++;
        last = j;
        if (j > i) fibers[j].state = DONE;  // reported
      }
    const char* what = state == AT_BARRIER ? "barrier" : "warp op";
    n += snprintf(error_text + n, error_size - n, "; %u wait at %s %s:%d (first %u, last %u)",
                  count, what, f.file, f.line, f.linear, last);
    if (state == IN_WARP_OP)
      n += snprintf(error_text + n, error_size - n, " mask %08x, absent lanes %08x", f.mask,
                    f.mask & ~waiting[i / 32]);
  }
  has_failed = 1;
}

// Per stack, in place of guard pages, each of which would split a mapping in two.
inline uint64_t* stack_canary(int thread) {
  return (uint64_t*)(stacks + size_t(thread) * STACK_BYTES);
}

inline void place_canaries() {
  for (int i = 0; i < MAX_THREADS; i++) *stack_canary(i) = STACK_CANARY;
}

// What only a launch needs. A process loads thousands of libraries and has one launch at a time, so
// they share it: the first one allocates.
struct Workspace {
  char *stacks, *dynamic_shared;
  Fiber* fibers;
  AsyncCopies* async_copies;
};

inline void allocate(Workspace* shared) {
  void* memory = mmap(nullptr, size_t(MAX_THREADS + 1) * STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  // Below the first stack is room for what overflows it.
  stacks = shared->stacks = (char*)memory + STACK_BYTES;
  place_canaries();
  shared->dynamic_shared = (char*)aligned_alloc(1024, DYNAMIC_BYTES);
  shared->fibers = (Fiber*)aligned_alloc(64, MAX_THREADS * sizeof(Fiber));
  shared->async_copies = (AsyncCopies*)calloc(MAX_THREADS, sizeof(AsyncCopies));
}

inline void take(Workspace* shared) {
  if (!shared->stacks) allocate(shared);
  stacks = shared->stacks;
  dynamic_shared = shared->dynamic_shared;
  fibers = shared->fibers;
  async_copies = shared->async_copies;
}

// Fresh stacks, poisoned shared memory, every thread runnable.
inline void start_block(unsigned dynamic_nbytes) {
  memset(dynamic_shared, POISON, dynamic_nbytes + CANARY_BYTES);
  memset(__bss_start, POISON, _end - __bss_start);
  memset(waiting, 0, sizeof waiting);
  memset(barriers, 0, sizeof barriers);
  ready_head = n_ready = 0;
  n_live = n_threads;
  block_epoch++;
  for (unsigned i = 0; i < n_threads; i++) {
    Fiber& f = fibers[i];
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    f.linear = i;
    async_copies[i].n = async_copies[i].n_groups = 0;
    // staggered tops: equal offsets would put every fiber's frame into the same sets of the L1
    //                 cache
    uintptr_t top =
        uintptr_t(stacks + size_t(i + 1) * STACK_BYTES - i * 832 % 16384) & ~uintptr_t(63);
    void** s = (void**)top;
    *--s = nullptr;  // run_thread() sees a 16-byte aligned frame: rsp % 16 == 8
    *--s = (void*)+[] { run_thread(); };
    for (int r = 0; r < 6; r++) *--s = nullptr;
    f.stack = s;
    make_ready(&f);
  }
}

// Kernels run in the default floating-point mode: to nearest, subnormals kept, no traps. The caller
// of a launch may be in another, by fesetround or by a library linked with -ffast-math.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : callers_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1f80); }
  ~DefaultFloatMode() { __builtin_ia32_ldmxcsr(callers_); }

 private:
  unsigned callers_;
};

inline unsigned common_divisor(unsigned a, unsigned b) { return b ? common_divisor(b, a % b) : a; }

// Run all blocks. `geometry`: grid xyz, block xyz. Returns 0, or -1 with a message.
inline int launch(void (*run)(void**), const unsigned* geometry, unsigned dynamic_nbytes,
                  uint64_t seed, void** params, Workspace* shared, char* error, int size) {
  DefaultFloatMode mode;
  gridDim = {geometry[0], geometry[1], geometry[2]};
  blockDim = {geometry[3], geometry[4], geometry[5]};
  n_threads = blockDim.x * blockDim.y * blockDim.z;
  thunk = run;
  parameters = params;
  error_text = error;
  error_size = size;
  has_failed = 0;
  random_state = seed & ~LENIENT;
  is_lenient = seed & LENIENT;
  n_syncs = n_switches = 0;
  if (n_threads == 0 || n_threads > MAX_THREADS || dynamic_nbytes > DYNAMIC_BYTES - CANARY_BYTES) {
    snprintf(error, size, "bad launch: %u threads, %u bytes of dynamic shared memory", n_threads,
             dynamic_nbytes);
    return -1;
  }
  take(shared);
  unsigned n_blocks = gridDim.x * gridDim.y * gridDim.z;
  unsigned start = random_state ? random_below(n_blocks) : 0,
           step = random_state ? 2 * random_below(n_blocks) + 1 : 1;
  while (common_divisor(step, n_blocks) != 1) step += 2;
  unsigned b = start;
  for (unsigned i = 0; i < n_blocks; i++, b = unsigned((uint64_t(b) + step) % n_blocks)) {
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    start_block(dynamic_nbytes);
    current = take_ready();
    simt_swap(&main_stack, current->stack);
    if (!has_failed && n_live) report_deadlock();
    for (int j = 0; j < CANARY_BYTES && !has_failed; j++)
      if (dynamic_shared[dynamic_nbytes + j] != POISON) {
        snprintf(error, size, "dynamic shared memory written past its end (+%d bytes)", j);
        has_failed = 1;
      }
    for (unsigned j = 0; j < n_threads && !has_failed; j++)
      if (*stack_canary(j) != STACK_CANARY) {
        snprintf(error, size, "thread %u needs more than %d bytes of stack", j, STACK_BYTES);
        has_failed = 1;
      }
    if (has_failed) {
      int n = int(strlen(error));
      snprintf(error + n, size - n, " [block %u,%u,%u]", blockIdx.x, blockIdx.y, blockIdx.z);
      current = nullptr;
      place_canaries();  // for the next launch, of whatever library
      return -1;
    }
  }
  return 0;
}

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)p[I]...);
}
template <class... A>
inline void call(void (*kernel)(A...), void** p) {
  call(kernel, p, std::index_sequence_for<A...>{});
}

}  // namespace simt

// int simt_<kernel>(grid and block [6], dynamic shared bytes, seed (0: in order), void* params[],
// workspace (zeros at first), error text, its size)
#define SIMT_EXPORT(kernel)                                                                        \
  extern "C" int simt_##kernel(const unsigned* geometry, unsigned nbytes, uint64_t seed, void** p, \
                               simt::Workspace* shared, char* error, int size) {                   \
    return simt::launch([](void** q) { simt::call(kernel, q); }, geometry, nbytes, seed, p,        \
                        shared, error, size);                                                      \
  }

// Synchronisations and fiber switches of the last launch.
extern "C" __attribute__((weak)) void simt_stats(uint64_t* out) {
  out[0] = simt::n_syncs;
  out[1] = simt::n_switches;
}
