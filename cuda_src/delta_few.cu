// delta_few.cu - the delta rule and all around it for up to 8 rows of a run: a launch for four.
//
// Contract: as conv_window, delta_gates, delta_rule and gated_rmsnorm, one after the other, bit for
//           bit: window and state are those after the valid rows, y is activations.
// Shapes:   u [T, C], z [T, Hv * VALUE_DIM], b and a [T, Hv], all strided; w [TAPS, C], window
//           [TAPS - 1, C], a_log and dt_bias [Hv], state [Hv, KEY_DIM, VALUE_DIM], norm
//           [VALUE_DIM], all float; y [T, Hv * VALUE_DIM] activations; counters: a word per run and
//           key head, 0 before and after.
// Order:    delta.cuh.
// Launch:   a block per value head, 8 lanes for two columns of its state, in registers. The value
//           heads of a key head convolve its channels each for themselves; the last one that has
//           read their window moves it on. What is read from memory is read before the first
//           barrier, all at once: latency is what such a launch takes, not bytes.
#include "flashrt.cuh"
#include "delta.cuh"

constexpr int W = TAPS - 1, MOST_ROWS = 8, THREADS = 4 * VALUE_DIM, N_WARPS = THREADS / 32;
constexpr int STEPS = ceil_div(KEY_DIM, 32), PADDED = 32 * STEPS;  // rows per lane: 4 * STEPS
constexpr int CHANNELS = 2 * KEY_DIM + VALUE_DIM;                  // q, k and v of a head

struct Rows {
  float q[MOST_ROWS][PADDED], k[MOST_ROWS][PADDED], v[MOST_ROWS][VALUE_DIM];
  float z[MOST_ROWS][VALUE_DIM], o[MOST_ROWS][VALUE_DIM];
  float decay[MOST_ROWS], beta[MOST_ROWS];
};

// Where channel i of a head lies in u and in the window.
DEVICE int channel_of(const delta_few_args& a, int head, int i) {
  int keys = a.key_heads * KEY_DIM, key_head = head / (a.Hv / a.key_heads);
  if (i < KEY_DIM) return key_head * KEY_DIM + i;
  if (i < 2 * KEY_DIM) return keys + key_head * KEY_DIM + i - KEY_DIM;
  return 2 * keys + head * VALUE_DIM + i - 2 * KEY_DIM;
}

KERNEL(THREADS) delta_few(ARGS delta_few_args launch) {
  OPEN_RUN(delta_few);
  __shared__ __align__(16) Rows s;
  __shared__ float norm[VALUE_DIM];
  __shared__ bool is_last;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, p = lane >> 2, head = blockIdx.x,
      column = 8 * warp + 2 * (lane & 3), group = a.Hv / a.key_heads;
  if (threadIdx.x < VALUE_DIM) norm[threadIdx.x] = a.norm[threadIdx.x];  // a weight
  begin();
  int rows = a.cursor[CURSOR_ROWS];
  if (rows <= 0) return;

  float first[STEPS][4], second[STEPS][4];  // of two columns
  float* state = a.state + (size_t)head * KEY_DIM * VALUE_DIM + column;
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = 32 * j + 4 * p + i;
      float2 both = 32 * j + 4 * p < KEY_DIM
                        ? *reinterpret_cast<const float2*>(state + r * VALUE_DIM)
                        : make_float2(0.0f, 0.0f);
      first[j][i] = both.x;
      second[j][i] = both.y;
    }
  int of_last_warp = (int)threadIdx.x - (THREADS - 32);
  if (of_last_warp >= 0 && of_last_warp < rows) {
    size_t t = of_last_warp;
    s.decay[t] = decay_of(a.a_log[head], a.a[t * a.a_stride + head], a.dt_bias[head]);
    s.beta[t] = sigmoid(a.b[t * a.b_stride + head]);
  }
  for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
    int c = channel_of(a, head, i), pitch = i < 2 * KEY_DIM ? PADDED : VALUE_DIM;
    float* to = i < KEY_DIM       ? &s.q[0][i]
                : i < 2 * KEY_DIM ? &s.k[0][i - KEY_DIM]
                                  : &s.v[0][i - 2 * KEY_DIM];
    float w[TAPS], x[TAPS];  // x: the rows under the taps
#pragma unroll
    for (int j = 0; j < TAPS; j++) w[j] = a.w[(size_t)j * a.C + c];
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = a.window[(size_t)j * a.C + c];
#pragma unroll 2
    for (int t = 0; t < rows; t++) {
      x[W] = a.u[(size_t)t * a.u_stride + c];
      to[t * pitch] = convolve(w, x);
#pragma unroll
      for (int j = 0; j < W; j++) x[j] = x[j + 1];
    }
  }
  for (int i = threadIdx.x; i < rows * VALUE_DIM; i += THREADS) {
    int t = i / VALUE_DIM, c = i % VALUE_DIM;
    s.z[t][c] = a.z[(size_t)t * a.z_stride + head * VALUE_DIM + c];
  }
  if constexpr (PADDED > KEY_DIM)
    for (int i = threadIdx.x; i < rows * (PADDED - KEY_DIM); i += THREADS) {
      int t = i / (PADDED - KEY_DIM), c = KEY_DIM + i % (PADDED - KEY_DIM);
      s.q[t][c] = s.k[t][c] = 0.0f;
    }
  __syncthreads();

  if (threadIdx.x == 0) {
    is_last = true;
    if (group > 1) {
      uint32_t* counter = a.counters + blockIdx.z * a.key_heads + head / group;
      __threadfence();  // what the block has read, it has read before it counts
      is_last = atomicAdd(counter, 1u) == group - 1;
      __threadfence();
      if (is_last) *counter = 0;
    }
  }
  for (int unit = warp; unit < 2 * rows; unit += N_WARPS) {
    bool is_key = unit & 1;
    normalize<KEY_DIM>(is_key ? s.k[unit / 2] : s.q[unit / 2], lane,
                       is_key ? 1.0f : rsqrt_f32((float)KEY_DIM));
  }
  __syncthreads();

#pragma unroll 1
  for (int t = 0; t < rows; t++) {
    float4 k[STEPS], q[STEPS];
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      k[j] = *reinterpret_cast<const float4*>(&s.k[t][32 * j + 4 * p]);
      q[j] = *reinterpret_cast<const float4*>(&s.q[t][32 * j + 4 * p]);
    }
    float2 v = *reinterpret_cast<const float2*>(&s.v[t][column]);
    float2 o = {step(first, k, q, v.x, s.decay[t], s.beta[t]),
                step(second, k, q, v.y, s.decay[t], s.beta[t])};
    if (p == 0) *reinterpret_cast<float2*>(&s.o[t][column]) = o;
  }
  __syncthreads();

  for (int t = warp; t < rows; t += N_WARPS)
    norm_head<VALUE_DIM>((act_t*)a.y + ((size_t)t * a.Hv + head) * VALUE_DIM, s.o[t], s.z[t], norm,
                         a.eps, lane);
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = 32 * j + 4 * p + i;
      if (32 * j + 4 * p < KEY_DIM)
        *reinterpret_cast<float2*>(state + r * VALUE_DIM) = make_float2(first[j][i], second[j][i]);
    }
  for (int i = threadIdx.x; i < CHANNELS; i += THREADS)
    if (i >= 2 * KEY_DIM || is_last) keep_window<W>(a, channel_of(a, head, i), rows);
}
