// sample.cu - the next token from one row of logits.
//
// Contract: logits changed by mask, bias and penalties; cursor.token = their arg max at temperature
//           0 (the lowest id of equals); otherwise top_k, top_p and min_p on z = (logit - largest) /
//           temperature, then Gumbel-max. The noise of a token depends on (seed, position, token)
//           alone: Philox4x32-10, key = seed, counter (position, token / 4, 0, 0), word token % 4.
//           Tokens are ordered by z, equals by lower id; a filter keeps a prefix of that order, so
//           it is one cut (z, id). A NaN among the logits, or nothing but -inf, gives token -1: the
//           host turns it into an error; +inf wins at any temperature, as in the limit. A cursor of
//           no rows is left alone.
// Shapes:   logits [1, V], sampler 16 words, bias [.., 2] of (id, float), mask [V / 32] of bits,
//           journal [1, S, 1], work [2, V], cursor.
// Order:    maxima are exact, counts and masses are integers: they do not depend on an order.
// Launch:   sample_scan (blocks, each of which owns a run of the tokens, with a counter for each in
//           shared memory), sample_cut (one block, to which all registers belong), sample_pick
//           (blocks; the last to finish compares them). Row 0 of `work` takes the logits if mask,
//           bias or penalties change them; row 1 passes `Scratch` on, for which V >= 8 leaves room.
#include "flashrt.cuh"
#include "philox.cuh"

constexpr float GUMBEL_MAX = 22.9f;  // -log(2^-33) is 22.87: no noise is larger

struct Candidate {
  float value;
  int id;  // -1: none
};

struct Scratch {
  Candidate largest, cut;
  unsigned n_finished, unused;
  Candidate part[1];  // one per block
};

struct Settings {
  uint32_t seed[2];
  int top_k;
  float temperature, top_p, min_p, repetition, presence, frequency;
  int n_bias;
  bool is_masked;

  DEVICE bool is_counting() const {
    return repetition != 1.0f || presence != 0.0f || frequency != 0.0f;
  }
  DEVICE bool is_adjusting() const { return is_masked || n_bias > 0 || is_counting(); }
};

DEVICE Settings settings_of(const uint32_t* words) {
  uint32_t repetition = words[SAMPLER_REPETITION];  // words that are all 0 are greedy
  return {{words[SAMPLER_SEED_LOW], words[SAMPLER_SEED_HIGH]},
          (int)words[SAMPLER_TOP_K],
          __uint_as_float(words[SAMPLER_TEMPERATURE]),
          __uint_as_float(words[SAMPLER_TOP_P]),
          __uint_as_float(words[SAMPLER_MIN_P]),
          repetition ? __uint_as_float(repetition) : 1.0f,
          __uint_as_float(words[SAMPLER_PRESENCE]),
          __uint_as_float(words[SAMPLER_FREQUENCY]),
          (int)words[SAMPLER_BIASES],
          words[SAMPLER_MASKED] != 0};
}

// aligned to 8
DEVICE Scratch* scratch_of(const sample_args& a) { return (Scratch*)(a.work + round_up(a.V, 2)); }
DEVICE const float* logits_of(const sample_args& a, const Settings& s) {
  return s.is_adjusting() ? a.work : a.logits;
}

// ---- candidates

DEVICE bool is_nan(float x) { return x != x; }
DEVICE Candidate none() { return {-INF, -1}; }

// The larger of two, the lower id of equals; NaN wins over all, none loses: the order of
// comparisons does not matter.
DEVICE Candidate better(Candidate a, Candidate b) {
  if (is_nan(a.value)) return a;
  if (is_nan(b.value)) return b;
  if (a.id < 0) return b;
  if (b.id < 0) return a;
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// In every thread: the best of the block.
template <int WARPS>
DEVICE Candidate block_best(Candidate c) {
  __shared__ Candidate part[WARPS];
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    float value = __shfl_xor_sync(FULL_WARP, c.value, o);
    int id = __shfl_xor_sync(FULL_WARP, c.id, o);
    c = better(c, {value, id});
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = c;
  __syncthreads();
  for (int w = 0; w < WARPS; w++) c = better(c, part[w]);
  return c;
}

// ---- mask, bias and penalties

// Tokens [first, end) of the logits into row 0 of `work`, changed by mask, bias and by how often
// each stands in the journal below the position. All threads of the block call it.
DEVICE void adjust(const sample_args& a, const Settings& s, int first, int end, int* count) {
  int position = s.is_counting() ? a.cursor[CURSOR_POSITION] : 0;
  for (int i = first + threadIdx.x; i < end; i += 256) {
    bool is_allowed = !s.is_masked || (a.mask[i >> 5] >> (i & 31) & 1);
    a.work[i] = is_allowed ? a.logits[i] : -INF;
    count[i - first] = 0;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < s.n_bias; e += 256) {  // each id once
    int id = (int)a.bias[2 * e];
    if (first <= id && id < end) a.work[id] = a.work[id] + __uint_as_float(a.bias[2 * e + 1]);
  }
  for (int p = threadIdx.x; p < position; p += 256) {
    int id = a.journal[p];
    if (first <= id && id < end) atomicAdd(&count[id - first], 1);
  }
  __syncthreads();
  for (int i = first + threadIdx.x; i < end; i += 256) {
    int n = count[i - first];
    if (n == 0) continue;
    float x = a.work[i];
    x = x > 0.0f ? x / s.repetition : x * s.repetition;
    a.work[i] = x - (s.presence + s.frequency * (float)n);
  }
}

// Up to 64 blocks: registers are not what keeps them apart.
KERNEL(256, 4) sample_scan(ARGS sample_args launch) {
  OPEN_RUN(sample);
  DYNAMIC_SHARED(int, count);
  begin();
  if (a.cursor[CURSOR_ROWS] < 1) return;
  Settings s = settings_of(a.sampler);
  int share = ceil_div(a.V, gridDim.x), first = blockIdx.x * share, end = min(first + share, a.V);
  // a thread reads below what it wrote itself
  if (s.is_adjusting()) adjust(a, s, first, end, count);
  const float* logits = logits_of(a, s);
  Candidate best = none();
#pragma unroll 4
  for (int i = first + threadIdx.x; i < end; i += 256) best = better(best, {logits[i], i});
  best = block_best<8>(best);
  if (threadIdx.x == 0) scratch_of(a)->part[blockIdx.x] = best;
}

// ---- filters: the cut

constexpr int CUT_THREADS = 1024, DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;
constexpr float MASS_UNIT = 1099511627776.0f;  // 2^40
constexpr float LEAST_MASS = -28.0f;           // below this z a mass is 0

struct Row {
  const float* logits;
  int V;
  float largest, temperature;
};

// never -0
DEVICE float z_of(const Row& row, int id) {
  return (row.logits[id] - row.largest) / row.temperature + 0.0f;
}
DEVICE uint64_t mass_of(float z) { return z < LEAST_MASS ? 0 : (uint64_t)(exp_f32(z) * MASS_UNIT); }
DEVICE bool is_kept(float z, int id, Candidate cut) {
  return z > cut.value || (z == cut.value && id <= cut.id);
}

// Bits in the order of the floats.
DEVICE uint32_t key_of(float z) {
  uint32_t bits = __float_as_uint(z);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float value_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

struct Histogram {
  unsigned long long weight[DIGITS];
  unsigned long long warp_total[CUT_THREADS / 32];
  unsigned long long target, above;  // above: the weight of higher digits than `digit`
  int digit;
};

// The highest digit at which the weight from above reaches h.target; h.above, h.digit. Thread i
// owns two digits.
DEVICE void find_digit(Histogram& h) {
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, high = DIGITS - 1 - 2 * tid;
  unsigned long long first = h.weight[high], both = first + h.weight[high - 1], sum = both;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    unsigned long long before = __shfl_up_sync(FULL_WARP, sum, o);
    if (lane >= o) sum += before;
  }
  if (lane == 31) h.warp_total[warp] = sum;
  __syncthreads();
  unsigned long long above = sum - both, target = h.target;
  for (int w = 0; w < warp; w++) above += h.warp_total[w];
  __syncthreads();
  if (above < target && above + both >= target) {
    bool is_first = above + first >= target;
    h.digit = is_first ? high : high - 1;
    h.above = is_first ? above : above + first;
  }
  __syncthreads();
}

// Id of the n-th token, from 1, whose z is `value`.
DEVICE int nth_of(const Row& row, float value, unsigned long long n) {
  __shared__ unsigned count[CUT_THREADS / 32];
  __shared__ int found;
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  unsigned long long before = 0;
  if (tid == 0) found = row.V - 1;
  for (int base = 0; base < row.V && before < n; base += CUT_THREADS) {
    bool is_equal = base + tid < row.V && z_of(row, base + tid) == value;
    unsigned votes = __ballot_sync(FULL_WARP, is_equal);
    __syncthreads();
    if (lane == 0) count[warp] = __popc(votes);
    __syncthreads();
    unsigned long long rank = before + __popc(votes & ((2u << lane) - 1));
    for (int w = 0; w < CUT_THREADS / 32; w++) {
      if (w < warp) rank += count[w];
      before += count[w];
    }
    if (is_equal && rank == n) found = base + tid;
  }
  __syncthreads();
  return found;
}

// End of the smallest prefix that weighs at least `target`, a token weighing its mass or 1: a radix
// select, three digits of the key from the top. `target` is positive and at most the weight of all.
DEVICE Candidate prefix_of_weight(Histogram& h, const Row& row, bool is_by_mass,
                                  unsigned long long target) {
  uint32_t known = 0, mask = 0;
  // 21, 10, then the last 10 bits
  for (int shift = 32 - DIGIT_BITS; shift > -DIGIT_BITS; shift -= DIGIT_BITS) {
    int at = max(shift, 0);
    uint32_t last = shift >= 0 ? DIGITS - 1 : (1u << (DIGIT_BITS + shift)) - 1;
    for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS) h.weight[i] = 0;
    if (threadIdx.x == 0) h.target = target;
    __syncthreads();
    for (int i = threadIdx.x; i < row.V; i += CUT_THREADS) {
      float z = z_of(row, i);
      uint32_t key = key_of(z);
      unsigned long long weight = is_by_mass ? mass_of(z) : 1;
      if ((key & mask) == known && weight) atomicAdd(&h.weight[key >> at & last], weight);
    }
    __syncthreads();
    find_digit(h);
    known |= (uint32_t)h.digit << at;
    mask |= last << at;
    target -= h.above;
    __syncthreads();
  }
  float value = value_of(known);
  unsigned long long one = is_by_mass ? mass_of(value) : 1;
  return {value, nth_of(row, value, one ? (target + one - 1) / one : ~0ull)};
}

DEVICE unsigned long long kept_mass(Histogram& h, const Row& row, Candidate cut) {
  if (threadIdx.x == 0) h.target = 0;
  __syncthreads();
  unsigned long long sum = 0;
  for (int i = threadIdx.x; i < row.V; i += CUT_THREADS) {
    float z = z_of(row, i);
    if (is_kept(z, i, cut)) sum += mass_of(z);
  }
  atomicAdd(&h.target, sum);
  __syncthreads();
  sum = h.target;
  __syncthreads();
  return sum;
}

KERNEL(1024, 1) sample_cut(ARGS sample_args launch) {
  OPEN_RUN(sample);
  begin();
  if (a.cursor[CURSOR_ROWS] < 1) return;
  __shared__ Histogram histogram;
  Scratch* scratch = scratch_of(a);
  Settings s = settings_of(a.sampler);
  int n_blocks = min(ceil_div(a.V, 1024), 64);  // of sample_scan
  Candidate best = (int)threadIdx.x < n_blocks ? scratch->part[threadIdx.x] : none();
  best = block_best<32>(best);
  bool is_greedy = !(s.temperature > 0.0f) || best.value == INF;
  bool is_valid = best.value > -INF;  // false for NaN
  if (threadIdx.x == 0) {
    scratch->n_finished = 0;
    scratch->largest = is_greedy || !is_valid ? none() : best;  // none: the choice is made
    if (is_greedy || !is_valid) a.cursor[CURSOR_TOKEN] = is_valid ? best.id : -1;
  }
  if (is_greedy || !is_valid) return;
  Row row = {logits_of(a, s), a.V, best.value, s.temperature};
  Candidate cut = {-INF, a.V};
  if (s.top_k > 0 && s.top_k < a.V)
    cut = prefix_of_weight(histogram, row, false, (unsigned long long)s.top_k);
  if (s.top_p < 1.0f) {
    double share = ceil((double)s.top_p * (double)kept_mass(histogram, row, cut));
    cut = prefix_of_weight(histogram, row, true, share > 1.0 ? (unsigned long long)share : 1);
  }
  if (threadIdx.x == 0) scratch->cut = cut;
}

// ---- noise

// Standard Gumbel noise -log(-log(1 - v)) of uniform v. The noise that can win comes from small v,
// where float is finest.
DEVICE float gumbel(uint32_t word) {
  float v = uniform(word), u = 1.0f - v, log_u = log_f32(u) + (-v - (u - 1.0f)) / u;
  return -log_f32(-log_u);
}

KERNEL(256) sample_pick(ARGS sample_args launch) {
  OPEN_RUN(sample);
  begin();
  __shared__ bool is_last;
  if (a.cursor[CURSOR_ROWS] < 1) return;
  Scratch* scratch = scratch_of(a);
  Settings s = settings_of(a.sampler);
  Candidate largest = scratch->largest;
  if (largest.id < 0) return;  // sample_cut has chosen
  bool is_cut = s.top_k > 0 || s.top_p < 1.0f;
  Candidate cut = is_cut ? scratch->cut : Candidate{-INF, a.V};
  Row row = {logits_of(a, s), a.V, largest.value, s.temperature};
  Candidate best = none();
  for (int first = 4 * (blockIdx.x * 256 + threadIdx.x); first < a.V;
       first += 4 * gridDim.x * 256) {
    float z[4], top = -INF;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      z[i] = first + i < a.V ? z_of(row, first + i) : -INF;
      bool is_in = z[i] > -INF && is_kept(z[i], first + i, cut) && !(exp_f32(z[i]) < s.min_p);
      if (!is_in) z[i] = -INF;
      top = fmaxf(top, z[i]);
    }
    if (top == -INF || (best.id >= 0 && top + GUMBEL_MAX < best.value)) continue;
    uint32_t words[4] = {(uint32_t)a.cursor[CURSOR_POSITION], (uint32_t)(first / 4), 0, 0};
    philox(words, s.seed[0], s.seed[1]);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (z[i] > -INF) best = better(best, {z[i] + gumbel(words[i]), first + i});
  }
  best = block_best<8>(best);
  if (threadIdx.x == 0) {
    scratch->part[blockIdx.x] = best;
    __threadfence();
    is_last = atomicAdd(&scratch->n_finished, 1u) == gridDim.x - 1;
    // what it read comes after the counter; the barrier passes this on to the block
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  best = block_best<8>(threadIdx.x < gridDim.x ? scratch->part[threadIdx.x] : none());
  if (threadIdx.x == 0) a.cursor[CURSOR_TOKEN] = best.id;
}
