// tensor.h - host bodies of the tensor-core and asynchronous-copy primitives of flashrt.cuh. Part
// of simt.h.
#pragma once

namespace simt {

struct MmaOperands {
  const uint32_t *a, *b;
  float* c;
};

// mma.sync.m16n8k16: c[16 x 8] += a[16 x 16] b[16 x 8] for a whole warp. Each element: the 16
// products, an fp32 chain over ascending k, then their sum to c: nearly as exact as tensor cores,
// which round such a step to float once. Lane 4g + t holds a: (g, 2t..) (g+8, 2t..) (g, 2t+8..)
// (g+8, 2t+8..), b: k = 2t.., 2t+8.. of column g,
// c: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1).
inline void run_mma(Fiber* lanes, unsigned mask) {
  if (mask != ~0u) fail("mma.sync needs the whole warp");
  typedef float Row __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  alignas(64) uint32_t a[16][8], b[8][8];  // [row][pair of k], [pair of k][column]
  alignas(64) float c[16][8];
  for (int l = 0; l < 32; l++) {
    MmaOperands* m = (MmaOperands*)lanes[l].operands;
    int g = l >> 2, t = l & 3;
    for (int i = 0; i < 4; i++) {
      a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = m->a[i];
      c[g + 8 * (i >> 1)][2 * t + (i & 1)] = m->c[i];
    }
    for (int i = 0; i < 2; i++) b[t + 4 * i][g] = m->b[i];
  }
  for (int r = 0; r < 16; r += 4) {
    Row sum[4] = {};
    for (int p = 0; p < 8; p++) {
      Row even = (Row)(*(Bits*)b[p] << 16), odd = (Row)(*(Bits*)b[p] & 0xffff0000u);
      for (int i = 0; i < 4; i++) {
        uint32_t pair = a[r + i][p];
        sum[i] = __uint_as_float(pair & 0xffff0000u) * odd +
                 (__uint_as_float(pair << 16) * even + sum[i]);
      }
    }
    for (int i = 0; i < 4; i++) *(Row*)c[r + i] += sum[i];
  }
  for (int l = 0; l < 32; l++) {
    MmaOperands* m = (MmaOperands*)lanes[l].operands;
    for (int i = 0; i < 4; i++) m->c[i] = c[(l >> 2) + 8 * (i >> 1)][2 * (l & 3) + (i & 1)];
  }
}

inline void mma(float* c, const uint32_t* a, const uint32_t* b, int line, const char* file) {
  MmaOperands m{a, b, c};
  collective(~0u, run_mma, &m, line, file);
}

// The destination is poison until the group is waited for.
inline void issue_copy(void* dst, const void* src, int nbytes, int valid, int line,
                       const char* file) {
  AsyncCopies& p = async_copies[current->linear];
  if (p.n == MAX_COPIES)
    fail("%s:%d: more than %d cp.async in flight in thread %u", file, line, MAX_COPIES,
         current->linear);
  if ((uintptr_t)dst % nbytes || (valid && (uintptr_t)src % nbytes))
    fail("%s:%d: cp.async with a misaligned address in thread %u", file, line, current->linear);
  note_write(dst, nbytes, line, file);
  memset(dst, POISON, nbytes);
  p.copy[p.n++] = {dst, src, nbytes, valid, line, file};
}

inline void commit_copies() {
  AsyncCopies& p = async_copies[current->linear];
  if (p.n_groups == MAX_COPIES)
    fail("thread %u: more than %d cp.async groups", current->linear, MAX_COPIES);
  p.group_end[p.n_groups++] = p.n;
}

// Finish all but the newest `pending` groups.
inline void wait_copies(int pending) {
  AsyncCopies& p = async_copies[current->linear];
  int n_done = p.n_groups > pending ? p.n_groups - pending : 0,
      n = n_done ? p.group_end[n_done - 1] : 0;
  for (int i = 0; i < n; i++) {
    AsyncCopies::Copy& c = p.copy[i];
    note_write(c.dst, c.nbytes, c.line, c.file);
    memset(c.dst, 0, c.nbytes);
    if (c.valid) memcpy(c.dst, c.src, c.valid);
  }
  memmove(p.copy, p.copy + n, (p.n - n) * sizeof(AsyncCopies::Copy));
  for (int i = n_done; i < p.n_groups; i++) p.group_end[i - n_done] = p.group_end[i] - n;
  p.n -= n;
  p.n_groups -= n_done;
}

}  // namespace simt
