// norm.cu - rmsnorm, add_rmsnorm, adaptive_rmsnorm and draft_input over the hidden size.
//
// Contract: y = x rsqrt(mean(x^2) + eps) w per row; add_rmsnorm first does x += r. Rows at or
//           beyond cursor.rows are left alone. w holds 1 + weight. adaptive_rmsnorm: x += gate r
//           where `added`; (1 + scale) in place of w, and + shift. draft_input: y[t] = [norm of
//           table[tokens[t]] | norm of hidden[t - 1]], in place of hidden[-1] the one row `last`;
//           draft_input_seen: seen[t] for the first where tokens[t] is not in [0, V).
// Shapes:   x, r [T, H] float, w [H] float, y [T, H] activations. draft_input: table [V, H] as
//           weights.cuh stores matrices, hidden [T, H] and last [1, H] activations, seen [T, H] float,
//           y [T, 2 H].
// Order:    thread i sums vectors i, i + THREADS, ... in ascending order, then block_sum. Fixed by
//           H alone.
// Launch:   block per row (draft_input: two, one per half), the row in registers: WIDTH * VECTORS *
//           THREADS >= H.
#include "flashrt.cuh"
#include "weights.cuh"

struct Row {
  float v[VECTORS][WIDTH];
};

DEVICE void load(float (&v)[WIDTH], const float* p) {
  if constexpr (WIDTH == 4) {
    float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x;
    v[WIDTH - 3] = q.y;
    v[WIDTH - 2] = q.z;
    v[WIDTH - 1] = q.w;
  } else {
    v[0] = *p;
  }
}

DEVICE void load(float (&v)[WIDTH], const act_t* p) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) v[i] = from_act(p[i]);
}

// Elements of table[token] from k on, a multiple of WIDTH.
DEVICE void load_embedding(float (&v)[WIDTH], const void* table, int token, int k, int H) {
  float4 q = load_quad(table, token, k & ~3, H);
  float quad[4] = {q.x, q.y, q.z, q.w};
  if constexpr (WIDTH == 4) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v[i] = quad[i];
  } else {
    int i = k & 3;
    v[0] = i == 0 ? quad[0] : i == 1 ? quad[1] : i == 2 ? quad[2] : quad[3];
  }
}

// Index of the first element of vector j of this thread; at or beyond H: none.
DEVICE int column(int j) { return WIDTH * (j * THREADS + (int)threadIdx.x); }

DEVICE void normalize(const Row& row, const float* w, act_t* y, int H, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < VECTORS; j++)
    if (column(j) < H)
#pragma unroll
      for (int i = 0; i < WIDTH; i++) sum = fmaf(row.v[j][i], row.v[j][i], sum);
  float scale = rsqrt_f32(block_sum<THREADS / 32>(sum) / (float)H + eps);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int c = column(j);
    if (c >= H) continue;
    float g[WIDTH];
    load(g, w + c);
    if constexpr (WIDTH == 4) {
      store_act4(y + c, row.v[j][0] * scale * g[0], row.v[j][WIDTH - 3] * scale * g[WIDTH - 3],
                 row.v[j][WIDTH - 2] * scale * g[WIDTH - 2],
                 row.v[j][WIDTH - 1] * scale * g[WIDTH - 1]);
    } else {
      y[c] = to_act(row.v[j][0] * scale * g[0]);
    }
  }
}

KERNEL(THREADS) rmsnorm(ARGS rmsnorm_args launch) {
  OPEN_RUN(rmsnorm);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  const float* x = a.x + (size_t)t * a.H;
  Row row;
#pragma unroll
  for (int j = 0; j < VECTORS; j++)
    if (column(j) < a.H) load(row.v[j], x + column(j));
  normalize(row, a.w, (act_t*)a.y + (size_t)t * a.H, a.H, a.eps);
}

KERNEL(THREADS) add_rmsnorm(ARGS add_rmsnorm_args launch) {
  OPEN_RUN(add_rmsnorm);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  float* x = a.x + (size_t)t * a.H;
  const float* r = a.r + (size_t)t * a.H;
  Row row;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int c = column(j);
    if (c >= a.H) continue;
    float more[WIDTH];
    load(row.v[j], x + c);
    load(more, r + c);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) row.v[j][i] = row.v[j][i] + more[i];
    if constexpr (WIDTH == 4) {
      float (&v)[WIDTH] = row.v[j];
      *reinterpret_cast<float4*>(x + c) =
          make_float4(v[0], v[WIDTH - 3], v[WIDTH - 2], v[WIDTH - 1]);
    } else {
      x[c] = row.v[j][0];
    }
  }
  normalize(row, a.w, (act_t*)a.y + (size_t)t * a.H, a.H, a.eps);
}

KERNEL(THREADS) adaptive_rmsnorm(ARGS adaptive_rmsnorm_args launch) {
  OPEN_RUN(adaptive_rmsnorm);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  float* x = a.x + (size_t)t * a.H;
  const float* r = a.r + (size_t)t * a.H;
  act_t* y = (act_t*)a.y + (size_t)t * a.H;
  Row row;
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int c = column(j);
    if (c >= a.H) continue;
    load(row.v[j], x + c);
    if (a.added) {
      float more[WIDTH], gate[WIDTH];
      load(more, r + c);
      load(gate, a.gate + c);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        row.v[j][i] = fmaf(gate[i], more[i], row.v[j][i]);
        x[c + i] = row.v[j][i];
      }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum = fmaf(row.v[j][i], row.v[j][i], sum);
  }
  float factor = rsqrt_f32(block_sum<THREADS / 32>(sum) / (float)a.H + a.eps);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int c = column(j);
    if (c >= a.H) continue;
    float scale[WIDTH], shift[WIDTH];
    load(scale, a.scale + c);
    load(shift, a.shift + c);
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      y[c + i] = to_act(fmaf(row.v[j][i] * factor, 1.0f + scale[i], shift[i]));
  }
}

// One half of a row; embed(v, c) loads columns of its token's.
template <typename Args, typename Embed>
DEVICE void draft_half(const Args& a, int t, bool is_hidden, Embed embed) {
  const act_t* hidden = t ? (const act_t*)a.hidden + (size_t)(t - 1) * a.H : (const act_t*)a.last;
  Row row;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int c = column(j);
    if (c >= a.H) continue;
    if (is_hidden) load(row.v[j], hidden + c);
    else embed(row.v[j], c);
  }
  act_t* y = (act_t*)a.y + ((size_t)2 * t + is_hidden) * a.H;
  normalize(row, is_hidden ? a.w_hidden : a.w_token, y, a.H, a.eps);
}

KERNEL(THREADS) draft_input(ARGS draft_input_args launch) {
  OPEN_RUN(draft_input);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int token = a.tokens[t];
  draft_half(a, t, blockIdx.y,
             [&](float (&v)[WIDTH], int c) { load_embedding(v, a.table, token, c, a.H); });
}

KERNEL(THREADS) draft_input_seen(ARGS draft_input_seen_args launch) {
  OPEN_RUN(draft_input_seen);
  begin();
  int t = blockIdx.x;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  int token = a.tokens[t];
  const float* seen = (const float*)a.seen + (size_t)t * a.H;
  draft_half(a, t, blockIdx.y, [&](float (&v)[WIDTH], int c) {
    if (0 <= token && token < a.V) load_embedding(v, a.table, token, c, a.H);
    else load(v, seen + c);
  });
}
