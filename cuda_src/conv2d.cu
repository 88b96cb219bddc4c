// conv2d.cu - conv2d, conv2d_add: float32 convolutions, and dense layers over many rows.
//
// Contract: conv2d:     y = f(b + sum over taps and channels of w x), f the identity, silu or relu.
//           conv2d_add: y = f(y + (b + sum ...)).
// Shapes:   x [B, H, W, C], w [N, K] with K = taps_y taps_x C in that order, b [N], y [B, Y, X, N];
//           beyond its border an image is 0.
// Order:    one chain of fma per output, k ascending from +0; then the bias, then y. What lies beyond
//           the border, or beyond K, adds 0 w: no bit changes. Fixed by K alone, so tiles are free.
// Launch:   implicit product of pixels and rows of w: grid (pixels / TILE, N / TILE), a block of 16 x
//           16 threads with TILE / 16 pixels by TILE / 16 outputs each. K goes by in steps of STEP,
//           the next one on its way into registers while one is multiplied. POINTWISE: one tap,
//           stride 1, no border, so that a pixel of y is a pixel of x.
#include "flashrt.cuh"

constexpr int THREADS = 256, STEP = 16, EACH = TILE / 16, ROWS = THREADS / STEP;
constexpr int PITCH = TILE + 4;  // columns of shared memory: rows begin in other banks

// Pixels and weights of a step, [k][pixel] and [k][output].
struct __align__(16) Step {
  float x[STEP][PITCH], w[STEP][PITCH];
};

// EACH neighbours at p, a multiple of EACH from the beginning of a row: one load.
DEVICE void load_each(float (&v)[EACH], const float* p) {
  if constexpr (EACH == 4) {
    float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x;
    v[1] = q.y;
    v[EACH - 2] = q.z;
    v[EACH - 1] = q.w;
  } else {
    float2 q = *reinterpret_cast<const float2*>(p);
    v[0] = q.x;
    v[1] = q.y;
  }
}

// What a thread brings in of a step: its k is that of its column, pixels and outputs are ROWS apart.
struct Mine {
  float x[TILE / ROWS], w[TILE / ROWS];
};

template <typename Args>
struct Reader {
  const Args& a;
  int first_n, pixels, k0;                  // k0: of this thread in every step
  int top[TILE / ROWS], left[TILE / ROWS];  // corner of a pixel's first tap
  const float* image[TILE / ROWS];          // POINTWISE: the pixel itself; null beyond the last

  DEVICE Reader(const Args& args, int first_pixel, int first_output, int n_pixels)
      : a(args), first_n(first_output), pixels(n_pixels), k0(threadIdx.x % STEP) {
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++) {
      int pixel = first_pixel + threadIdx.x / STEP + i * ROWS;
      bool is_there = pixel < pixels;
      if (POINTWISE) {
        image[i] = is_there ? a.x + (size_t)pixel * a.C : nullptr;
      } else {
        int row = pixel / a.X;
        top[i] = row % a.Y * a.stride - a.padding;
        left[i] = pixel % a.X * a.stride - a.padding;
        image[i] = is_there ? a.x + (size_t)(row / a.Y) * a.H * a.W * a.C : nullptr;
      }
    }
  }

  DEVICE void weights(Mine& mine, int step) const {
    int k = step + k0;
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++) {
      int n = first_n + threadIdx.x / STEP + i * ROWS;
      mine.w[i] = k < a.K && n < a.N ? a.w[(size_t)n * a.K + k] : 0.0f;
    }
  }

  DEVICE void values(Mine& mine, int step) const {
    int k = step + k0, c = k, dy = 0, dx = 0;
    if (!POINTWISE) {
      int tap = k / a.C;
      c = k - tap * a.C;
      dy = tap / a.taps_x;
      dx = (tap - dy * a.taps_x) * a.dilation;
      dy *= a.dilation;
    }
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++) {
      bool is_there = k < a.K && image[i];
      size_t at = c;
      if (!POINTWISE) {
        int y = top[i] + dy, x = left[i] + dx;
        is_there = is_there && y >= 0 && y < a.H && x >= 0 && x < a.W;
        at += ((size_t)y * a.W + x) * a.C;
      }
      mine.x[i] = is_there ? image[i][at] : 0.0f;
    }
  }
};

DEVICE float activated(float y, int activation) {
  if (activation == ACTIVATION_SILU) return silu(y);
  return activation == ACTIVATION_RELU && y < 0.0f ? 0.0f : y;
}

template <bool IS_ADDED, typename Args>
DEVICE void convolve(const Args& a) {
  __shared__ Step shared;
  int pixels = a.B * a.Y * a.X, first_pixel = blockIdx.x * TILE, first_n = blockIdx.y * TILE;
  Reader<Args> reader(a, first_pixel, first_n, pixels);
  Mine mine;
  reader.weights(mine, 0);  // constant, so on their way while the predecessor ends
  begin();
  reader.values(mine, 0);
  float sums[EACH][EACH];
#pragma unroll
  for (int p = 0; p < EACH; p++)
#pragma unroll
    for (int n = 0; n < EACH; n++) sums[p][n] = 0.0f;
  int column = threadIdx.x / STEP, my_pixel = threadIdx.x / 16 * EACH,
      my_n = threadIdx.x % 16 * EACH;
  for (int step = 0; step < a.K; step += STEP) {
    __syncthreads();  // the step before is used up
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++) {
      shared.x[reader.k0][column + i * ROWS] = mine.x[i];
      shared.w[reader.k0][column + i * ROWS] = mine.w[i];
    }
    __syncthreads();
    if (step + STEP < a.K) {
      reader.values(mine, step + STEP);
      reader.weights(mine, step + STEP);
    }
#pragma unroll
    for (int k = 0; k < STEP; k++) {
      float x[EACH], w[EACH];
      load_each(x, &shared.x[k][my_pixel]);
      load_each(w, &shared.w[k][my_n]);
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int n = 0; n < EACH; n++) sums[p][n] = fmaf(x[p], w[n], sums[p][n]);
    }
  }
#pragma unroll
  for (int p = 0; p < EACH; p++) {
    int pixel = first_pixel + my_pixel + p;
    if (pixel >= pixels) break;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int n = first_n + my_n + i;
      if (n >= a.N) break;
      float* y = a.y + (size_t)pixel * a.N + n;
      float sum = sums[p][i] + a.b[n];
      *y = activated(IS_ADDED ? *y + sum : sum, a.activation);
    }
  }
}

KERNEL(THREADS) conv2d(ARGS conv2d_args launch) {
  OPEN_RUN(conv2d);
  convolve<false>(a);
}

KERNEL(THREADS) conv2d_add(ARGS conv2d_add_args launch) {
  OPEN_RUN(conv2d_add);
  convolve<true>(a);
}
