// vision.cu - max_pool, add_rows, normalize: element by element of images and rows of features.
//
// Contract: max_pool:   y = the largest x of a window, NaN the largest of all; what lies beyond the
//                       border is left out.
//           add_rows:   y = x + r.
//           normalize:  y = (x - mean) / std - shift per column.
// Shapes:   max_pool: x [B, H, W, C], y [B, Y, X, C]; the others: x, r, y [T, C], mean, std [C].
// Order:    no sums.
// Launch:   a thread per element of y, blocks of THREADS.
#include "flashrt.cuh"

constexpr int THREADS = 256;

DEVICE size_t element() { return (size_t)blockIdx.x * THREADS + threadIdx.x; }

KERNEL(THREADS) max_pool(ARGS max_pool_args launch) {
  OPEN_RUN(max_pool);
  begin();
  size_t i = element();
  if (i >= (size_t)a.B * a.Y * a.X * a.C) return;
  int c = i % a.C, pixel = i / a.C, row = pixel / a.X;
  int top = row % a.Y * a.stride - a.padding, left = pixel % a.X * a.stride - a.padding;
  const float* image = a.x + (size_t)(row / a.Y) * a.H * a.W * a.C + c;
  float largest = -INF;
  for (int y = max(top, 0); y < min(top + a.taps, a.H); y++) {
    for (int x = max(left, 0); x < min(left + a.taps, a.W); x++) {
      float value = image[((size_t)y * a.W + x) * a.C];
      largest = value <= largest || largest != largest ? largest : value;
    }
  }
  a.y[i] = largest;
}

KERNEL(THREADS) add_rows(ARGS add_rows_args launch) {
  OPEN_RUN(add_rows);
  begin();
  size_t i = element();
  if (i < (size_t)a.T * a.C) a.y[i] = a.x[i] + a.r[i];
}

KERNEL(THREADS) normalize(ARGS normalize_args launch) {
  OPEN_RUN(normalize);
  begin();
  size_t i = element();
  if (i >= (size_t)a.T * a.C) return;
  int c = i % a.C;
  a.y[i] = (a.x[i] - a.mean[c]) / a.std[c] - a.shift;
}
