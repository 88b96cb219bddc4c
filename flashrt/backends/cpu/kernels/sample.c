/* sample: the next token from one row of logits.
 *
 * IS: logits with mask, bias and penalties (ops/sample.py), then the arg max at temperature 0; otherwise
 * top_k, top_p and min_p on z = (logit - largest) / temperature, then Gumbel-max. The noise of a
 * token depends on (seed, position, token) alone: Philox with the seed as key and the counter
 * (position, token / 4, 0, 0), word token % 4. Tokens are ordered by z, equals by lower id; a
 * filter keeps a prefix of that order, so it is one cut (z, id). Masses are integers: their sums do
 * not depend on an order.
 * IS NOT: a check of logits. A NaN among them, or nothing but -inf, gives token -1, which the host
 * turns into an error; +inf wins at any temperature, as in the limit. V is at least 4.
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
  float temperature, top_p, min_p, repetition, presence, frequency;
  int32_t n_bias, is_masked;
} settings;

static settings settings_of(const uint32_t *words) {
  settings s = {
      .seed = {words[SAMPLER_SEED_LOW], words[SAMPLER_SEED_HIGH]},
      .top_k = (int32_t)words[SAMPLER_TOP_K],
      .temperature = s_from_bits(words[SAMPLER_TEMPERATURE]),
      .top_p = s_from_bits(words[SAMPLER_TOP_P]),
      .min_p = s_from_bits(words[SAMPLER_MIN_P]),
      .repetition = s_from_bits(words[SAMPLER_REPETITION]),
      .presence = s_from_bits(words[SAMPLER_PRESENCE]),
      .frequency = s_from_bits(words[SAMPLER_FREQUENCY]),
      .n_bias = (int32_t)words[SAMPLER_BIASES],
      .is_masked = words[SAMPLER_MASKED] != 0,
  };
  if (s.repetition == 0) s.repetition = 1; /* words that are all 0 are greedy */
  return s;
}

/* Row 1 of `work` passes candidates between threads: thread i has place i, the cut comes after
 * the last thread's. */
static void put(const sample_args *a, int at, candidate c) {
  memcpy(a->work + a->V + 2 * at, &c, sizeof c);
}
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

/* z[i, i + VL), NaN from V on. */
INLINE vf block_of(const float *z, int i, int V) {
  if (i + VL <= V) return v_load(z + i);
  float padded[VL];
  for (int lane = 0; lane < VL; lane++) padded[lane] = i + lane < V ? z[i + lane] : NAN;
  return v_load(padded);
}

/* Probability relative to the likeliest token, in units of 2^-40. */
#define MASS_ONE 0x1p40f
INLINE uint64_t mass_of(float probability) { return (uint64_t)(int64_t)(probability * MASS_ONE); }

/* Order-preserving bits. */
INLINE uint32_t key_of(float z) { return s_bits(z) >> 31 ? ~s_bits(z) : s_bits(z) | 0x80000000u; }
INLINE float value_of(uint32_t key) { return s_from_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

INLINE int is_kept(float z, int32_t id, candidate cut) {
  return z > cut.value || (z == cut.value && id <= cut.id);
}

/* Adds to weight[digit] what the tokens with z in [low, high] weigh: their mass, or 1. */
static void weigh(uint64_t *weight, const float *z, int V, int by_mass, float low, float high,
                  uint32_t shift, uint32_t last) {
  for (int i = 0; i < V; i += VL) {
    vf e = block_of(z, i, V);
    vi inside = (e >= low) & (e <= high);
    if (!v_any(inside)) continue;
    vf p = by_mass ? v_exp(e) : v_set(1.0f / MASS_ONE);
    for (int lane = 0; lane < VL; lane++) {
      if (inside[lane]) weight[key_of(e[lane]) >> shift & last] += mass_of(p[lane]);
    }
  }
}

/* Mass of the tokens that a cut keeps. */
static uint64_t mass_kept(const float *z, int V, candidate cut) {
  uint64_t total = 0;
  for (int i = 0; i < V; i += VL) {
    vf e = block_of(z, i, V);
    if (!v_any(e >= cut.value)) continue;
    vf p = v_exp(e);
    for (int lane = 0; lane < VL; lane++)
      total += is_kept(e[lane], i + lane, cut) ? mass_of(p[lane]) : 0;
  }
  return total;
}

/* What a prefix has to weigh, given the weights of the first digit. */
static uint64_t target_of(const float *z, int V, settings set, int by_mass, candidate within,
                          const uint64_t *weight, uint32_t last) {
  if (!by_mass) return (uint64_t)set.top_k;
  uint64_t total = 0;
  for (uint32_t digit = 0; digit <= last; digit++) total += weight[digit];
  /* not all equals of the last token are within */
  if (within.value > -INFINITY) total = mass_kept(z, V, within);
  uint64_t target = (uint64_t)__builtin_ceil((double)set.top_p * (double)total);
  return target > 0 ? target : 1;
}

/* End of the smallest prefix of `within` that holds top_k tokens, or weighs at least top_p of its
 * mass: a radix select, three digits of the key from the top. */
static candidate prefix_of(const float *z, int V, settings set, int by_mass, candidate within) {
  static const struct {
    uint32_t shift, last;
  } digits[3] = {{21, (1 << 11) - 1}, {10, (1 << 11) - 1}, {0, (1 << 10) - 1}};
  uint32_t known = 0;
  uint64_t target = 0;
  float low = within.value, high = INFINITY; /* the tokens whose key begins as `known` does */
  for (int pass = 0; pass < 3; pass++) {
    uint64_t weight[1 << 11] = {0};
    uint32_t shift = digits[pass].shift, digit = digits[pass].last;
    weigh(weight, z, V, by_mass, low, high, shift, digit);
    if (pass == 0) target = target_of(z, V, set, by_mass, within, weight, digit);
    for (; digit > 0 && weight[digit] < target; digit--) target -= weight[digit];
    known |= digit << shift;
    /* keys beyond those of infinities are NaN: nothing has them */
    low = s_max(value_of(known), -INFINITY);
    high = s_max(value_of(known | ((1u << shift) - 1)), low);
  }
  uint64_t one = by_mass ? mass_of(s_exp(low)) : 1;
  int32_t id = -1;
  for (int i = 0; i < V && target > 0; i++) {
    if (z[i] != low) continue;
    id = i;
    target -= one < target ? one : target;
  }
  return (candidate){low, id};
}

static candidate cut_of(const float *z, int V, settings set) {
  candidate cut = {-INFINITY, V};
  if (set.top_k > 0 && set.top_k < V) cut = prefix_of(z, V, set, 0, cut);
  if (set.top_p < 1.0f) cut = prefix_of(z, V, set, 1, cut);
  return cut;
}

/* ---- noise ---- */

/* Uniform numbers of tokens [first, first + BLOCK), first a multiple of 4: number `word` of lane
 * `lane` is for token first + 4 * lane + word. */
INLINE void uniform_of(vf v[4], const uint32_t seed[2], int32_t position, int64_t first) {
  static const uint32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vu words[4] = {(vu){} + (uint32_t)position, v_load_words(lanes) + (uint32_t)(first / 4), (vu){},
                 (vu){}};
  v_philox(words, seed[0], seed[1]);
  UNROLL for (int word = 0; word < 4; word++) v[word] = v_uniform(words[word]);
}

/* The better of `best` and the kept tokens of a block; those that min_p drops are not kept. */
static candidate better_of_block(candidate best, const float *z, int64_t first, int m,
                                 const vf v[4], candidate cut, float min_p) {
  float noise[4][VL];
  for (int word = 0; word < 4; word++) v_store(noise[word], v_gumbel(v[word]));
  for (int i = 0; i < m; i++) {
    int32_t id = (int32_t)first + i;
    float score = z[id] + noise[i % 4][i / 4];
    if (z[id] == -INFINITY || !(best.id < 0 || score > best.value)) continue;
    if (is_kept(z[id], id, cut) && !(s_exp(z[id]) < min_p)) best = (candidate){score, id};
  }
  return best;
}

/* Largest of m numbers, up to BLOCK. */
static float largest_of_block(const float *z, int m) {
  float top = -INFINITY;
  if (m < BLOCK) {
    for (int i = 0; i < m; i++) top = s_max(z[i], top);
    return top;
  }
  vf wide = v_max(v_max(v_load(z), v_load(z + VL)), v_max(v_load(z + 2 * VL), v_load(z + 3 * VL)));
  UNROLL for (int lane = 0; lane < VL; lane++) top = s_max(wide[lane], top);
  return top;
}

/* Largest z + noise over the kept tokens of a share.
 *
 * Most tokens are far too unlikely to win, and need no logarithm: noise is below -log v, so z +
 * noise > best needs v < exp(z - best). Twice that is asked for, which rounding cannot reach. */
static candidate noisy_largest(const float *z, span s, candidate cut, settings set,
                               int32_t position) {
  candidate best = {-INFINITY, -1};
  for (int64_t first = s.begin; first < s.end; first += BLOCK) {
    int m = (int)min_of(BLOCK, s.end - first);
    float top = largest_of_block(z + first, m);
    if (top < cut.value || top == -INFINITY) continue;
    vf v[4];
    uniform_of(v, set.seed, position, first);
    float limit = best.id < 0 ? INFINITY : 2.0f * s_exp(top - best.value);
    if (!v_any((v[0] < limit) | (v[1] < limit) | (v[2] < limit) | (v[3] < limit))) continue;
    best = better_of_block(best, z, first, m, v, cut, set.min_p);
  }
  return best;
}

/* ---- mask, bias and penalties ---- */

static int is_counting(settings set) {
  return set.repetition != 1 || set.presence != 0 || set.frequency != 0;
}
static int is_adjusting(settings set) {
  return set.is_masked || set.n_bias > 0 || is_counting(set);
}

/* x becomes the logits of a share, -inf where the mask has no bit. A share begins with a word. */
static void masked_copy(float *x, const float *logits, const uint32_t *mask, span mine) {
  for (int64_t first = mine.begin; first < mine.end; first += 32) {
    uint32_t word = mask[first / 32];
    int64_t end = min_of(first + 32, mine.end);
    for (int64_t i = first; i < end; i++) x[i] = word >> (i - first) & 1 ? logits[i] : -INFINITY;
  }
}

/* A share of the logits into row 0 of `work`; row 1 counts tokens of the journal meanwhile. */
static void adjust(const sample_args *a, settings set, span mine) {
  float *x = a->work, *count = a->work + a->V;
  if (set.is_masked) {
    masked_copy(x, a->logits, a->mask, mine);
  } else {
    for (int64_t i = mine.begin; i < mine.end; i++) x[i] = a->logits[i];
  }
  for (int e = 0; e < set.n_bias; e++) {
    int64_t id = a->bias[2 * e];
    if (mine.begin <= id && id < mine.end) x[id] += s_from_bits(a->bias[2 * e + 1]);
  }
  if (!is_counting(set)) return;
  for (int64_t i = mine.begin; i < mine.end; i++) count[i] = 0;
  for (int64_t position = 0; position < position_of(a->cursor); position++) {
    int64_t id = a->journal[position];
    if (mine.begin <= id && id < mine.end) count[id] += 1;
  }
  for (int64_t i = mine.begin; i < mine.end; i++) {
    if (count[i] == 0) continue;
    x[i] = x[i] > 0 ? x[i] / set.repetition : x[i] * set.repetition;
    x[i] -= set.presence + set.frequency * count[i];
  }
}

/* ---- the launch ---- */

void op_sample(const sample_args *a, int tid, int nt) {
  settings set = settings_of(a->sampler);
  if (rows_of(a->cursor, 1) < 1) return;
  int parts = a->V >= 2 * (nt + 1) ? nt : 1; /* what row 1 of `work` has places for */
  span blocks = tid < parts ? share(ceil_div(a->V, SHARE), tid, parts) : (span){0, 0};
  span mine = {blocks.begin * SHARE, min_of(blocks.end * SHARE, a->V)};

  const float *logits = a->logits;
  if (is_adjusting(set)) {
    adjust(a, set, mine);
    flashrt_barrier(nt); /* counts have been read before row 1 is written again */
    logits = a->work;
  }
  if (tid < parts) put(a, tid, first_largest(logits, mine));
  flashrt_barrier(nt);
  candidate best = best_of(a, parts);
  /* false for NaN */
  int is_greedy = !(set.temperature > 0) || best.value == INFINITY,
      is_valid = best.value > -INFINITY;
  if (is_greedy || !is_valid) {
    if (tid == 0) a->cursor[CURSOR_TOKEN] = is_valid ? best.id : -1;
    return;
  }

  float *z = a->work;
  /* no -0 */
  for (int64_t i = mine.begin; i < mine.end; i++)
    z[i] = (logits[i] - best.value) / set.temperature + 0.0f;
  flashrt_barrier(nt);
  candidate cut = {-INFINITY, a->V};
  if (set.top_k > 0 || set.top_p < 1.0f) {
    if (tid == 0) put(a, parts, cut_of(z, a->V, set));
    flashrt_barrier(nt);
    cut = get(a, parts);
  }
  if (tid < parts) put(a, tid, noisy_largest(z, mine, cut, set, position_of(a->cursor)));
  flashrt_barrier(nt);
  if (tid == 0) a->cursor[CURSOR_TOKEN] = best_of(a, parts).id;
}
