/* AMX: tiles of 16 rows of 64 bytes, and products of pairs of bfloat16.
 *
 * IS: the instructions, the shape of a thread's tiles, and Linux's leave to use them. IS NOT:
 * arithmetic; linear_bf16.c says what a product of tiles is. As asm, since compilers' intrinsics do
 * not say that tiles are read from memory. Included by: linear_bf16.c.
 */
#pragma once
#include "common.h"

#if defined __AMX_BF16__ && defined __AVX512BF16__ && defined __linux__
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1

enum { TILE_ROWS = 16, TILE_ROW_NBYTES = 64, N_TILES = 8 };

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_nbytes[16];
  uint8_t rows[16];
} tile_shapes;

#define TILE_CONFIGURE(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)) : "memory")
#define TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define TILE_LOAD(tile, at, stride)                   \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile \
                   :                                  \
                   : "r"(at), "r"((int64_t)(stride))  \
                   : "memory")
#define TILE_STORE(tile, at, stride)                      \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" \
                   :                                      \
                   : "r"(at), "r"((int64_t)(stride))      \
                   : "memory")
/* c += a times b: a [rows][pairs of k], b [pairs of k][columns]. */
#define TILE_MULTIPLY(c, a, b) \
  __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : :)

/* Whether this process may use tiles: Linux is asked once, since a thread that has tiles needs more
 * room on its stack for signals. */
static inline int may_use_tiles(void) {
  enum { ASK_LEAVE = 0x1023, TILES = 18 };
  static atomic_int answer; /* 0: not asked yet */
  int known = atomic_load_explicit(&answer, memory_order_relaxed);
  if (!known) {
    known = syscall(SYS_arch_prctl, ASK_LEAVE, TILES) ? -1 : 1;
    atomic_store_explicit(&answer, known, memory_order_relaxed);
  }
  return known > 0;
}
#else
#define HAS_TILES 0
#endif
