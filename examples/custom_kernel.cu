// count: counts[tokens[t]] += 1 for the valid rows. One warp; integer atomics, so the order of
// equal tokens does not matter.
#include "flashrt.cuh"

KERNEL(32) count(ARGS count_args launch) {
  OPEN_RUN(count);  // a: the launch, moved to the lane that the replay is about
  begin();
  int rows = min(a.T, a.cursor[CURSOR_ROWS]);
  for (int t = threadIdx.x; t < rows; t += 32) {
    atomicAdd(&a.counts[a.tokens[t]], 1u);
  }
}
