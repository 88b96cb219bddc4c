// delta.cuh - what the steps around the delta rule compute, for a thread or a warp: shared by the
// kernels of many rows (conv, delta_gates, delta_rule, gated_norm) and by delta_few, so that both
// have the same bits.
//
// IS NOT: loads of whole tiles, or what a block does. Pointers may be to global or shared memory.
#pragma once

// A channel's convolution under its taps, oldest first, then silu: one fma each. `sum`: the first
// product, to which a bias may have been added.
template <int N_TAPS>
DEVICE float convolve_from(float sum, const float (&w)[N_TAPS], const float (&x)[N_TAPS]) {
#pragma unroll
  for (int j = 1; j < N_TAPS; j++) sum = fmaf(w[j], x[j], sum);
  return silu(sum);
}
template <int N_TAPS>
DEVICE float convolve(const float (&w)[N_TAPS], const float (&x)[N_TAPS]) {
  return convolve_from(w[0] * x[0], w, x);
}

// Channel c's window becomes the last rows of window ++ u; negative ones are rows of the old window.
template <int W, class Args>
DEVICE void keep_window(const Args& a, int c, int rows) {
  float kept[W];
#pragma unroll
  for (int j = 0; j < W; j++) {
    int t = rows - W + j;
    kept[j] = t < 0 ? a.window[(size_t)(W + t) * a.C + c] : a.u[(size_t)t * a.u_stride + c];
  }
#pragma unroll
  for (int j = 0; j < W; j++) a.window[(size_t)j * a.C + c] = kept[j];
}

// x / |x| * factor, in place, by a warp: lane l sums elements l, l + 32, ... in ascending order,
// then warp_sum.
template <int DIM>
DEVICE void normalize(float* x, int lane, float factor) {
  constexpr int PER_LANE = ceil_div(DIM, 32);
  float v[PER_LANE], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    v[i] = c < DIM ? x[c] : 0.0f;
    sum = fmaf(v[i], v[i], sum);
  }
  float scale = rsqrt_f32(warp_sum(sum) + 1e-6f) * factor;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c < DIM) x[c] = v[i] * scale;
  }
}

DEVICE float decay_of(float a_log, float a, float dt_bias) {
  return exp_f32(-(exp_f32(a_log) * softplus(a + dt_bias)));
}

// x . s over the keys, the same bits in the 8 lanes of a column: lane p of them has rows 32 j + 4 p
// + i, a chain over j for each i, then (c0 + c1) + (c2 + c3), then over p by pairs: 1, 2, 4 apart.
template <int STEPS>
DEVICE float dot(const float4 (&x)[STEPS], const float (&s)[STEPS][4]) {
  float c[4] = {};
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    c[0] = fmaf(x[j].x, s[j][0], c[0]);
    c[1] = fmaf(x[j].y, s[j][1], c[1]);
    c[2] = fmaf(x[j].z, s[j][2], c[2]);
    c[3] = fmaf(x[j].w, s[j][3], c[3]);
  }
  float sum = (c[0] + c[1]) + (c[2] + c[3]);
#pragma unroll
  for (int o = 4; o < 32; o <<= 1) sum = sum + __shfl_xor_sync(FULL_WARP, sum, o);
  return sum;
}

// A row of a column: its o. The state s, of the lane's rows, becomes that after the row.
template <int STEPS>
DEVICE float step(float (&s)[STEPS][4], const float4 (&k)[STEPS], const float4 (&q)[STEPS], float v,
                  float decay, float beta) {
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[j][i] = s[j][i] * decay;
  float delta = beta * (v - dot(k, s));
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    s[j][0] = fmaf(k[j].x, delta, s[j][0]);
    s[j][1] = fmaf(k[j].y, delta, s[j][1]);
    s[j][2] = fmaf(k[j].z, delta, s[j][2]);
    s[j][3] = fmaf(k[j].w, delta, s[j][3]);
  }
  return dot(q, s);
}

#ifdef ACT_PARTS
// y = w (o rsqrt(mean(o^2) + eps)) silu(z) of a head, by a warp; sums as in `normalize`.
template <int DIM>
DEVICE void norm_head(act_t* y, const float* o, const float* z, const float* w, float eps,
                      int lane) {
  constexpr int PER_LANE = ceil_div(DIM, 32);
  float v[PER_LANE], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    v[i] = c < DIM ? o[c] : 0.0f;
    sum = fmaf(v[i], v[i], sum);
  }
  float scale = rsqrt_f32(warp_sum(sum) / (float)DIM + eps);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c < DIM) y[c] = to_act(w[c] * (v[i] * scale) * silu(z[c]));
  }
}
#endif
