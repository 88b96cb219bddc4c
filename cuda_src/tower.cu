// tower.cu - activations, mix_rows, gelu, geglu, turn_patches, image_patches: element by element.
//
// Contract: of valid rows t, activations:  y = x.
//           mix_rows:      y[t] = sum over i < 4, ascending, of weights[t, i] table[rows[t, i]].
//           gelu:          y = u Phi(u); where tanh, by the approximation of Phi with a tanh.
//           geglu:         y = gelu(u[:, :I]) u[:, I:], by that approximation.
//           turn_patches:  dims j and j + 2 R of each head of x turn by places[t, axis] inv_freq[.].
//           image_patches: of all rows, y[t, (c, i, j)] = 2 v - 1, v channel c of the pixel (i, j) of
//                          patch t: x resized to height x width, `fill` around it. Patches go by
//                          squares of group x group.
// Shapes:   x, y [T, C] (y of activations: activations; x of turn_patches: strided), table [N, C],
//           rows, weights [T, 4], u [T, I], of geglu [T, 2 I], its y [T, I] activations, places [T, 2], inv_freq [R],
//           image_patches: x [H, W, 3], y [T, C = 3 patch^2] activations.
// Order:    mix_rows one chain of fma; image_patches along rows, then columns; else no sums.
// Launch:   grid (columns / THREADS, T), a thread per element; turn_patches: per pair of dims.
#include "flashrt.cuh"

constexpr int THREADS = 256;

DEVICE int column() { return blockIdx.x * THREADS + threadIdx.x; }

KERNEL(THREADS) activations(ARGS activations_args launch) {
  OPEN_RUN(activations);
  begin();
  int t = blockIdx.y, c = column();
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.C) return;
  size_t i = (size_t)t * a.C + c;
  ((act_t*)a.y)[i] = to_act(a.x[i]);
}

// The two pixels beside a point of a line of n, and their shares: pixel i has its middle at i + 1/2,
// in both sizes.
struct Neighbours {
  int low, high;
  float low_share, high_share;
};

DEVICE Neighbours neighbours_of(int at, int n, int resized) {
  float place = fmaxf(fmaf((float)n / (float)resized, (float)at + 0.5f, -0.5f), 0.0f);
  Neighbours found;
  found.low = min((int)place, n - 1);
  found.high = min(found.low + 1, n - 1);
  found.high_share = fminf(place - (float)found.low, 1.0f);
  found.low_share = 1.0f - found.high_share;
  return found;
}

DEVICE float between(Neighbours at, float low, float high) {
  return fmaf(at.high_share, high, at.low_share * low);
}

KERNEL(THREADS) image_patches(ARGS image_patches_args launch) {
  OPEN_RUN(image_patches);
  begin();
  int t = blockIdx.y, at = column(), size = a.patch, group = a.group;
  if (at >= a.C) return;
  int across = a.side / size / group, square = t / (group * group), inside = t % (group * group);
  int c = at / (size * size);
  int y = (square / across * group + inside / group) * size + at / size % size - a.top;
  int x = (square % across * group + inside % group) * size + at % size - a.left;
  float value = a.fill;
  if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
    Neighbours row = neighbours_of(y, a.H, a.height), col = neighbours_of(x, a.W, a.width);
    const float* above = a.x + (size_t)row.low * a.W * 3 + c;
    const float* below = a.x + (size_t)row.high * a.W * 3 + c;
    value = between(row, between(col, above[3 * col.low], above[3 * col.high]),
                    between(col, below[3 * col.low], below[3 * col.high]));
  }
  ((act_t*)a.y)[(size_t)t * a.C + at] = to_act(value * 2.0f - 1.0f);
}

KERNEL(THREADS) mix_rows(ARGS mix_rows_args launch) {
  OPEN_RUN(mix_rows);
  begin();
  int t = blockIdx.y, c = column();
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.C) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++)
    sum = fmaf(a.weights[4 * t + i], a.table[(size_t)a.rows[4 * t + i] * a.C + c], sum);
  a.y[(size_t)t * a.C + c] = sum;
}

// 2 Phi(-z), z >= 0: 7.1.26 of Abramowitz and Stegun, within 1.5e-7.
DEVICE float tails(float z) {
  float at = z * 0.70710678f, t = 1.0f / fmaf(at, 0.3275911f, 1.0f);
  float p = fmaf(1.061405429f, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  return p * t * exp_f32(-at * at);
}

DEVICE float gelu_of(float u, bool is_tanh) {
  // (1 + tanh(s / 2)) / 2 is the sigmoid of s
  if (is_tanh) return u * sigmoid(1.5957691216f * fmaf(u * u * u, 0.044715f, u));
  float half = 0.5f * tails(fabsf(u));
  return u * (u < 0.0f ? half : 1.0f - half);
}

KERNEL(THREADS) gelu(ARGS gelu_args launch) {
  OPEN_RUN(gelu);
  begin();
  int t = blockIdx.y, c = column();
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.I) return;
  size_t i = (size_t)t * a.I + c;
  ((act_t*)a.y)[i] = to_act(gelu_of(a.u[i], a.tanh));
}

KERNEL(THREADS) geglu(ARGS geglu_args launch) {
  OPEN_RUN(geglu);
  begin();
  int t = blockIdx.y, c = column();
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.I) return;
  const float* gate = a.u + (size_t)t * 2 * a.I + c;
  ((act_t*)a.y)[(size_t)t * a.I + c] = to_act(gelu_of(gate[0], true) * gate[a.I]);
}

KERNEL(THREADS) turn_patches(ARGS turn_patches_args launch) {
  OPEN_RUN(turn_patches);
  begin();
  int t = blockIdx.y, pair = column(), half = 2 * a.R;
  if (t >= a.cursor[CURSOR_ROWS] || pair >= a.C / 2) return;
  int j = pair % half, axis = j >= a.R;
  float sine, cosine;
  sincos_f32((float)a.places[2 * t + axis] * a.inv_freq[j - axis * a.R], sine, cosine);
  float* x = a.x + (size_t)t * a.x_stride + pair / half * 2 * half + j;
  float low = x[0], high = x[half];
  x[0] = low * cosine - high * sine;
  x[half] = high * cosine + low * sine;
}
