// Training kernels of the gated delta rule layer, float32, forward and backward.
//
// IS: conv + silu, the recurrent delta rule with its l2 norms, silu(a) * b. IS NOT: inference code.
// fused.py calls it, with every size and the number of threads as long.
//
// The delta rule keeps a state S [DK, DV] per head. With q, k normalised, e = exp(g), q scaled:
//
//     d = beta (v - e S^T k)          what is written under k: the error of what was read there
//     S = e S + k d^T
//     o = S^T q
//
// Forward saves S at every BLOCK-th token; backward recomputes a block's states from there and then
// walks the block from its end. Work is split over rows and heads, which are independent.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TAPS 4      // of the convolution
#define BLOCK 32    // tokens between saved states
#define LANES 64    // channels that a thread of the convolution's backward pass holds at a time
#define MAX_DIM 64  // of a head
#define INLINE static inline __attribute__((always_inline))
#define EPS 1e-6f

INLINE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
INLINE long smaller(long a, long b) { return a < b ? a : b; }

// ---- causal depthwise convolution, then silu ---------------------------------------------------
// y[b, t, c] = silu(sum_j taps[j, c] u[b, t - 3 + j, c]); u, y [B, T, C], taps [TAPS, C]

void conv_silu(const float *u, const float *taps, float *y, long B, long T, long C, long threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long b = 0; b < B; b++)
    for (long t = 0; t < T; t++) {
      const float *in = u + (b * T + t) * C;
      float *out = y + (b * T + t) * C;
      memset(out, 0, sizeof(float) * C);
      for (long j = 0; j < TAPS; j++) {
        const long back = TAPS - 1 - j;
        if (back > t) continue;
        for (long c = 0; c < C; c++) out[c] += taps[j * C + c] * in[c - back * C];
      }
      for (long c = 0; c < C; c++) out[c] *= sigmoid(out[c]);
    }
}

// du [B, T, C]; dtaps [B, TAPS, C], a part for each row. Walks t from the end and keeps the
// gradient before silu of the last TAPS tokens, which is all that du needs.
void conv_silu_backward(const float *u, const float *taps, const float *dy, float *du, float *dtaps,
                        long B, long T, long C, long threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long b = 0; b < B; b++)
    for (long c0 = 0; c0 < C; c0 += LANES) {
      const long n = smaller(LANES, C - c0);
      float ring[TAPS][LANES] = {{0}}, sums[TAPS][LANES] = {{0}};
      for (long t = T - 1; t >= 0; t--) {
        const long at = (b * T + t) * C + c0;
        float pre[LANES] = {0};
        for (long j = 0; j < TAPS; j++) {
          const long back = TAPS - 1 - j;
          if (back > t) continue;
          for (long c = 0; c < n; c++) pre[c] += taps[j * C + c0 + c] * u[at + c - back * C];
        }
        float *now = ring[t % TAPS];
        for (long c = 0; c < n; c++) {
          const float s = sigmoid(pre[c]);
          now[c] = dy[at + c] * s * (1 + pre[c] * (1 - s));
        }
        for (long c = 0; c < n; c++) du[at + c] = 0;
        for (long j = 0; j < TAPS; j++) {
          const long back = TAPS - 1 - j;
          if (back <= t)
            for (long c = 0; c < n; c++) sums[j][c] += now[c] * u[at + c - back * C];
          if (t + back < T)
            for (long c = 0; c < n; c++)
              du[at + c] += taps[j * C + c0 + c] * ring[(t + back) % TAPS][c];
        }
      }
      for (long j = 0; j < TAPS; j++)
        memcpy(dtaps + (b * TAPS + j) * C + c0, sums[j], sizeof(float) * n);
    }
}

// ---- gated delta rule --------------------------------------------------------------------------

// out = scale x / |x|; returns 1 / |x|
INLINE float normalise(const float *x, float *out, float scale, long n) {
  float sum = EPS;
  for (long i = 0; i < n; i++) sum += x[i] * x[i];
  const float inverse = 1.f / sqrtf(sum);
  for (long i = 0; i < n; i++) out[i] = x[i] * inverse * scale;
  return inverse;
}

INLINE void normalise_backward(const float *x, float inverse, float scale, const float *dout,
                               float *dx, long n) {
  float dot = 0;
  for (long i = 0; i < n; i++) dot += x[i] * dout[i];
  dot *= inverse * inverse * inverse;
  for (long i = 0; i < n; i++) dx[i] = scale * (inverse * dout[i] - x[i] * dot);
}

// after = e before + k d^T, which may be the same memory; d is returned
INLINE void step(const float *before, float *after, const float *k, const float *v, float e,
                 float beta, float *d, long DK, long DV) {
  float read[MAX_DIM];
  for (long j = 0; j < DV; j++) read[j] = 0;
  for (long i = 0; i < DK; i++)
    for (long j = 0; j < DV; j++) read[j] += before[i * DV + j] * k[i];
  for (long j = 0; j < DV; j++) d[j] = beta * (v[j] - e * read[j]);
  for (long i = 0; i < DK; i++)
    for (long j = 0; j < DV; j++) after[i * DV + j] = e * before[i * DV + j] + k[i] * d[j];
}

// qkv [B, T, H DK | H DK | H DV], g and beta [B, T, H] -> o [B, T, H, DV],
// states [B, H, ceil(T / BLOCK), DK, DV]
INLINE void delta(const float *qkv, const float *g, const float *beta, float *o, float *states,
                  long B, long T, long H, long threads, const long DK, const long DV) {
  const long C = H * (2 * DK + DV), blocks = (T + BLOCK - 1) / BLOCK;
  const float scale = 1.f / sqrtf(DK);
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long b = 0; b < B; b++)
    for (long h = 0; h < H; h++) {
      float S[MAX_DIM * MAX_DIM], q[MAX_DIM], k[MAX_DIM], d[MAX_DIM];
      memset(S, 0, sizeof(float) * DK * DV);
      float *saved = states + (b * H + h) * blocks * DK * DV;
      for (long t = 0; t < T; t++) {
        const long at = b * T + t;
        const float *x = qkv + at * C;
        if (t % BLOCK == 0) memcpy(saved + t / BLOCK * DK * DV, S, sizeof(float) * DK * DV);
        normalise(x + h * DK, q, scale, DK);
        normalise(x + (H + h) * DK, k, 1, DK);
        step(S, S, k, x + 2 * H * DK + h * DV, expf(g[at * H + h]), beta[at * H + h], d, DK, DV);
        float out[MAX_DIM];
        for (long j = 0; j < DV; j++) out[j] = 0;
        for (long i = 0; i < DK; i++)
          for (long j = 0; j < DV; j++) out[j] += S[i * DV + j] * q[i];
        memcpy(o + (at * H + h) * DV, out, sizeof(float) * DV);
      }
    }
}

INLINE void delta_backward(const float *qkv, const float *g, const float *beta, const float *states,
                           const float *d_o, float *dqkv, float *dg, float *dbeta, long B, long T,
                           long H, long threads, const long DK, const long DV) {
  const long C = H * (2 * DK + DV), blocks = (T + BLOCK - 1) / BLOCK, size = DK * DV;
  const float scale = 1.f / sqrtf(DK);
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long b = 0; b < B; b++)
    for (long h = 0; h < H; h++) {
      // before each token, and after the last
      float *S = malloc(sizeof(float) * size * (BLOCK + 1));
      float dS[MAX_DIM * MAX_DIM];  // gradient of the state after a token
      float q[BLOCK][MAX_DIM], k[BLOCK][MAX_DIM], d[BLOCK][MAX_DIM], qn[BLOCK], kn[BLOCK];
      memset(dS, 0, sizeof(float) * size);
      for (long block = blocks - 1; block >= 0; block--) {
        const long t0 = block * BLOCK, n = smaller(BLOCK, T - t0);
        memcpy(S, states + ((b * H + h) * blocks + block) * size, sizeof(float) * size);
        for (long i = 0; i < n; i++) {
          const long at = b * T + t0 + i;
          const float *x = qkv + at * C;
          qn[i] = normalise(x + h * DK, q[i], scale, DK);
          kn[i] = normalise(x + (H + h) * DK, k[i], 1, DK);
          step(S + i * size, S + (i + 1) * size, k[i], x + 2 * H * DK + h * DV, expf(g[at * H + h]),
               beta[at * H + h], d[i], DK, DV);
        }
        for (long t = n - 1; t >= 0; t--) {
          const long at = b * T + t0 + t;
          const float *x = qkv + at * C, *dout = d_o + (at * H + h) * DV;
          const float *before = S + t * size, *after = before + size;
          const float e = expf(g[at * H + h]), bt = beta[at * H + h];
          float *dx = dqkv + at * C, *dv = dx + 2 * H * DK + h * DV;
          float dq[MAX_DIM], dk[MAX_DIM], dd[MAX_DIM], dread[MAX_DIM], de = 0, db = 0;
          for (long j = 0; j < DV; j++) dd[j] = 0;
          for (long i = 0; i < DK; i++) {  // through o = S^T q and S = e S + k d^T
            float to_q = 0, to_k = 0, *row = dS + i * DV;
            for (long j = 0; j < DV; j++) {
              row[j] += q[t][i] * dout[j];
              to_q += after[i * DV + j] * dout[j];
              dd[j] += row[j] * k[t][i];
              to_k += row[j] * d[t][j];
            }
            dq[i] = to_q;
            dk[i] = to_k;
          }
          for (long j = 0; j < DV; j++) {  // through d = beta (v - e read)
            dv[j] = bt * dd[j];
            dread[j] = -bt * dd[j];  // of e read
            db += dd[j] * d[t][j];
          }
          for (long i = 0; i < DK; i++) {  // through read = S^T k and the decay
            float to_k = 0, to_e = 0, *row = dS + i * DV;
            const float *s = before + i * DV;
            for (long j = 0; j < DV; j++) {
              const float z = row[j] + k[t][i] * dread[j];
              to_k += s[j] * dread[j];
              to_e += z * s[j];
              row[j] = e * z;
            }
            dk[i] += e * to_k;
            de += e * to_e;
          }
          dg[at * H + h] = de;
          dbeta[at * H + h] = db / fmaxf(bt, 1e-12f);
          normalise_backward(x + h * DK, qn[t], scale, dq, dx + h * DK, DK);
          normalise_backward(x + (H + h) * DK, kn[t], 1, dk, dx + (H + h) * DK, DK);
        }
      }
      free(S);
    }
}

// The sizes must be constants where the loops are compiled.
#define INSTANCE(DK, DV)                                                                         \
  void delta_##DK##_##DV(const float *qkv, const float *g, const float *beta, float *o,          \
                         float *states, long B, long T, long H, long threads) {                  \
    delta(qkv, g, beta, o, states, B, T, H, threads, DK, DV);                                    \
  }                                                                                              \
  void delta_backward_##DK##_##DV(const float *qkv, const float *g, const float *beta,           \
                                  const float *states, const float *d_o, float *dqkv, float *dg, \
                                  float *dbeta, long B, long T, long H, long threads) {          \
    delta_backward(qkv, g, beta, states, d_o, dqkv, dg, dbeta, B, T, H, threads, DK, DV);        \
  }
INSTANCE(32, 32)
INSTANCE(64, 64)

// ---- o = silu(a) b -----------------------------------------------------------------------------

void swiglu(const float *a, const float *b, float *o, long n, long threads) {
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < n; i++) o[i] = a[i] * sigmoid(a[i]) * b[i];
}

void swiglu_backward(const float *a, const float *b, const float *d_o, float *da, float *db, long n,
                     long threads) {
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < n; i++) {
    const float s = sigmoid(a[i]), silu = a[i] * s;
    db[i] = d_o[i] * silu;
    da[i] = d_o[i] * b[i] * (s + silu * (1 - s));
  }
}
