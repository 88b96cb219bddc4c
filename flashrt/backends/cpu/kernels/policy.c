/* observe, see, gru_cell, flow_begin, flow_end, chunk_begin, chunk_end, ensemble, flow_noise, guide, euler,
 * take_action: a policy's steps between its layers.
 *
 * IS: elementwise work of a few hundred numbers, and the cursor's words. What writes the cursor
 * runs on thread 0 alone. IS NOT: the schedule of plans (the host's), or dense layers (dense.c).
 */
#include "common.h"
#include "fmath.h"

#define OBSERVATION_LIMIT 10.0f
#define TWO_PI 6.28318530717958648f

/* NaN stays NaN. */
INLINE float clip(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

void op_observe(const observe_args *a, int tid, int nt) {
  if (tid > 0) return;
  for (int i = 0; i < a->O; i++) {
    a->x[i] = clip((a->observation[i] - a->mean[i]) / a->std[i], OBSERVATION_LIMIT);
  }
  memcpy(a->x + a->O, a->previous, (size_t)a->A * sizeof(float));
  a->cursor[POLICY_OBSERVED] = a->cursor[POLICY_TICK];
}

void op_see(const see_args *a, int tid, int nt) {
  if (tid == 0) a->cursor[POLICY_OBSERVED] = a->cursor[POLICY_TICK];
}

/* ---- memory ---- */

/* tanh within 1e-7 of the true value, absolute. */
INLINE float s_tanh(float x) { return 1.0f - 2.0f / (1.0f + s_exp(2.0f * x)); }
INLINE vf v_tanh(vf x) { return 1.0f - 2.0f / (1.0f + v_exp(2.0f * x)); }

void op_gru_cell(const gru_cell_args *a, int tid, int nt) {
  span units = share(ceil_div(a->M, VL), tid, nt);
  int M = a->M;
  const float *u = a->u, *v = a->v;
  int64_t i = units.begin * VL, end = min_of(units.end * VL, M);
  for (; i + VL <= end; i += VL) {
    vf r = v_sigmoid(v_load(u + i) + v_load(v + i));
    vf z = v_sigmoid(v_load(u + M + i) + v_load(v + M + i));
    vf n = v_tanh(v_load(u + 2 * M + i) + r * v_load(v + 2 * M + i));
    v_store(a->memory + i, (1.0f - z) * n + z * v_load(a->memory + i));
  }
  for (; i < end; i++) {
    float r = s_sigmoid(u[i] + v[i]);
    float z = s_sigmoid(u[M + i] + v[M + i]);
    float n = s_tanh(u[2 * M + i] + r * v[2 * M + i]);
    a->memory[i] = (1.0f - z) * n + z * a->memory[i];
  }
}

/* ---- plans ---- */

/* x[i] = standard normal numbers, i in [0, n), as Box and Muller make them in pairs: number i is
 * one of the four of Philox' counter (i / 4, tick, 0, 0), so it depends on (seed, tick, i)
 * alone. */
static void normal_noise(float *x, int n, const int32_t *cursor, int32_t tick) {
  for (int i = 0; i < n; i += 4 * VL) {
    vu words[4] = {{}, (vu){} + (uint32_t)tick, {}, {}};
    for (int lane = 0; lane < VL; lane++) words[0][lane] = (uint32_t)(i / 4 + lane);
    v_philox(words, (uint32_t)cursor[POLICY_SEED_LOW], (uint32_t)cursor[POLICY_SEED_HIGH]);
    for (int pair = 0; pair < 2; pair++) {
      vf logs = -2.0f * v_log(v_uniform(words[2 * pair]));
      vf turns = TWO_PI * v_uniform(words[2 * pair + 1]);
      for (int lane = 0; lane < VL; lane++) {
        int at = i + 4 * lane + 2 * pair;
        float radius = __builtin_sqrtf(logs[lane]);
        sine_cosine angle = s_sincos(turns[lane]);
        if (at < n) x[at] = radius * angle.cosine;
        if (at + 1 < n) x[at + 1] = radius * angle.sine;
      }
    }
  }
}

typedef struct {
  const float *previous, *queue;
  int32_t *cursor;
  int H, A;
} promises;

/* The action that tick t was promised, or NULL. */
static const float *promised(const promises *a, int32_t t) {
  const int32_t *c = a->cursor;
  if (t < c[POLICY_TICK]) return t == c[POLICY_TICK] - 1 ? a->previous : NULL;
  int64_t row = (int64_t)t - c[POLICY_CHUNK];
  return t < c[POLICY_STOP] && row >= 0 && row < a->H ? a->queue + row * a->A : NULL;
}

/* The first `wanted` rows of x as they are promised from tick t on, and a mask over them; the words
 * of the plan. */
static void begin_plan(const promises *a, int32_t t, int wanted, float *x, float *mask, int execute,
                       int steps) {
  int32_t *c = a->cursor;
  int committed = 0;
  for (int j = 0; j < a->H; j++) {
    const float *action = j < wanted ? promised(a, t + j) : NULL;
    if (action) {
      memcpy(x + j * a->A, action, (size_t)a->A * sizeof(float));
      committed = j + 1;
    }
    mask[j] = action ? 1.0f : 0.0f;
  }
  c[POLICY_PLAN_TICK] = t;
  c[POLICY_PLAN_STOP] = t + (int32_t)min_of(committed + execute, a->H);
  c[POLICY_PLAN_STEPS_LEFT] = steps;
}

/* The chunk of a plan is in the queue: it is in force. */
static void end_plan(int32_t *c) {
  c[POLICY_CHUNK] = c[POLICY_PLAN_TICK];
  c[POLICY_STOP] = c[POLICY_PLAN_STOP];
  c[POLICY_PLAN_STEPS_LEFT] = 0;
}

static int32_t observed_tick(const int32_t *c) {
  return c[POLICY_OBSERVED] < 0 ? 0 : c[POLICY_OBSERVED];
}

void op_flow_begin(const flow_begin_args *a, int tid, int nt) {
  if (tid > 0) return;
  int32_t t = observed_tick(a->cursor);
  promises known = {a->previous, a->queue, a->cursor, a->H, a->A};
  memcpy(a->context, a->memory, (size_t)a->M * sizeof(float));
  memcpy(a->context + a->M, a->encoded, (size_t)a->E * sizeof(float));
  float *x = a->flow, *mask = a->flow + a->H * a->A;
  normal_noise(x, a->H * a->A, a->cursor, t);
  begin_plan(&known, t, a->request[REQUEST_COMMITTED], x, mask, a->execute, a->steps);
}

void op_flow_end(const flow_end_args *a, int tid, int nt) {
  if (tid > 0) return;
  for (int i = 0; i < a->H * a->A; i++) a->queue[i] = clip(a->x[i], 1.0f);
  end_plan(a->cursor);
}

void op_chunk_begin(const chunk_begin_args *a, int tid, int nt) {
  if (tid > 0) return;
  promises known = {a->previous, a->queue, a->cursor, a->H, a->A};
  float *x = a->kept, *mask = a->kept + a->H * a->A;
  memset(x, 0, (size_t)a->H * (size_t)a->A * sizeof(float));
  begin_plan(&known, observed_tick(a->cursor), a->request[REQUEST_COMMITTED], x, mask, a->execute,
             a->steps);
}

void op_chunk_end(const chunk_end_args *a, int tid, int nt) {
  if (tid > 0) return;
  const float *mask = a->kept + a->H * a->A;
  for (int j = 0; j < a->H; j++) {
    const float *row =
        mask[j] != 0.0f ? a->kept + j * a->A : a->chunk + (int64_t)j * a->chunk_stride;
    memcpy(a->queue + j * a->A, row, (size_t)a->A * sizeof(float));
  }
  end_plan(a->cursor);
}

/* ---- flow matching over rows ---- */

void op_flow_noise(const flow_noise_args *a, int tid, int nt) {
  if (tid > 0) return;
  if (a->request[REQUEST_GIVEN]) {
    memcpy(a->x, a->given, (size_t)a->H * (size_t)a->D * sizeof(float));
  } else {
    normal_noise(a->x, a->H * a->D, a->cursor, a->cursor[POLICY_PLAN_TICK]);
  }
}

void op_guide(const guide_args *a, int tid, int nt) {
  span rows = share(a->H, tid, nt);
  for (int64_t j = rows.begin; j < rows.end; j++) {
    float weight = a->weights[j];
    if (weight == 0.0f) continue;
    for (int64_t i = j * a->D; i < (j + 1) * a->D; i++) {
      float reached = s_fma(-a->time, a->v[i], a->x[i]);
      a->v[i] = s_fma(-a->strength, (a->target[i] - reached) * weight, a->v[i]);
    }
  }
}

void op_euler(const euler_args *a, int tid, int nt) {
  span all = share((int64_t)a->H * a->D, tid, nt);
  for (int64_t i = all.begin; i < all.end; i++) a->x[i] = s_fma(a->step, a->v[i], a->x[i]);
  if (tid == 0) a->cursor[POLICY_PLAN_STEPS_LEFT] -= 1;
}

void op_ensemble(const ensemble_args *a, int tid, int nt) {
  if (tid > 0) return;
  int is_next = a->cursor[POLICY_CHUNK] == a->cursor[POLICY_PLAN_TICK] - 1;
  for (int j = 0; j < a->H; j++) {
    float *y = a->average + j * a->A;
    const float *x = a->chunk + j * a->A;
    float known = is_next && j + 1 < a->H ? a->counts[j + 1] : 0.0f;
    int is_known = known >= 1.0f && known < (float)a->H, c = is_known ? (int)known : 0;
    for (int i = 0; i < a->A; i++) {
      float before = is_known ? y[a->A + i] * a->sums[c - 1] : 0.0f;
      y[i] = is_known ? s_fma(x[i], a->weights[c], before) / a->sums[c] : x[i];
    }
    a->counts[j] = (float)(c + 1);
  }
}

/* ---- actions ---- */

void op_take_action(const take_action_args *a, int tid, int nt) {
  if (tid > 0) return;
  int32_t *c = a->cursor;
  int64_t row = (int64_t)c[POLICY_TICK] - c[POLICY_CHUNK];
  if (c[POLICY_TICK] < c[POLICY_STOP] && row >= 0 && row < a->H) {
    memcpy(a->previous, a->queue + row * a->A, (size_t)a->A * sizeof(float));
  } else {
    c[POLICY_HELD] += 1;
  }
  for (int i = 0; i < a->A; i++) a->action[i] = s_fma(a->previous[i], a->scale[i], a->offset[i]);
  c[POLICY_TICK] += 1;
}
