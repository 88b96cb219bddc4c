/* draft_*, verify_cursors, accept, take_token: what drafting needs beside the kernels of a forward
 * pass.
 *
 * IS: the head's input, and bookkeeping on cursors, a few words each. IS NOT: the choice of how
 * many tokens to draft.
 */
#include "fmath.h"
#include "stored.h"

/* y = x * scale * w, as rmsnorm; y may be x */
INLINE void scale_row(float *y, const float *x, const float *w, float scale, int n) {
  int i = 0;
  for (; i + VL <= n; i += VL) v_store(y + i, v_load(x + i) * scale * v_load(w + i));
  for (; i < n; i++) y[i] = x[i] * scale * w[i];
}

/* The embedding is gathered into its place first, then normalised there. seen: NULL, or [T, H]. */
#define DRAFT_INPUT(a, seen, tid, nt)                                                     \
  do {                                                                                    \
    span units = share(2 * (int64_t)rows_of(a->cursor, a->T), tid, nt);                   \
    int H = a->H;                                                                         \
    const stored_matrix table = STORED(a, table, H);                                      \
    for (int64_t unit = units.begin; unit < units.end; unit++) {                          \
      int64_t t = unit / 2;                                                               \
      float *y = (float *)a->y + unit * H;                                                \
      const float *h = y;                                                                 \
      if (unit % 2) {                                                                     \
        h = (const float *)(t ? a->hidden : a->last) + max_of(t - 1, 0) * H;              \
      } else if ((seen) && !(0 <= a->tokens[t] && a->tokens[t] < a->V)) {                 \
        h = (const float *)(seen) + t * H;                                                \
      } else {                                                                            \
        gather_row(&table, a->V, a->tokens[t], (span){0, H}, y);                          \
      }                                                                                   \
      scale_row(y, h, unit % 2 ? a->w_hidden : a->w_token, inverse_rms(h, H, a->eps), H); \
    }                                                                                     \
  } while (0)

void op_draft_input(const draft_input_args *a, int tid, int nt) { DRAFT_INPUT(a, NULL, tid, nt); }

void op_draft_input_seen(const draft_input_seen_args *a, int tid, int nt) {
  DRAFT_INPUT(a, a->seen, tid, nt);
}

void op_draft_begin(const draft_begin_args *a, int tid, int nt) {
  if (tid > 0) return;
  memset(a->draft, 0, CURSOR_WORDS * sizeof(int32_t));
  a->draft[CURSOR_POSITION] = a->cursor[CURSOR_POSITION];
  a->draft[CURSOR_ROWS] = 1;
  a->draft[CURSOR_TOKEN] = a->cursor[CURSOR_TOKEN];
}

void op_draft_note(const draft_note_args *a, int tid, int nt) {
  if (tid > 0) return;
  int32_t position = a->draft[CURSOR_POSITION], index = position - a->cursor[CURSOR_POSITION];
  /* a guess may be wrong, but not no token */
  if (a->draft[CURSOR_TOKEN] < 0) a->draft[CURSOR_TOKEN] = 0;
  if (index < a->N) a->drafted[index] = a->draft[CURSOR_TOKEN];
  if (position < a->S) a->journal[position] = a->draft[CURSOR_TOKEN];
}

void op_verify_cursors(const verify_cursors_args *a, int tid, int nt) {
  if (tid > 0) return;
  memset(a->samples, 0, (size_t)a->T * CURSOR_WORDS * sizeof(int32_t));
  for (int t = 0; t < rows_of(a->cursor, a->T); t++) {
    int32_t *sample = a->samples + t * CURSOR_WORDS;
    sample[CURSOR_POSITION] = a->cursor[CURSOR_POSITION] + t + 1;
    sample[CURSOR_ROWS] = 1;
  }
}

void op_accept(const accept_args *a, int tid, int nt) {
  if (tid > 0) return;
  int rows = rows_of(a->cursor, a->T), n = 0;
  for (int is_agreed = 1; n < rows && is_agreed; n++) {
    int32_t sampled = a->samples[n * CURSOR_WORDS + CURSOR_TOKEN];
    a->verdict[VERDICT_TOKENS + n] = sampled;
    is_agreed = n + 1 < rows && a->drafted[n + 1] == sampled;
  }
  a->verdict[VERDICT_ACCEPTED] = n;
}

void op_take_token(const take_token_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (tid == 0 && rows > 0)
    a->cursor[CURSOR_TOKEN] = a->samples[(rows - 1) * CURSOR_WORDS + CURSOR_TOKEN];
}
