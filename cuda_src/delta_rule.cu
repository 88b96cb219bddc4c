// delta_rule.cu - the gated delta rule, row after row, with the state in registers.
//
// Contract: per value head, for each valid row: S *= decay; S += k (beta (v - S^T k))^T; o = S^T q.
//           y holds q, k, v; value head h uses key head h / (Hv / key_heads). delta_rule reads the
//           state once and writes it once per launch; delta_verify gives the same o and leaves the
//           state as it is.
// Shapes:   y [T, C], decay and beta [T, Hv], state [Hv, KEY_DIM, VALUE_DIM], o [T, Hv *
//           VALUE_DIM], all float.
// Order:    delta.cuh; a column has 8 lanes. The same for one row and for many.
// Launch:   grid (VALUE_DIM / 16, Hv), 4 warps of 4 columns x 8 lanes. Rows come through shared
//           memory, TILE_ROWS at a time by cp.async, the next ones while these are worked on. The
//           chain from row to row is what takes time: few lanes per column keep it short, few
//           columns per block keep all multiprocessors busy.
#include "flashrt.cuh"
#include "delta.cuh"
#include "row_tiles.cuh"

constexpr int COLUMNS = 16, TILE_ROWS = 8, THREADS = 128;
constexpr int STEPS = ceil_div(KEY_DIM, 32), PADDED = 32 * STEPS;     // rows per lane: 4 * STEPS
constexpr int UNIT = KEY_DIM % 4 == 0 && VALUE_DIM % 4 == 0 ? 4 : 1;  // floats per cp.async

struct Tile {
  float k[TILE_ROWS][PADDED], q[TILE_ROWS][PADDED], v[TILE_ROWS][COLUMNS];
  float decay[TILE_ROWS], beta[TILE_ROWS];
};

template <class Args>
DEVICE void load_tile(Tile& tile, const Args& a, int head, int column, int first, int rows) {
  int n = min(TILE_ROWS, rows - first), key_head = head / (a.Hv / a.key_heads),
      keys = a.key_heads * KEY_DIM;
  const float* y = a.y + (size_t)first * a.C;
  load_rows<UNIT, THREADS>(tile.q, y + key_head * KEY_DIM, a.C, n, KEY_DIM);
  load_rows<UNIT, THREADS>(tile.k, y + keys + key_head * KEY_DIM, a.C, n, KEY_DIM);
  load_rows<UNIT, THREADS>(tile.v, y + 2 * keys + head * VALUE_DIM + column, a.C, n,
                           VALUE_DIM - column);
  int t = threadIdx.x;
  if (t < n) {
    copy_async4(&tile.decay[t], a.decay + (size_t)(first + t) * a.Hv + head);
    copy_async4(&tile.beta[t], a.beta + (size_t)(first + t) * a.Hv + head);
  }
}

// All valid rows of the block's columns; KEEPS: and the state after them. Args: of either kernel,
// fields by the same names.
template <bool KEEPS, class Args>
DEVICE void run_rows(const Args& a) {
  __shared__ __align__(16) Tile tiles[2];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, p = lane >> 2, c = 4 * warp + (lane & 3);
  int rows = a.cursor[CURSOR_ROWS], head = blockIdx.y, first_column = blockIdx.x * COLUMNS,
      column = first_column + c;
  if (rows <= 0) return;
  load_tile(tiles[0], a, head, first_column, 0, rows);
  copy_async_commit();
  float s[STEPS][4];
  auto state = a.state + (size_t)head * KEY_DIM * VALUE_DIM + column;
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = 32 * j + 4 * p + i;
      s[j][i] = r < KEY_DIM && column < VALUE_DIM ? state[r * VALUE_DIM] : 0.0f;
    }
  for (int first = 0; first < rows; first += TILE_ROWS) {
    const Tile& tile = tiles[first / TILE_ROWS & 1];
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the other one
    int next = first + TILE_ROWS;
    if (next < rows) load_tile(tiles[next / TILE_ROWS & 1], a, head, first_column, next, rows);
    copy_async_commit();
    int n = min(TILE_ROWS, rows - first);
    for (int t = 0; t < n; t++) {
      float4 k[STEPS], q[STEPS];
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        k[j] = *reinterpret_cast<const float4*>(&tile.k[t][32 * j + 4 * p]);
        q[j] = *reinterpret_cast<const float4*>(&tile.q[t][32 * j + 4 * p]);
      }
      float o = step(s, k, q, tile.v[t][c], tile.decay[t], tile.beta[t]);
      if (p == 0 && column < VALUE_DIM)
        a.o[((size_t)(first + t) * a.Hv + head) * VALUE_DIM + column] = o;
    }
  }
  copy_async_wait<0>();
  if constexpr (KEEPS) {
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = 32 * j + 4 * p + i;
        if (r < KEY_DIM && column < VALUE_DIM) state[r * VALUE_DIM] = s[j][i];
      }
  }
}

KERNEL(128) delta_rule(ARGS delta_rule_args launch) {
  OPEN_RUN(delta_rule);
  begin();
  run_rows<true>(a);
}

KERNEL(128) delta_verify(ARGS delta_verify_args launch) {
  OPEN_RUN(delta_verify);
  begin();
  run_rows<false>(a);
}
