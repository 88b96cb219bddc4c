// route.cu - which experts a row goes to, and with what weight.
//
// Contract: picks[t] = the P experts of the largest logits, or with BIASED of the largest scores +
//           bias, ascending by number: of equals the lower numbers, NaN last; gates[t] their scores,
//           with NORMED over (their sum + eps), times scale; NaN in a row with a NaN. Rows at or
//           beyond cursor.rows are left alone.
// Shapes:   logits [T, E] float, strided; bias [E] float; picks [T, P] int, gates [T, P] float.
// Order:    softmax: lane i sums exp of logits i, i + 32, ... in ascending order, then warp_sum. The
//           sum of gates: ascending picks.
// Launch:   a warp per row, 4 to a block; VALUES * 32 >= E, P <= 32.
#include "flashrt.cuh"

constexpr int ROWS = 4;

// Larger for what is picked first; 0 for NaN alone.
DEVICE unsigned order_of(float x) {
  unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return x != x ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// exp of a logit less the largest over the sum of all, or the sigmoid
DEVICE float score_of(float logit, float top, float all) {
  return SCORING == SCORING_SOFTMAX ? exp_f32(logit - top) / all : sigmoid(logit);
}

KERNEL(32 * ROWS) route(ARGS route_args launch) {
  OPEN_RUN(route);
  begin();
  __shared__ float kept[ROWS][32];  // gates by pick
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = blockIdx.x * ROWS + warp;
  if (t >= a.cursor[CURSOR_ROWS]) return;
  const float* logits = a.logits + (size_t)t * a.logits_stride;
  float x[VALUES], top = -INF, all = 1.0f;
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    int expert = 32 * i + lane;
    x[i] = expert < a.E ? logits[expert] : -INF;
    has_nan |= x[i] != x[i];
    top = fmaxf(top, x[i]);
  }
  has_nan = __ballot_sync(FULL_WARP, has_nan) != 0;
  if (SCORING == SCORING_SOFTMAX) {
#pragma unroll
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, o));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; i++)
      if (32 * i + lane < a.E) sum = sum + exp_f32(x[i] - top);
    all = warp_sum(sum);
  }
  unsigned order[VALUES], picked = 0, free = 0;  // bits of a lane's experts
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    int expert = 32 * i + lane;
    if (expert < a.E) free |= 1u << i;
    float bias = BIASED && expert < a.E ? a.bias[expert] : 0.0f;
    order[i] = order_of(BIASED ? score_of(x[i], top, all) + bias : x[i]);
  }
  for (int j = 0; j < a.P; j++) {
    unsigned best = 0, number = ~0u;
#pragma unroll
    for (int i = VALUES - 1; i >= 0; i--)  // of equals the lower number
      if (free >> i & 1 && (order[i] >= best || number == ~0u)) {
        best = order[i];
        number = 32 * i + lane;
      }
    unsigned first = warp_max(best);
    number = warp_min(best == first ? number : ~0u);
    if ((number & 31) == lane) {
      picked |= 1u << (number >> 5);
      free &= ~(1u << (number >> 5));
    }
  }
  int n = 0;  // picks with lower numbers
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    bool is_picked = picked >> i & 1;
    unsigned mask = __ballot_sync(FULL_WARP, is_picked);
    int at = n + __popc(mask & ((1u << lane) - 1));
    if (is_picked) {
      a.picks[(size_t)t * a.P + at] = 32 * i + lane;
      kept[warp][at] = score_of(x[i], top, all);
    }
    n += __popc(mask);
  }
  __syncwarp();
  float sum = 0.0f;
  for (int j = 0; j < a.P; j++) sum = sum + kept[warp][j];
  if (lane >= a.P) return;
  float gate = kept[warp][lane] / (NORMED ? sum + a.eps : 1.0f) * a.scale;
  a.gates[(size_t)t * a.P + lane] = has_nan ? __uint_as_float(0x7fc00000u) : gate;
}
