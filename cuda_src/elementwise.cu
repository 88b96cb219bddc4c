// elementwise.cu - silu_mul, add_bias, scale_rows, last_*, keep_*, advance, hold, hold_send,
//                  place_rows, all_rows: there is no sum, and no order.
//
// silu_mul: y = silu(u[:, :I]) u[:, I:] for valid rows; u [T, 2I] float, y [T, I] activations. Grid
//           (I / 1024, T).
// add_bias: x += b for valid rows; x [T, N], b [N] float. Grid (N / 256, T).
// scale_rows: x *= factor for valid rows; x [T, N] float. Grid (N / 256, T).
// last_row: y = x[rows - 1]; x [T, H], y [1, H] activations. Grid (H / 256).
// last_values: y = x[rows - 1]; x [T, C] strided, y [1, C] float. Grid (C / 256).
// keep_rows: y = x for valid rows; x, y [T, H] activations. Grid (H / 256, T).
// keep_values: y = x for valid rows; x, y [T, C] float, strided. Grid (C / 256, T).
// last_cursor: last = a cursor of one row, the last of the launch; all 0 if there is none. One
//              warp.
// all_rows: all = a cursor of `rows` rows from position 0. One warp.
// advance:  cursor.position += cursor.rows. One warp.
// hold:     cursor.rows = 0 where cursor.token is none or one of the stops; stops [16]: how many,
//           then which. One warp, a lane per word.
// place_rows: places[t] = position + t + delta, where given plus offsets[t], and then delta +=
//           growth; places and offsets [T, 3]. One warp.
// hold_send: hold, and a word of the cursor goes to the host: in ring [slots, words], which is host
//           memory, slot sent % slots = (that word, sent); then sent [1] += 1. One warp. The store
//           needs no fence: the host looks after an event behind the replay, and so behind it.
#include "flashrt.cuh"

KERNEL(256) silu_mul(ARGS silu_mul_args launch) {
  OPEN_RUN(silu_mul);
  begin();
  int t = blockIdx.y, c = 4 * (blockIdx.x * 256 + threadIdx.x);
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.I) return;
  const float *gate = a.u + (size_t)t * 2 * a.I + c, *up = gate + a.I;
  act_t* y = (act_t*)a.y + (size_t)t * a.I + c;
  if (a.I % 4 == 0) {
    float4 g = *reinterpret_cast<const float4*>(gate), v = *reinterpret_cast<const float4*>(up);
    store_act4(y, silu(g.x) * v.x, silu(g.y) * v.y, silu(g.z) * v.z, silu(g.w) * v.w);
  } else {
    for (int i = 0; i < 4 && c + i < a.I; i++) y[i] = to_act(silu(gate[i]) * up[i]);
  }
}

KERNEL(256) add_bias(ARGS add_bias_args launch) {
  OPEN_RUN(add_bias);
  begin();
  int t = blockIdx.y, c = blockIdx.x * 256 + threadIdx.x;
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.N) return;
  float* x = a.x + (size_t)t * a.N + c;
  *x = *x + a.b[c];
}

KERNEL(256) scale_rows(ARGS scale_rows_args launch) {
  OPEN_RUN(scale_rows);
  begin();
  int t = blockIdx.y, c = blockIdx.x * 256 + threadIdx.x;
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.N) return;
  float* x = a.x + (size_t)t * a.N + c;
  *x = *x * a.factor;
}

KERNEL(256) last_row(ARGS last_row_args launch) {
  OPEN_RUN(last_row);
  begin();
  int c = blockIdx.x * 256 + threadIdx.x, row = a.cursor[CURSOR_ROWS] - 1;
  if (row < 0 || c >= a.H) return;
  ((act_t*)a.y)[c] = ((const act_t*)a.x)[(size_t)row * a.H + c];
}

KERNEL(256) last_values(ARGS last_values_args launch) {
  OPEN_RUN(last_values);
  begin();
  int c = blockIdx.x * 256 + threadIdx.x, row = a.cursor[CURSOR_ROWS] - 1;
  if (row < 0 || c >= a.C) return;
  a.y[c] = a.x[(size_t)row * a.x_stride + c];
}

KERNEL(256) keep_rows(ARGS keep_rows_args launch) {
  OPEN_RUN(keep_rows);
  begin();
  int t = blockIdx.y, c = blockIdx.x * 256 + threadIdx.x;
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.H) return;
  size_t at = (size_t)t * a.H + c;
  ((act_t*)a.y)[at] = ((const act_t*)a.x)[at];
}

KERNEL(256) keep_values(ARGS keep_values_args launch) {
  OPEN_RUN(keep_values);
  begin();
  int t = blockIdx.y, c = blockIdx.x * 256 + threadIdx.x;
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.C) return;
  a.y[(size_t)t * a.y_stride + c] = a.x[(size_t)t * a.x_stride + c];
}

KERNEL(32) last_cursor(ARGS last_cursor_args launch) {
  OPEN_RUN(last_cursor);
  begin();
  int word = threadIdx.x, rows = a.cursor[CURSOR_ROWS], value = 0;
  if (word >= CURSOR_WORDS) return;
  if (rows > 0 && word == CURSOR_POSITION) value = a.cursor[CURSOR_POSITION] + rows - 1;
  if (rows > 0 && word == CURSOR_ROWS) value = 1;
  a.last[word] = value;
}

KERNEL(32) all_rows(ARGS all_rows_args launch) {
  OPEN_RUN(all_rows);
  begin();
  int word = threadIdx.x;
  if (word < CURSOR_WORDS) a.all[word] = word == CURSOR_ROWS ? a.rows : 0;
}

KERNEL(32) advance(ARGS advance_args launch) {
  OPEN_RUN(advance);
  begin();
  if (threadIdx.x == 0) a.cursor[CURSOR_POSITION] += a.cursor[CURSOR_ROWS];
}

// All lanes of a warp call it: whether nothing may be fed behind the token that was sampled last.
DEVICE bool is_end(const int* cursor, const int* stops) {
  int word = threadIdx.x, token = cursor[CURSOR_TOKEN];
  bool is_stop = word > 0 && word < STOP_WORDS && word <= stops[0] && stops[word] == token;
  return __any_sync(FULL_WARP, is_stop) != 0 || token < 0;
}

KERNEL(32) hold(ARGS hold_args launch) {
  OPEN_RUN(hold);
  begin();
  bool is_held = is_end(a.cursor, a.stops);
  if (threadIdx.x == 0 && is_held) a.cursor[CURSOR_ROWS] = 0;
}

KERNEL(32) hold_send(ARGS hold_send_args launch) {
  OPEN_RUN(hold_send);
  begin();
  bool is_held = is_end(a.cursor, a.stops);
  if (threadIdx.x != 0) return;
  if (is_held) a.cursor[CURSOR_ROWS] = 0;
  uint32_t number = *a.sent;
  uint32_t* slot = a.ring + number % a.slots * a.words;
  *reinterpret_cast<uint2*>(slot) = make_uint2((uint32_t)a.cursor[a.word], number);
  *a.sent = number + 1;
}

KERNEL(32) place_rows(ARGS place_rows_args launch) {
  OPEN_RUN(place_rows);
  begin();
  int rows = a.cursor[CURSOR_ROWS], first = a.cursor[CURSOR_POSITION] + a.delta[0];
  if (rows < 1) return;
  for (int i = threadIdx.x; i < 3 * rows; i += 32)
    a.places[i] = first + i / 3 + (a.given ? a.offsets[i] : 0);
  __syncwarp();  // all have read delta
  if (a.given && threadIdx.x == 0) a.delta[0] += a.growth[0];
}
