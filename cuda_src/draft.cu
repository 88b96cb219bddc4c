// draft.cu - bookkeeping of drafting: cursors, a few words each.
//
// Contract: draft_begin:    draft = cursor, of one row.
//           draft_note:     drafted[draft.position - cursor.position] = journal[draft.position] = draft.token, which becomes
//                           0 if it is no token: a guess may be wrong, but it is a token.
//           verify_cursors: samples[t] = a cursor of one row at position + t + 1; all 0 at and beyond cursor.rows.
//           accept:         verdict = [n, tokens sampled after each of the n accepted rows]: row 0, and the longest run of
//                           drafted tokens that equal what was sampled before them.
//           take_token:     cursor.token = samples[rows - 1].token.
// Shapes:   cursor, draft [16], samples [T, 16], drafted [N] or [T], journal [1, S, 1], verdict [T + 1], all int.
// Order:    no sums. Launch: one warp; T is small, so accept walks in one thread.
#include "flashrt.cuh"

KERNEL(32) draft_begin(ARGS draft_begin_args a) {
  begin();
  int word = threadIdx.x;
  if (word >= CURSOR_WORDS) return;
  a.draft[word] = word == ROWS ? 1 : word == POSITION || word == TOKEN ? a.cursor[word] : 0;
}

KERNEL(32) draft_note(ARGS draft_note_args a) {
  begin();
  if (threadIdx.x > 0) return;
  int position = a.draft[POSITION], index = position - a.cursor[POSITION], token = max(a.draft[TOKEN], 0);
  a.draft[TOKEN] = token;
  if (index < a.N) a.drafted[index] = token;
  if (position < a.S) a.journal[position] = token;
}

KERNEL(32) verify_cursors(ARGS verify_cursors_args a) {
  begin();
  int rows = a.cursor[ROWS], position = a.cursor[POSITION];
  for (int i = threadIdx.x; i < a.T * CURSOR_WORDS; i += 32) {
    int t = i / CURSOR_WORDS, word = i % CURSOR_WORDS, value = 0;
    if (t < rows && word == POSITION) value = position + t + 1;
    if (t < rows && word == ROWS) value = 1;
    a.samples[i] = value;
  }
}

KERNEL(32) accept(ARGS accept_args a) {
  begin();
  if (threadIdx.x > 0) return;
  int rows = a.cursor[ROWS], n = 0;
  for (bool is_agreed = true; n < rows && is_agreed; n++) {
    int sampled = a.samples[n * CURSOR_WORDS + TOKEN];
    a.verdict[1 + n] = sampled;
    is_agreed = n + 1 < rows && a.drafted[n + 1] == sampled;
  }
  a.verdict[0] = n;
}

KERNEL(32) take_token(ARGS take_token_args a) {
  begin();
  int rows = a.cursor[ROWS];
  if (threadIdx.x == 0 && rows > 0) a.cursor[TOKEN] = a.samples[(rows - 1) * CURSOR_WORDS + TOKEN];
}
