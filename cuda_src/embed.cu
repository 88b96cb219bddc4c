// embed.cu - token embeddings and the journal.
//
// Contract: x[t] = table[tokens[t]] for t < cursor.rows, the values as core/groups.py defines them;
//           journal[position + t] = tokens[t]. embed_seen: x[t] = seen[t] where tokens[t] is not in
//           [0, V).
// Shapes:   tokens [T], table [V, H] as weights.cuh stores matrices, journal [1, S, 1], x and seen
//           [T, H].
// Order:    no sums. Launch: block per row, 256 threads.
#include "flashrt.cuh"
#include "weights.cuh"

// x[t] = table[token], by all threads of the block.
template <typename Args>
DEVICE void gather(const Args& a, int t, int token) {
  for (int k = 4 * threadIdx.x; k < a.H; k += 4 * 256) {
    float4 q = load_quad(a.table, token, k, a.H);
    float v[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (k + i < a.H) a.x[(size_t)t * a.H + k + i] = v[i];
  }
}

KERNEL(256) embed(ARGS embed_args launch) {
  OPEN_RUN(embed);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int token = a.tokens[t];
  if (threadIdx.x == 0) a.journal[a.cursor[CURSOR_POSITION] + t] = token;
  gather(a, t, token);
}

KERNEL(256) embed_seen(ARGS embed_seen_args launch) {
  OPEN_RUN(embed_seen);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int token = a.tokens[t];
  if (threadIdx.x == 0) a.journal[a.cursor[CURSOR_POSITION] + t] = token;
  if (0 <= token && token < a.V) {
    gather(a, t, token);
    return;
  }
  for (int k = threadIdx.x; k < a.H; k += 256)
    a.x[(size_t)t * a.H + k] = a.seen[(size_t)t * a.H + k];
}
