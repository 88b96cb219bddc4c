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
//           shared memory), sample_narrow (one digit of the cut per launch, by all blocks; one
//           block alone, which takes all digits, below SHARED_FROM tokens), sample_pick (blocks).
//           What all blocks have added up, the last one to finish goes on with. Row 0 of `work`
//           takes the logits if mask, bias or penalties change them; row 1 passes `Scratch` on,
//           for which V >= 8 leaves room, and from SHARED_FROM on `Narrowed` behind it.
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

constexpr int SCAN_BLOCKS = 64;  // at most, of sample_scan and sample_pick

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
  DEVICE bool is_top_k(int V) const { return top_k > 0 && top_k < V; }
  DEVICE bool is_top_p() const { return top_p < 1.0f; }
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

// ---- what sample_narrow passes on

constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS, LEVELS = 3;  // 11, 11 and 10 bits

// Of the tokens with each digit: the sum of their masses, and how many there are.
struct Totals {
  unsigned long long mass[DIGITS];
  unsigned count[DIGITS];
};

enum Filter { DONE, TOP_K, TOP_P, BEGIN };

// Where the search for a cut is: the digits known so far, from the top of the key.
struct Narrowing {
  unsigned long long target;      // weight still wanted from tokens of these digits; 0: not known
  unsigned long long mass_above;  // of tokens with higher digits
  uint32_t known;
  int level, filter, unused;
};

struct Narrowed {
  Narrowing at;
  Totals first, rest;  // of the first digit, which top_p needs again, and of the present one
};

DEVICE bool is_shared(const sample_args& a) { return a.V >= SHARED_FROM; }
// Behind the parts of Scratch.
DEVICE Narrowed* narrowed_of(const sample_args& a) {
  return (Narrowed*)((char*)scratch_of(a) + 1024);
}
static_assert(sizeof(Scratch) + SCAN_BLOCKS * sizeof(Candidate) <= 1024, "Scratch");
static_assert(1024 + sizeof(Narrowed) + 8 <= 4 * SHARED_FROM, "Narrowed");

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
  Scratch* scratch = scratch_of(a);
  if (threadIdx.x == 0) scratch->part[blockIdx.x] = best;
  if (blockIdx.x == 0 && threadIdx.x == 0) scratch->n_finished = 0;
  if (!is_shared(a)) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) narrowed_of(a)->at.filter = BEGIN;
  if (!s.is_top_k(a.V) && !s.is_top_p()) return;
  constexpr int WORDS = 2 * sizeof(Totals) / sizeof(uint64_t);
  uint64_t* totals = (uint64_t*)&narrowed_of(a)->first;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < WORDS; i += gridDim.x * 256) totals[i] = 0;
}

// ---- filters: the cut

constexpr int CUT_THREADS = 512, CUT_WARPS = CUT_THREADS / 32, OWN_DIGITS = DIGITS / CUT_THREADS;
// A mass, up to 2^40, is added up as two numbers of 32 bits: shared memory adds those at once, and
// larger ones by trying until nobody came between. So only so many tokens at a time.
constexpr int LOW_BITS = 20;
static_assert(CHUNK < 1 << (32 - LOW_BITS), "a sum of CHUNK halves fits into 32 bits");
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

struct Work {
  Totals totals;
  unsigned low[DIGITS], high[DIGITS];  // of masses, before they go to the totals
  unsigned long long part[CUT_WARPS], above;
  Narrowing at;
  int digit;
};

DEVICE int shift_of(int level) { return max(32 - DIGIT_BITS * (level + 1), 0); }

// In every thread: the sum of the block. All threads call it.
DEVICE unsigned long long sum_of(Work& w, unsigned long long v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) w.part[threadIdx.x >> 5] = v;
  __syncthreads();
  unsigned long long sum = 0;
  for (int i = 0; i < CUT_WARPS; i++) sum += w.part[i];
  return sum;
}

DEVICE void clear(Work& w) {
  for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS) {
    w.totals.mass[i] = 0;
    w.totals.count[i] = w.low[i] = w.high[i] = 0;
  }
  __syncthreads();
}

// A token per lane; digit -1: none. Most tokens of a row have one digit: those that have that of
// the first lane go together, the others one by one.
DEVICE void add_tokens(Work& w, int digit, uint64_t mass) {
  unsigned there = __ballot_sync(FULL_WARP, digit >= 0);
  if (!there) return;
  int leader = __ffs(there) - 1, common = __shfl_sync(FULL_WARP, digit, leader);
  bool is_common = digit == common;
  unsigned n = __popc(__ballot_sync(FULL_WARP, is_common));
  unsigned low = (unsigned)mass & ((1u << LOW_BITS) - 1), high = (unsigned)(mass >> LOW_BITS);
  unsigned all_low = warp_add(is_common ? low : 0), all_high = warp_add(is_common ? high : 0);
  bool is_leader = (int)(threadIdx.x & 31) == leader;
  if (digit < 0 || (is_common && !is_leader)) return;
  atomicAdd(&w.totals.count[digit], is_leader ? n : 1);
  atomicAdd(&w.low[digit], is_leader ? all_low : low);
  atomicAdd(&w.high[digit], is_leader ? all_high : high);
}

// Tokens [first, end), at most CHUNK, that have the digits known so far: counts, low and high.
DEVICE void add_chunk(Work& w, const Row& row, int first, int end) {
  int level = w.at.level, filter = w.at.filter, shift = shift_of(level);
  uint32_t known = w.at.known, mask = level ? ~0u << (32 - DIGIT_BITS * level) : 0;
  for (int base = first; base < end; base += CUT_THREADS) {
    int i = base + threadIdx.x, digit = -1;
    uint64_t mass = 0;
    if (i < end) {
      float z = z_of(row, i);
      uint32_t key = key_of(z);
      mass = mass_of(z);
      if ((key & mask) == known && (mass || filter == TOP_K)) digit = (int)((key & ~mask) >> shift);
    }
    add_tokens(w, digit, mass);
  }
  __syncthreads();
}

DEVICE unsigned long long mass_in(const Work& w, int digit) {
  return w.low[digit] + ((unsigned long long)w.high[digit] << LOW_BITS);
}

// The highest digit at which the weight from above reaches the target: w.digit, and w.above, the
// weight of those above it. A thread owns OWN_DIGITS of them.
DEVICE void find_digit(Work& w, bool is_by_mass, unsigned long long target) {
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, highest = DIGITS - 1 - OWN_DIGITS * tid;
  unsigned long long own[OWN_DIGITS], sum = 0;
#pragma unroll
  for (int i = 0; i < OWN_DIGITS; i++) {
    own[i] = is_by_mass ? w.totals.mass[highest - i] : w.totals.count[highest - i];
    sum += own[i];
  }
  unsigned long long all = sum;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    unsigned long long before = __shfl_up_sync(FULL_WARP, sum, o);
    if (lane >= o) sum += before;
  }
  __syncthreads();
  if (lane == 31) w.part[warp] = sum;
  __syncthreads();
  unsigned long long above = sum - all;
  for (int i = 0; i < warp; i++) above += w.part[i];
  if (above < target && above + all >= target) {
    int digit = highest;
    bool is_found = false;
#pragma unroll
    for (int i = 0; i < OWN_DIGITS; i++) {
      is_found = is_found || above + own[i] >= target;
      if (!is_found) above += own[i], digit--;
    }
    w.digit = digit;
    w.above = above;
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

// The weight that top_p wants of a mass.
DEVICE unsigned long long wanted_of(float top_p, unsigned long long mass) {
  double share = ceil((double)top_p * (double)mass);
  return share > 1.0 ? (unsigned long long)share : 1;
}

// Takes the next digit of the cut from the totals: a cut ends the smallest prefix that weighs at
// least the target, a token weighing its mass or 1, and is found by a radix select. After the last
// digit: scratch->cut, and on to the next filter.
DEVICE void take_digit(Work& w, const Row& row, const Settings& s, Scratch* scratch) {
  Narrowing at = w.at;
  bool is_by_mass = at.filter == TOP_P;
  unsigned long long own = 0;
  for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS) own += w.totals.mass[i];
  if (is_by_mass && at.target == 0) at.target = wanted_of(s.top_p, sum_of(w, own));
  find_digit(w, is_by_mass, at.target);
  int digit = w.digit;
  own = 0;
  for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS) own += i > digit ? w.totals.mass[i] : 0;
  at.mass_above += sum_of(w, own);
  at.target -= w.above;
  at.known |= (uint32_t)digit << shift_of(at.level);
  at.level++;
  if (at.level == LEVELS) {
    float value = value_of(at.known);
    unsigned long long equals = w.totals.count[digit], one = is_by_mass ? mass_of(value) : 1;
    unsigned long long n = min((at.target + one - 1) / one, equals);
    int id = n < equals ? nth_of(row, value, n) : row.V - 1;
    if (threadIdx.x == 0) scratch->cut = {value, id};
    bool is_next = !is_by_mass && s.is_top_p();
    unsigned long long kept = at.mass_above + n * mass_of(value);
    at = {is_next ? wanted_of(s.top_p, kept) : 0, 0, 0, 0, is_next ? TOP_P : DONE, 0};
  }
  __syncthreads();
  if (threadIdx.x == 0) w.at = at;
  __syncthreads();
}

// The largest logit decides what is to be done; one thread of the grid writes it.
DEVICE Candidate begin_cut(const sample_args& a, const Settings& s, bool& is_chosen) {
  Scratch* scratch = scratch_of(a);
  int n_blocks = min(ceil_div(a.V, 1024), SCAN_BLOCKS);  // of sample_scan
  Candidate best =
      block_best<CUT_WARPS>((int)threadIdx.x < n_blocks ? scratch->part[threadIdx.x] : none());
  bool is_greedy = !(s.temperature > 0.0f) || best.value == INF;
  bool is_valid = best.value > -INF;  // false for NaN
  is_chosen = is_greedy || !is_valid;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    scratch->largest = is_chosen ? none() : best;  // none: the choice is made
    scratch->cut = {-INF, a.V};
    if (is_chosen) a.cursor[CURSOR_TOKEN] = is_valid ? best.id : -1;
  }
  return best;
}

KERNEL(512, 2) sample_narrow(ARGS sample_args launch) {
  OPEN_RUN(sample);
  begin();
  if (a.cursor[CURSOR_ROWS] < 1) return;
  __shared__ Work w;
  __shared__ bool is_last;
  Scratch* scratch = scratch_of(a);
  Narrowed* narrowed = narrowed_of(a);
  Settings s = settings_of(a.sampler);
  Narrowing at = {0, 0, 0, 0, BEGIN, 0};
  if (is_shared(a)) at = narrowed->at;
  if (at.filter == DONE) return;
  Candidate largest = at.filter == BEGIN ? none() : scratch->largest;
  if (at.filter == BEGIN) {
    bool is_chosen;
    largest = begin_cut(a, s, is_chosen);
    at = {0, 0, 0, 0, DONE, 0};
    if (!is_chosen && s.is_top_p()) at.filter = TOP_P;
    if (!is_chosen && s.is_top_k(a.V)) at.filter = TOP_K, at.target = (unsigned)s.top_k;
    if (at.filter == DONE) {
      if (is_shared(a) && blockIdx.x == 0 && threadIdx.x == 0) narrowed->at = at;
      return;
    }
  }
  if (threadIdx.x == 0) w.at = at;
  __syncthreads();
  Row row = {logits_of(a, s), a.V, largest.value, s.temperature};
  if (!is_shared(a)) {
    while (w.at.filter != DONE) {
      clear(w);
      for (int first = 0; first < a.V; first += CHUNK) {
        add_chunk(w, row, first, min(first + CHUNK, a.V));
        for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS) {
          w.totals.mass[i] += mass_in(w, i);
          w.low[i] = w.high[i] = 0;
        }
        __syncthreads();
      }
      take_digit(w, row, s, scratch);
    }
    return;
  }
  Totals* totals = at.level == 0 ? &narrowed->first : &narrowed->rest;
  clear(w);
  int first = blockIdx.x * CHUNK;
  add_chunk(w, row, first, min(first + CHUNK, a.V));
  for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS)
    if (w.totals.count[i]) {
      atomicAdd(&totals->count[i], w.totals.count[i]);
      atomicAdd(&totals->mass[i], mass_in(w, i));
    }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&scratch->n_finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS) {
    w.totals.mass[i] = totals->mass[i];
    w.totals.count[i] = totals->count[i];
    if (at.level > 0) totals->mass[i] = totals->count[i] = 0;
  }
  __syncthreads();
  take_digit(w, row, s, scratch);
  if (w.at.filter == TOP_P && w.at.level == 0) {  // top_k is done: the first digit is known already
    for (int i = threadIdx.x; i < DIGITS; i += CUT_THREADS)
      w.totals.mass[i] = narrowed->first.mass[i];
    __syncthreads();
    take_digit(w, row, s, scratch);
  }
  if (threadIdx.x == 0) {
    narrowed->at = w.at;
    scratch->n_finished = 0;
  }
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
  if (largest.id < 0) return;  // sample_narrow has chosen
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
