/* conv2d, conv2d_add: convolutions of images with channels last; of 1 x 1 taps, dense layers over
 * many rows.
 *
 * Order: output channels sit in vector lanes, so each output is one chain of scalar fma from +0
 * over taps, rows first, and within a tap over channels, all ascending; then the bias, then what is
 * added. A tap beyond the border is a tap on zeros, which changes no bit of a chain. K alone fixes
 * the order: tiles, threads and images decide only which chains run side by side.
 *
 * Weights: panels of 32 outputs, [ceil(N / 32)][K][32]. A unit of work is a panel by BLOCK pixels: the
 * panel comes from the second-level cache for every TILE of them, the sums stay in registers.
 * IS NOT: an unfolding into columns; pixels are read where they lie.
 */
#include "common.h"
#include "dense.h"

enum {
  PARTS = LANES / VL,       /* vectors of a panel */
  TILE = VL == 16 ? 12 : 3, /* pixels whose sums fill the registers */
  FEW = VL == 16 ? 4 : 2,   /* and of a rest */
  BLOCK = 8 * TILE,
  ZEROS = 1024 /* what lies beyond the border, of so many channels at a time */
};

static const float zeros[ZEROS];

typedef struct {
  const float *x, *w, *b;
  float *y;
  int H, W, C, N, K, Y, X;
  int taps_y, taps_x, stride, padding, dilation, activation;
  int64_t pixels; /* of y, of all images */
  int is_added;
} convolution;

/* Where a pixel of y begins to read: the place of its first tap, which may lie outside. */
typedef struct {
  const float *image;
  int y, x;
} corner;

/* Those of n pixels from `pixel` on. */
INLINE void find_corners(const convolution *a, int64_t pixel, corner *found, const int n) {
  int64_t row = pixel / a->X;
  int x = (int)(pixel % a->X), y = (int)(row % a->Y);
  const float *image = a->x + row / a->Y * a->H * a->W * a->C;
  for (int p = 0; p < n; p++) {
    found[p] = (corner){image, y * a->stride - a->padding, x * a->stride - a->padding};
    if (++x < a->X) continue;
    x = 0;
    if (++y < a->Y) continue;
    y = 0;
    image += (int64_t)a->H * a->W * a->C;
  }
}

/* Sums of n pixels over `count` channels from `from` on, 0 for NULL. */
INLINE void add_run(vf sums[][PARTS], const float *const from[], const float *w, int64_t count,
                    const int n) {
  for (int64_t begin = 0; begin < count; begin += ZEROS) {
    const float *at[TILE];
    for (int p = 0; p < n; p++) at[p] = from[p] ? from[p] + begin : zeros;
    int64_t stop = min_of(ZEROS, count - begin);
    for (int64_t c = 0; c < stop; c++, w += LANES) {
      vf weights[PARTS];
      UNROLL for (int i = 0; i < PARTS; i++) weights[i] = v_load(w + i * VL);
      UNROLL for (int p = 0; p < n; p++) {
        vf value = v_set(at[p][c]);
        UNROLL for (int i = 0; i < PARTS; i++) sums[p][i] = v_fma(value, weights[i], sums[p][i]);
      }
    }
  }
}

/* n pixels from `first` on, one panel. */
INLINE void tile(const convolution *a, int64_t panel, int64_t first, const int n) {
  vf sums[TILE][PARTS] = {};
  corner corners[TILE];
  int64_t row_run = (int64_t)a->taps_x * a->C;
  int is_inside = a->dilation == 1; /* whether the taps of a row lie one after another, all there */
  find_corners(a, first, corners, n);
  for (int p = 0; p < n; p++) {
    is_inside &= corners[p].x >= 0 && corners[p].x + a->taps_x <= a->W;
  }
  const float *w = a->w + panel * a->K * LANES;
  for (int ty = 0; ty < a->taps_y; ty++) {
    const float *rows[TILE], *from[TILE];
    for (int p = 0; p < n; p++) {
      int y = corners[p].y + ty * a->dilation;
      rows[p] = y >= 0 && y < a->H ? corners[p].image + (int64_t)y * a->W * a->C : NULL;
    }
    if (is_inside) {
      for (int p = 0; p < n; p++) {
        from[p] = rows[p] ? rows[p] + (int64_t)corners[p].x * a->C : NULL;
      }
      add_run(sums, from, w, row_run, n);
      w += row_run * LANES;
      continue;
    }
    for (int tx = 0; tx < a->taps_x; tx++, w += (int64_t)a->C * LANES) {
      for (int p = 0; p < n; p++) {
        int x = corners[p].x + tx * a->dilation;
        from[p] = rows[p] && x >= 0 && x < a->W ? rows[p] + (int64_t)x * a->C : NULL;
      }
      add_run(sums, from, w, a->C, n);
    }
  }
  for (int i = 0; i < PARTS; i++) {
    int64_t channel = panel * LANES + i * VL, count = min_of(VL, a->N - channel);
    if (count <= 0) break;
    vf bias = load_some(a->b + channel, count);
    for (int p = 0; p < n; p++) {
      float *y = a->y + (first + p) * a->N + channel;
      vf sum = sums[p][i] + bias;
      if (a->is_added) sum = load_some(y, count) + sum;
      store_some(y, v_activated(sum, a->activation), count);
    }
  }
}

static void convolve(const convolution *a, int nt) {
  int64_t panels = ceil_div(a->N, LANES);
  claim c = {.n = panels * ceil_div(a->pixels, BLOCK), .most = 8, .least = 1, .nt = nt};
  while (flashrt_claim(&c)) {
    for (int64_t unit = c.mine.begin; unit < c.mine.end; unit++) {
      int64_t first = unit / panels * BLOCK, stop = min_of(first + BLOCK, a->pixels);
      for (; first + TILE <= stop; first += TILE) tile(a, unit % panels, first, TILE);
      for (; first + FEW <= stop; first += FEW) tile(a, unit % panels, first, FEW);
      for (; first < stop; first++) tile(a, unit % panels, first, 1);
    }
  }
}

#define CONVOLUTION(a, added)                   \
  {.x = (a)->x,                                 \
   .w = (a)->w,                                 \
   .b = (a)->b,                                 \
   .y = (a)->y,                                 \
   .H = (a)->H,                                 \
   .W = (a)->W,                                 \
   .C = (a)->C,                                 \
   .N = (a)->N,                                 \
   .K = (a)->K,                                 \
   .Y = (a)->Y,                                 \
   .X = (a)->X,                                 \
   .taps_y = (a)->taps_y,                       \
   .taps_x = (a)->taps_x,                       \
   .stride = (a)->stride,                       \
   .padding = (a)->padding,                     \
   .dilation = (a)->dilation,                   \
   .activation = (a)->activation,               \
   .pixels = (int64_t)(a)->B * (a)->Y * (a)->X, \
   .is_added = added}

void op_conv2d(const conv2d_args *a, int tid, int nt) {
  convolution c = CONVOLUTION(a, 0);
  convolve(&c, nt);
}

void op_conv2d_add(const conv2d_add_args *a, int tid, int nt) {
  convolution c = CONVOLUTION(a, 1);
  convolve(&c, nt);
}
