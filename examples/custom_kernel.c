/* count: counts[tokens[t]] += 1 for the valid rows. One thread: equal tokens must not race. */
#include "common.h"

void op_count(const count_args *a, int tid, int nt) {
  (void)nt;
  if (tid) return;
  for (int t = 0; t < rows_of(a->cursor, a->T); t++) a->counts[a->tokens[t]]++;
}
