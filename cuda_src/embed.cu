// embed.cu - token embeddings and the journal.
//
// Contract: x[t] = table[tokens[t]] for t < cursor.rows, widened to float; journal[position + t] =
//           tokens[t].
// Shapes:   tokens [T], table [V, H] as linear.cuh stores matrices, journal [1, S, 1], x [T, H].
// Order:    no sums. Launch: block per row, 256 threads.
#include "flashrt.cuh"
#include "linear.cuh"

KERNEL(256) embed(ARGS embed_args a) {
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int token = a.tokens[t];
  if (threadIdx.x == 0) a.journal[a.cursor[CURSOR_POSITION] + t] = token;
  const uint2* quads = reinterpret_cast<const uint2*>(a.table);
  for (int k = 4 * threadIdx.x; k < a.H; k += 4 * 256) {
    uint2 q = quads[matrix_quad(token, k, a.H)];
    float v[4] = {bf16_low(q.x), bf16_high(q.x), bf16_low(q.y), bf16_high(q.y)};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (k + i < a.H) a.x[(size_t)t * a.H + k + i] = v[i];
  }
}
