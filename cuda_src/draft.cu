// draft.cu - bookkeeping of drafting: cursors, a few words each.
//
// Contract: draft_begin:    draft = cursor, of one row.
//           draft_note:     drafted[draft.position - cursor.position] = journal[draft.position] =
//                           draft.token, which becomes 0 if it is no token: a guess may be wrong,
//                           but it is a token.
//           verify_cursors: samples[t] = a cursor of one row at position + t + 1; all 0 at and
//                           beyond cursor.rows.
//           accept:         verdict = [n, tokens sampled after each of the n accepted rows]: row 0,
//                           and the longest run of drafted tokens that equal what was sampled
//                           before them.
//           take_token:     cursor.token = samples[rows - 1].token.
// Shapes:   cursor, draft [16], samples [T, 16], drafted [N] or [T], journal [1, S, 1], verdict [T
//           + 1], all int.
// Order:    no sums. Launch: one warp; T is small, so accept walks in one thread.
#include "flashrt.cuh"

KERNEL(32) draft_begin(ARGS draft_begin_args launch) {
  OPEN_RUN(draft_begin);
  begin();
  int word = threadIdx.x;
  if (word >= CURSOR_WORDS) return;
  int value = word == CURSOR_ROWS ? 1 : 0;
  if (word == CURSOR_POSITION || word == CURSOR_TOKEN) value = a.cursor[word];
  a.draft[word] = value;
}

KERNEL(32) draft_note(ARGS draft_note_args launch) {
  OPEN_RUN(draft_note);
  begin();
  if (threadIdx.x > 0) return;
  int position = a.draft[CURSOR_POSITION], index = position - a.cursor[CURSOR_POSITION],
      token = max(a.draft[CURSOR_TOKEN], 0);
  a.draft[CURSOR_TOKEN] = token;
  if (index < a.N) a.drafted[index] = token;
  if (position < a.S) a.journal[position] = token;
}

KERNEL(32) verify_cursors(ARGS verify_cursors_args launch) {
  OPEN_RUN(verify_cursors);
  begin();
  int rows = a.cursor[CURSOR_ROWS], position = a.cursor[CURSOR_POSITION];
  for (int i = threadIdx.x; i < a.T * CURSOR_WORDS; i += 32) {
    int t = i / CURSOR_WORDS, word = i % CURSOR_WORDS, value = 0;
    if (t < rows && word == CURSOR_POSITION) value = position + t + 1;
    if (t < rows && word == CURSOR_ROWS) value = 1;
    a.samples[i] = value;
  }
}

KERNEL(32) accept(ARGS accept_args launch) {
  OPEN_RUN(accept);
  begin();
  if (threadIdx.x > 0) return;
  int rows = a.cursor[CURSOR_ROWS], n = 0;
  for (bool is_agreed = true; n < rows && is_agreed; n++) {
    int sampled = a.samples[n * CURSOR_WORDS + CURSOR_TOKEN];
    a.verdict[VERDICT_TOKENS + n] = sampled;
    is_agreed = n + 1 < rows && a.drafted[n + 1] == sampled;
  }
  a.verdict[VERDICT_ACCEPTED] = n;
}

KERNEL(32) take_token(ARGS take_token_args launch) {
  OPEN_RUN(take_token);
  begin();
  int rows = a.cursor[CURSOR_ROWS];
  if (threadIdx.x == 0 && rows > 0)
    a.cursor[CURSOR_TOKEN] = a.samples[(rows - 1) * CURSOR_WORDS + CURSOR_TOKEN];
}
