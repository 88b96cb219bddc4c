// ssm.cu - the recurrence of Mamba-2, row after row, with the state in registers.
//
// Contract: per head, for each valid row: t = softplus(dt + dt_bias) within [dt_min, dt_max]; S =
//           exp(-exp(a_log) t) S + B (t x)^T; o = S^T C + d x. y holds [x | B | C]; head h uses
//           group h / (Hv / groups) of B and C. The state is read once and written once per launch.
// Shapes:   y [T, C], dt [T, Hv] (strided), a_log, dt_bias and d [Hv], state [Hv, STATE_DIM,
//           HEAD_DIM], o [T, Hv * HEAD_DIM], all float.
// Order:    S = fma(B, t x, S decay); `dot` of delta.cuh over the state, then fma(d, x, .). The same
//           for one row and for many.
// Launch:   grid (HEAD_DIM / 16, Hv), 4 warps of 4 columns x 8 lanes. Rows come through shared
//           memory, TILE_ROWS at a time by cp.async, the next ones while these are worked on; a
//           thread per row of a tile computes its decay, from a dt that it read a tile earlier.
//           What takes time is a row's sum over lanes, and nothing else waits for that: rows are
//           unrolled by two, where registers have room, so that one covers the other.
#include "flashrt.cuh"
#include "delta.cuh"
#include "row_tiles.cuh"

constexpr int COLUMNS = 16, TILE_ROWS = 8, THREADS = 128;
constexpr int STEPS = ceil_div(STATE_DIM, 32), PADDED = 32 * STEPS;    // rows per lane: 4 * STEPS
constexpr int UNIT = STATE_DIM % 4 == 0 && HEAD_DIM % 4 == 0 ? 4 : 1;  // floats per cp.async
constexpr int AT_ONCE = STEPS > 4 ? 1 : 2;                             // rows that are unrolled

struct Tile {
  float b[TILE_ROWS][PADDED], c[TILE_ROWS][PADDED], x[TILE_ROWS][COLUMNS];
  float decay[TILE_ROWS], time[TILE_ROWS];
};

DEVICE void load_tile(Tile& tile, const ssm_args& a, int head, int column, int first, int rows) {
  int n = min(TILE_ROWS, rows - first), group = head / (a.Hv / a.groups),
      states = a.groups * STATE_DIM;
  const float *x = a.y + (size_t)first * a.C, *b = x + a.Hv * HEAD_DIM + group * STATE_DIM;
  load_rows<UNIT, THREADS>(tile.x, x + head * HEAD_DIM + column, a.C, n, HEAD_DIM - column);
  load_rows<UNIT, THREADS>(tile.b, b, a.C, n, STATE_DIM);
  load_rows<UNIT, THREADS>(tile.c, b + states, a.C, n, STATE_DIM);
}

// dt of the row of a tile that this thread is to compute the decay of; 0 if there is none
DEVICE float read_dt(const ssm_args& a, int head, int first, int rows) {
  int t = first + threadIdx.x;
  return threadIdx.x < TILE_ROWS && t < rows ? a.dt[(size_t)t * a.dt_stride + head] : 0.0f;
}

DEVICE void put_decay(Tile& tile, const ssm_args& a, int head, float dt) {
  if (threadIdx.x >= TILE_ROWS) return;
  float time = softplus(dt + a.dt_bias[head]);
  time = time < a.dt_min ? a.dt_min : time > a.dt_max ? a.dt_max : time;  // NaN stays
  tile.time[threadIdx.x] = time;
  tile.decay[threadIdx.x] = exp_f32(-(exp_f32(a.a_log[head]) * time));
}

KERNEL(128) ssm(ARGS ssm_args launch) {
  OPEN_RUN(ssm);
  begin();
  __shared__ __align__(16) Tile tiles[2];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, p = lane >> 2, c = 4 * warp + (lane & 3);
  int rows = a.cursor[CURSOR_ROWS], head = blockIdx.y, first_column = blockIdx.x * COLUMNS,
      column = first_column + c;
  if (rows <= 0) return;
  load_tile(tiles[0], a, head, first_column, 0, rows);
  copy_async_commit();
  put_decay(tiles[0], a, head, read_dt(a, head, 0, rows));
  float dt = read_dt(a, head, TILE_ROWS, rows), d = a.d[head];
  float s[STEPS][4];
  float* state = a.state + (size_t)head * STATE_DIM * HEAD_DIM + column;
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = 32 * j + 4 * p + i;
      s[j][i] = r < STATE_DIM && column < HEAD_DIM ? state[r * HEAD_DIM] : 0.0f;
    }
  for (int first = 0; first < rows; first += TILE_ROWS) {
    const Tile& tile = tiles[first / TILE_ROWS & 1];
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the other one
    int next = first + TILE_ROWS;
    if (next < rows) {
      load_tile(tiles[next / TILE_ROWS & 1], a, head, first_column, next, rows);
      put_decay(tiles[next / TILE_ROWS & 1], a, head, dt);
      dt = read_dt(a, head, next + TILE_ROWS, rows);
    }
    copy_async_commit();
    int n = min(TILE_ROWS, rows - first);
#pragma unroll AT_ONCE
    for (int t = 0; t < n; t++) {
      float x = tile.x[t][c], decay = tile.decay[t], scaled = tile.time[t] * x;
      float4 out[STEPS];
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float4 b = *reinterpret_cast<const float4*>(&tile.b[t][32 * j + 4 * p]);
        out[j] = *reinterpret_cast<const float4*>(&tile.c[t][32 * j + 4 * p]);
        s[j][0] = fmaf(b.x, scaled, s[j][0] * decay);
        s[j][1] = fmaf(b.y, scaled, s[j][1] * decay);
        s[j][2] = fmaf(b.z, scaled, s[j][2] * decay);
        s[j][3] = fmaf(b.w, scaled, s[j][3] * decay);
      }
      float o = fmaf(d, x, dot(out, s));
      if (p == 0 && column < HEAD_DIM)
        a.o[((size_t)(first + t) * a.Hv + head) * HEAD_DIM + column] = o;
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = 32 * j + 4 * p + i;
      if (r < STATE_DIM && column < HEAD_DIM) state[r * HEAD_DIM] = s[j][i];
    }
}
