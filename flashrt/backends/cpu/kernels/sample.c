/* sample: the next token from one row of logits.
 *
 * IS: the arg max at temperature 0; otherwise top_k, top_p and min_p on z = (logit - largest) / temperature, then
 * Gumbel-max. The noise of a token depends on (seed, position, token) alone: Philox with the seed as key and the counter
 * (position, token / 4, 0, 0), word token % 4. Tokens are ordered by z, equals by lower id; a filter keeps a prefix of
 * that order, so it is one cut (z, id). Masses are integers: their sums do not depend on an order.
 * IS NOT: a check of logits. A NaN among them, or a largest one that is not finite when sampling, gives token -1, which
 * the host turns into an error. Called by: the launch list of a graph. V is at least 4.
 */
#include "common.h"
#include "fmath.h"

enum { BLOCK = 4 * VL, SHARE = 64 };

typedef struct {
  float value;
  int32_t id; /* -1: none */
} candidate;

typedef struct {
  uint32_t seed[2];
  int32_t top_k;
  float temperature, top_p, min_p;
} settings;

static settings settings_of(const uint32_t *words) {
  settings s;
  memcpy(&s, words, sizeof s);
  return s;
}

/* Row 1 of `work` passes candidates between threads: thread i has place i, the cut comes after the last thread's. */
static void put(const sample_args *a, int at, candidate c) { memcpy(a->work + a->V + 2 * at, &c, sizeof c); }
static candidate get(const sample_args *a, int at) {
  candidate c;
  memcpy(&c, a->work + a->V + 2 * at, sizeof c);
  return c;
}

/* The largest of what the threads found, the lowest id of equals; NaN wins over all. */
static candidate best_of(const sample_args *a, int parts) {
  candidate best = get(a, 0);
  for (int i = 1; i < parts && best.value == best.value; i++) {
    candidate c = get(a, i);
    if (c.value != c.value || best.id < 0 || (c.id >= 0 && c.value > best.value)) best = c;
  }
  return best;
}

/* The first largest of x[begin, end); a NaN when there is one. */
static candidate first_largest(const float *x, span s) {
  if (s.begin >= s.end) return (candidate){-INFINITY, -1};
  enum { WIDE = 4 };
  vf top[WIDE];
  vi strange = {};
  for (int v = 0; v < WIDE; v++) top[v] = v_set(-INFINITY);
  int64_t i = s.begin;
  for (; i + WIDE * VL <= s.end; i += WIDE * VL) {
    UNROLL for (int v = 0; v < WIDE; v++) {
      vf e = v_load(x + i + v * VL);
      strange |= e != e;
      top[v] = v_max(e, top[v]);
    }
  }
  float largest = -INFINITY;
  int any_nan = 0;
  for (int v = 0; v < WIDE; v++) {
    for (int lane = 0; lane < VL; lane++) largest = s_max(top[v][lane], largest);
  }
  for (int lane = 0; lane < VL; lane++) any_nan |= strange[lane];
  for (; i < s.end; i++) {
    any_nan |= x[i] != x[i];
    largest = s_max(x[i], largest);
  }
  if (any_nan) return (candidate){NAN, -1};
  for (i = s.begin; x[i] != largest;) i++;
  return (candidate){largest, (int32_t)i};
}

/* ---- filters ---- */

/* Probability relative to the likeliest token, in units of 2^-40. */
static uint64_t mass_of(float z) { return (uint64_t)(s_exp(z) * 0x1p40f); }

/* Order-preserving bits. */
static uint32_t key_of(float z) { return s_bits(z) >> 31 ? ~s_bits(z) : s_bits(z) | 0x80000000u; }
static float value_of(uint32_t key) { return s_from_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

static int is_kept(float z, int32_t id, candidate cut) {
  return z > cut.value || (z == cut.value && id <= cut.id);
}

/* End of the smallest prefix that weighs at least `target`, a token weighing its mass or 1: a radix select, three digits of
 * the key from the top. `target` is positive and at most the weight of all. */
static candidate prefix_of_weight(const float *z, int V, int by_mass, uint64_t target) {
  static const struct {
    int shift, bits;
  } digits[3] = {{21, 11}, {10, 11}, {0, 10}};
  uint32_t known = 0, mask = 0;
  for (int pass = 0; pass < 3; pass++) {
    uint64_t weight[1 << 11] = {0};
    uint32_t shift = (uint32_t)digits[pass].shift, last = (1u << digits[pass].bits) - 1;
    for (int i = 0; i < V; i++) {
      uint32_t key = key_of(z[i]);
      if ((key & mask) == known) weight[key >> shift & last] += by_mass ? mass_of(z[i]) : 1;
    }
    uint32_t digit = last;
    for (; digit > 0 && weight[digit] < target; digit--) target -= weight[digit];
    known |= digit << shift;
    mask |= last << shift;
  }
  float value = value_of(known);
  uint64_t one = by_mass ? mass_of(value) : 1;
  int32_t id = -1;
  for (int i = 0; i < V && target > 0; i++) {
    if (z[i] != value) continue;
    id = i;
    target -= one < target ? one : target;
  }
  return (candidate){value, id};
}

static candidate cut_of(const float *z, int V, settings s) {
  candidate cut = {-INFINITY, V};
  if (s.top_k > 0 && s.top_k < V) cut = prefix_of_weight(z, V, 0, (uint64_t)s.top_k);
  if (s.top_p < 1.0f) {
    uint64_t total = 0;
    for (int i = 0; i < V; i++) total += is_kept(z[i], i, cut) ? mass_of(z[i]) : 0;
    uint64_t target = (uint64_t)__builtin_ceil((double)s.top_p * (double)total);
    cut = prefix_of_weight(z, V, 1, target > 0 ? target : 1);
  }
  return cut;
}

/* ---- noise ---- */

/* Gumbel noise of tokens [first, first + BLOCK), first a multiple of 4. */
static void noise_of(float out[BLOCK], const uint32_t seed[2], int32_t position, int64_t first) {
  vu counter[4] = {(vu){} + (uint32_t)position, (vu){} + (uint32_t)(first / 4)};
  for (int lane = 0; lane < VL; lane++) counter[1][lane] += (uint32_t)lane;
  counter[2] = counter[3] = (vu){};
  v_philox(counter, seed[0], seed[1]);
  for (int word = 0; word < 4; word++) {
    vf noise = v_gumbel(counter[word]);
    for (int lane = 0; lane < VL; lane++) out[4 * lane + word] = noise[lane];
  }
}

/* Largest z + noise over the kept tokens of a share. Blocks that cannot win get no noise: none exceeds GUMBEL_MAX. */
static candidate noisy_largest(const float *z, span s, candidate cut, settings set, int32_t position) {
  candidate best = {-INFINITY, -1};
  for (int64_t first = s.begin; first < s.end; first += BLOCK) {
    int m = (int)min_of(BLOCK, s.end - first);
    float top = -INFINITY;
    for (int i = 0; i < m; i++) top = s_max(z[first + i], top);
    if (top < cut.value || top == -INFINITY || (best.id >= 0 && top + GUMBEL_MAX < best.value)) continue;
    float noise[BLOCK];
    noise_of(noise, set.seed, position, first);
    for (int i = 0; i < m; i++) {
      int32_t id = (int32_t)first + i;
      float score = z[id] + noise[i];
      if (z[id] == -INFINITY || !(best.id < 0 || score > best.value)) continue;
      if (is_kept(z[id], id, cut) && !(s_exp(z[id]) < set.min_p)) best = (candidate){score, id};
    }
  }
  return best;
}

/* ---- the launch ---- */

void op_sample(const sample_args *a, int tid, int nt) {
  settings set = settings_of(a->sampler);
  int parts = a->V >= 2 * (nt + 1) ? nt : 1; /* what row 1 of `work` has places for */
  span blocks = tid < parts ? share(ceil_div(a->V, SHARE), tid, parts) : (span){0, 0};
  span mine = {blocks.begin * SHARE, min_of(blocks.end * SHARE, a->V)};

  if (tid < parts) put(a, tid, first_largest(a->logits, mine));
  flashrt_barrier(nt);
  candidate best = best_of(a, parts);
  int is_greedy = !(set.temperature > 0), is_valid = best.value == best.value;
  if (!is_greedy && !(__builtin_fabsf(best.value) < INFINITY)) is_valid = 0;
  if (is_greedy || !is_valid) {
    if (tid == 0) a->cursor[2] = is_valid ? best.id : -1;
    return;
  }

  float *z = a->work;
  for (int64_t i = mine.begin; i < mine.end; i++) z[i] = (a->logits[i] - best.value) / set.temperature + 0.0f; /* no -0 */
  flashrt_barrier(nt);
  candidate cut = {-INFINITY, a->V};
  if (set.top_k > 0 || set.top_p < 1.0f) {
    if (tid == 0) put(a, parts, cut_of(z, a->V, set));
    flashrt_barrier(nt);
    cut = get(a, parts);
  }
  if (tid < parts) put(a, tid, noisy_largest(z, mine, cut, set, position_of(a->cursor)));
  flashrt_barrier(nt);
  if (tid == 0) a->cursor[2] = best_of(a, parts).id;
}
