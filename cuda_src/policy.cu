// policy.cu - observe, see, gru_cell, flow_begin, flow_end, chunk_begin, chunk_end, ensemble, flow_noise,
// guide, euler, take_action: a policy's steps between its layers.
//
// Contract: observe:     x = [clip((observation - mean) / std, -10, 10) | previous];
//                        cursor.observed = cursor.tick.
//           gru_cell:    r, z = sigmoid(u + v), n = tanh(u + r v), each of its third; memory = (1 -
//                        z) n + z memory.
//           flow_begin:  context = [memory | encoded]; flow = [x | mask]: in the first `committed`
//                        rows j, mask 1 and x the promised action of tick observed + j; in the
//                        others mask 0 and x noise; the plan's words.
//           flow_end:    queue = clip(x, -1, 1), NaN stays NaN; cursor.chunk, .stop = those of the
//                        plan.
//           see:         cursor.observed = cursor.tick.
//           chunk_begin: kept = [x | mask] as flow_begin's flow, with 0 in place of noise.
//           chunk_end:   queue = x where mask is 1, chunk elsewhere; the words as flow_end.
//           ensemble:    average = chunk and the rows of average before it, weighed: see ops/policy.
//           flow_noise:  x = given where the request says so, else noise of the plan's tick.
//           guide:       v -= strength weights[j] (target - (x - time v)) where the weight is not 0.
//           euler:       x += step v; cursor.plan_steps_left -= 1.
//           take_action: previous = the queue's row for cursor.tick, or as it is; action = previous
//                        scale + offset; cursor.tick += 1.
// Shapes:   observation, mean, std [O], previous, scale, offset, action [A], u, v [3 M], memory
//           [M], encoded [E], queue, chunk, average [H, A], weights, sums, counts [H], context [M + E], flow, kept [H A + H], float;
//           cursor, request [16] int, see ops/cursor.py.
// Order:    no sums. Noise: Box and Muller on Philox, key = seed, counter (i / 4, tick, 0, 0):
//           number i of a plan depends on (seed, tick, i) alone.
//           x, v, target, given [H, D], weights [H].
// Launch:   one block, but for gru_cell: what writes the cursor does so after a barrier.
#include "flashrt.cuh"
#include "philox.cuh"

constexpr int THREADS = 128;

DEVICE float clip(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }
DEVICE float tanh_f32(float x) { return 1.0f - 2.0f / (1.0f + exp_f32(2.0f * x)); }

DEVICE void copy(float* target, const float* source, int n) {
  for (int i = threadIdx.x; i < n; i += THREADS) target[i] = source[i];
}

KERNEL(THREADS, 1) observe(ARGS observe_args launch) {
  OPEN_RUN(observe);
  begin();
  for (int i = threadIdx.x; i < a.O; i += THREADS)
    a.x[i] = clip((a.observation[i] - a.mean[i]) / a.std[i], 10.0f);
  copy(a.x + a.O, a.previous, a.A);
  if (threadIdx.x == 0) a.cursor[POLICY_OBSERVED] = a.cursor[POLICY_TICK];
}

KERNEL(THREADS) gru_cell(ARGS gru_cell_args launch) {
  OPEN_RUN(gru_cell);
  begin();
  int i = blockIdx.x * THREADS + threadIdx.x, M = a.M;
  if (i >= M) return;
  float r = sigmoid(a.u[i] + a.v[i]), z = sigmoid(a.u[M + i] + a.v[M + i]);
  float n = tanh_f32(a.u[2 * M + i] + r * a.v[2 * M + i]);
  a.memory[i] = (1.0f - z) * n + z * a.memory[i];
}

// The action that tick t was promised, or null.
template <typename Args>
DEVICE const float* promised(const Args& a, int t) {
  int tick = a.cursor[POLICY_TICK], row = t - a.cursor[POLICY_CHUNK];
  if (t < tick) return t == tick - 1 ? a.previous : nullptr;
  return t < a.cursor[POLICY_STOP] && row >= 0 && row < a.H ? a.queue + (size_t)row * a.A : nullptr;
}

// Number i of the noise of tick t.
DEVICE float normal(const int32_t* cursor, int t, int i) {
  uint32_t words[4] = {(uint32_t)i / 4, (uint32_t)t, 0, 0};
  philox(words, (uint32_t)cursor[POLICY_SEED_LOW], (uint32_t)cursor[POLICY_SEED_HIGH]);
  bool is_second_pair = i & 2;
  float radius = sqrtf(-2.0f * log_f32(uniform(is_second_pair ? words[2] : words[0])));
  float sine, cosine;
  sincos_f32(6.28318530717958648f * uniform(is_second_pair ? words[3] : words[1]), sine, cosine);
  return radius * (i & 1 ? sine : cosine);
}

// The mask over the rows of a chunk from tick t on that keep their promise, and the words of its
// plan. All threads of the block call it; each writes the mask of its own rows.
template <typename Args>
DEVICE void begin_plan(const Args& a, int t, float* mask) {
  int wanted = a.request[REQUEST_COMMITTED];
  for (int j = threadIdx.x; j < a.H; j += THREADS)
    mask[j] = j < wanted && promised(a, t + j) ? 1.0f : 0.0f;
  __syncthreads();
  if (threadIdx.x > 0) return;
  int committed = 0;
  for (int j = 0; j < a.H; j++)
    if (mask[j] != 0.0f) committed = j + 1;
  a.cursor[POLICY_PLAN_TICK] = t;
  a.cursor[POLICY_PLAN_STOP] = t + min(committed + a.execute, a.H);
  a.cursor[POLICY_PLAN_STEPS_LEFT] = a.steps;
}

// The chunk of a plan is in the queue: it is in force.
DEVICE void end_plan(int32_t* cursor) {
  if (threadIdx.x > 0) return;
  cursor[POLICY_CHUNK] = cursor[POLICY_PLAN_TICK];
  cursor[POLICY_STOP] = cursor[POLICY_PLAN_STOP];
  cursor[POLICY_PLAN_STEPS_LEFT] = 0;
}

KERNEL(THREADS, 1) flow_begin(ARGS flow_begin_args launch) {
  OPEN_RUN(flow_begin);
  begin();
  int t = max(a.cursor[POLICY_OBSERVED], 0), wanted = a.request[REQUEST_COMMITTED],
      size = a.H * a.A;
  copy(a.context, a.memory, a.M);
  copy(a.context + a.M, a.encoded, a.E);
  for (int i = threadIdx.x; i < size; i += THREADS) {
    int j = i / a.A;
    const float* action = j < wanted ? promised(a, t + j) : nullptr;
    a.flow[i] = action ? action[i % a.A] : normal(a.cursor, t, i);
  }
  begin_plan(a, t, a.flow + size);
}

KERNEL(THREADS, 1) flow_end(ARGS flow_end_args launch) {
  OPEN_RUN(flow_end);
  begin();
  for (int i = threadIdx.x; i < a.H * a.A; i += THREADS) a.queue[i] = clip(a.x[i], 1.0f);
  end_plan(a.cursor);
}

KERNEL(THREADS, 1) see(ARGS see_args launch) {
  OPEN_RUN(see);
  begin();
  if (threadIdx.x == 0) a.cursor[POLICY_OBSERVED] = a.cursor[POLICY_TICK];
}

KERNEL(THREADS, 1) chunk_begin(ARGS chunk_begin_args launch) {
  OPEN_RUN(chunk_begin);
  begin();
  int t = max(a.cursor[POLICY_OBSERVED], 0), wanted = a.request[REQUEST_COMMITTED],
      size = a.H * a.A;
  for (int i = threadIdx.x; i < size; i += THREADS) {
    int j = i / a.A;
    const float* action = j < wanted ? promised(a, t + j) : nullptr;
    a.kept[i] = action ? action[i % a.A] : 0.0f;
  }
  begin_plan(a, t, a.kept + size);
}

KERNEL(THREADS, 1) chunk_end(ARGS chunk_end_args launch) {
  OPEN_RUN(chunk_end);
  begin();
  int size = a.H * a.A;
  for (int i = threadIdx.x; i < size; i += THREADS)
    a.queue[i] = a.kept[size + i / a.A] != 0.0f
                     ? a.kept[i]
                     : a.chunk[(size_t)(i / a.A) * a.chunk_stride + i % a.A];
  end_plan(a.cursor);
}

KERNEL(THREADS, 1) flow_noise(ARGS flow_noise_args launch) {
  OPEN_RUN(flow_noise);
  begin();
  bool is_given = a.request[REQUEST_GIVEN] != 0;
  for (int i = threadIdx.x; i < a.H * a.D; i += THREADS)
    a.x[i] = is_given ? a.given[i] : normal(a.cursor, a.cursor[POLICY_PLAN_TICK], i);
}

KERNEL(THREADS, 1) guide(ARGS guide_args launch) {
  OPEN_RUN(guide);
  begin();
  for (int i = threadIdx.x; i < a.H * a.D; i += THREADS) {
    float weight = a.weights[i / a.D];
    if (weight == 0.0f) continue;
    float reached = fmaf(-a.time, a.v[i], a.x[i]);
    a.v[i] = fmaf(-a.strength, (a.target[i] - reached) * weight, a.v[i]);
  }
}

KERNEL(THREADS, 1) euler(ARGS euler_args launch) {
  OPEN_RUN(euler);
  begin();
  for (int i = threadIdx.x; i < a.H * a.D; i += THREADS) a.x[i] = fmaf(a.step, a.v[i], a.x[i]);
  if (threadIdx.x == 0) a.cursor[POLICY_PLAN_STEPS_LEFT] -= 1;
}

KERNEL(THREADS, 1) ensemble(ARGS ensemble_args launch) {
  OPEN_RUN(ensemble);
  begin();
  bool is_next = a.cursor[POLICY_CHUNK] == a.cursor[POLICY_PLAN_TICK] - 1;
  // Chunks that row j + 1 is of so far, 0 where there are none to go on from.
  auto known = [&](int j) {
    float count = is_next && j + 1 < a.H ? a.counts[j + 1] : 0.0f;
    return count >= 1.0f && count < (float)a.H ? (int)count : 0;
  };
  for (int i = threadIdx.x; i < a.A;
       i += THREADS) {  // a thread has a column: row j is read after j - 1
    for (int j = 0; j < a.H; j++) {
      int c = known(j);
      float x = a.chunk[(size_t)j * a.A + i];
      if (c) {
        float before = a.average[(size_t)(j + 1) * a.A + i] * a.sums[c - 1];
        x = fmaf(x, a.weights[c], before) / a.sums[c];
      }
      a.average[(size_t)j * a.A + i] = x;
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int j = 0; j < a.H; j++) a.counts[j] = (float)(known(j) + 1);
}

KERNEL(THREADS, 1) take_action(ARGS take_action_args launch) {
  OPEN_RUN(take_action);
  begin();
  int tick = a.cursor[POLICY_TICK], row = tick - a.cursor[POLICY_CHUNK];
  bool has_action = tick < a.cursor[POLICY_STOP] && row >= 0 && row < a.H;
  for (int i = threadIdx.x; i < a.A; i += THREADS) {
    float action = has_action ? a.queue[(size_t)row * a.A + i] : a.previous[i];
    a.previous[i] = action;
    a.action[i] = fmaf(action, a.scale[i], a.offset[i]);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  if (!has_action) a.cursor[POLICY_HELD] += 1;
  a.cursor[POLICY_TICK] = tick + 1;
}
