// attention.cuh - one block of 256 keys for the queries of one key head: scores, softmax, weighted
// values.
//
// Shared by attention_few (blocks of keys side by side, merged afterwards) and attention_many (one
// after the other), so that a query's bits are the same in both, alone or in company.
//
// Columns of mma are queries: column c is row first_row + c / GROUP, query head c % GROUP of the
// key head. Keys are the 16-row operand of the scores, value columns that of the weighted sum.
// Which key or column a row of mma stands for is free, so lanes take what lies together, from
// memory straight into registers or by way of shared memory (attention_many):
//   scores:  warp w has keys 32 w .. 32 w + 31; lane 4g + t loads 8 consecutive dims of keys 4g ..
//            4g + 3.
//   values:  warp w has dims 32 w .. 32 w + 31; lane 4g + t loads 4 consecutive dims of keys 8t ..
//            8t + 7 of 32.
//
// Canonical order. A score: ascending dims, 16 per mma; then times 1 / sqrt(D), and times the key's
// scale where keys are codes; a weight of a value that is codes is rounded after times its scale. Maximum of the
// block: exact. Sum of the block: keys 4g .. 4g + 3 as (p0 + p1) + (p2 + p3), over g by pairs 1, 2,
// 4 apart, over warps in order. Weighted sum: ascending keys, 16 per mma. Within each mma step: hi
// times hi; key or value hi times lo of the pair; lo of a float cache times hi. Blocks are merged
// in ascending order by `merge_factors`.
//
// Cache rows below SHIFT, and at or beyond position + rows, are not read (they may be NaN); weights
// of hidden keys are selected to be 0. A value that is not finite reaches the rows that see it and
// no others, though 0 times it is NaN: see weigh_values. A row below SHIFT sees no key: its result
// is 0.
#pragma once

constexpr int BLOCK_KEYS = ATTENTION_BLOCK, WARPS = 8, THREADS = 32 * WARPS,
              COLUMNS = 8 * COLUMN_TILES;
constexpr int BLOCK_ROWS = COLUMNS / GROUP;  // rows of queries per block
constexpr int DIM_GROUPS = ceil_div(HEAD_DIM, 32);
constexpr int Q_VECTORS = round_up(HEAD_DIM, 64) / 8;  // uint4 per column
constexpr int P_VECTORS = BLOCK_KEYS / 8;
constexpr int PARTS = ACT_PARTS;  // hi, lo

#if CACHE_CODES
#include "codes.cuh"
typedef uint8_t cache_t;
#elif CACHE_F32
typedef float cache_t;
#else
typedef uint16_t cache_t;
#endif

struct Columns {
  // x: the maximum of the block; once that is merged, what multiplies the sums before it and the
  // block's; x < 0: the block is hidden
  float2 factor[COLUMNS];
  float max[COLUMNS], sum[COLUMNS];
  float of_warp[WARPS][COLUMNS];  // maxima, then sums

  DEVICE float& block_max(int column) { return factor[column].x; }
};

struct Shared {
  uint4 q[PARTS][COLUMNS][Q_VECTORS];
  uint4 p[PARTS][COLUMNS][P_VECTORS];
  Columns columns;
};

// Where vector v of a column lies: 8 lanes of a 16-byte access (2 columns, 4 vectors) and of an
// 8-byte one (4 even columns, 2 vectors) meet different banks.
DEVICE int swizzle(int column, int v) { return v ^ ((column & 6) ^ (column & 1) << 2); }

// Which keys rows see: see ops/attention.py.
#ifndef SEES
#define SEES SEEN_PAST
#endif

// Whether a row of the cache is a key at all.
DEVICE bool is_key(int row) { return SHIFT == 0 || row >= SHIFT; }

struct Queries {
  int first_row, rows, position;  // rows: valid rows of the launch

  DEVICE int row(int column) const { return first_row + column / GROUP; }
  DEVICE bool is_query(int column) const {
    return column < BLOCK_ROWS * GROUP && row(column) < rows;
  }
  // The last key that a column sees; -1 for columns without a query, or without a key.
  DEVICE int last_key(int column) const {
    if (!is_query(column)) return -1;
    return SEES == SEEN_PAST ? position + row(column) : limit() - 1;
  }
  // is_query, in the form that compilers need no more registers for: where rows see the past, each
  // query has a last key.
  DEVICE bool has_query(int column) const {
    return SEES == SEEN_PAST ? last_key(column) >= 0 : is_query(column);
  }
  // No row of the launch sees the keys from here on.
  DEVICE int limit() const { return position + (SEES == SEEN_BEFORE ? 0 : rows); }
  // Every column sees the keys below `common`, and none sees those from `end` on.
  DEVICE int common() const { return SEES == SEEN_PAST ? position + first_row + 1 : limit(); }
  DEVICE int end() const {
    return SEES == SEEN_PAST ? position + min(first_row + BLOCK_ROWS, rows) : limit();
  }
  // Whether a column sees a key of the block that begins at `first_key`, which is not all below
  // SHIFT.
  DEVICE bool sees(int column, int first_key) const {
    int last = last_key(column);
    return last >= first_key && is_key(last);
  }
};

// The launch, moved to the block's run: after a barrier, so that the pointers of what comes later do
// not wait in registers.
DEVICE attention_args moved(const attention_args& launch) {
  attention_args a = launch;
  attention_enter_run(&a, blockIdx.z);
  return a;
}

// ---- queries

DEVICE void load_queries(Shared& s, const attention_args& a, const Queries& queries, int key_head) {
  for (int i = threadIdx.x; i < COLUMNS * Q_VECTORS; i += THREADS) {
    int c = i / Q_VECTORS, v = i % Q_VECTORS;
    float x[8] = {};
    if (queries.has_query(c) && 8 * v < HEAD_DIM) {
      const float* q =
          a.q + ((size_t)queries.row(c) * a.Nq + key_head * GROUP + c % GROUP) * HEAD_DIM + 8 * v;
      float4 first = reinterpret_cast<const float4*>(q)[0],
             second = reinterpret_cast<const float4*>(q)[1];
      x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
      x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
    }
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int k = 0; k < 4; k++) bf16_split(x[2 * k], x[2 * k + 1], hi[k], lo[k]);
    s.q[0][c][swizzle(c, v)] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    if (ACT_PARTS > 1) s.q[PARTS - 1][c][swizzle(c, v)] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
  }
}

// ---- operands from the caches

// 8 dims of a key, as two steps of mma want them
struct KeyVector {
#if CACHE_CODES
  uint2 codes;
#elif CACHE_F32
  float4 first, second;
#else
  uint4 bits;
#endif
};

DEVICE KeyVector load_key(const cache_t* keys, int key, int dim, int limit) {
  bool is_in = key < limit && is_key(key) && dim < HEAD_DIM;
  const cache_t* p = keys + (size_t)(is_in ? key : 0) * HEAD_DIM + dim;
#if CACHE_CODES
  constexpr uint2 zero = {0, 0};
  return {is_in ? *reinterpret_cast<const uint2*>(p) : zero};
#elif CACHE_F32
  constexpr float4 zero = {0, 0, 0, 0};
  const float4* v = reinterpret_cast<const float4*>(p);
  return {is_in ? v[0] : zero, is_in ? v[1] : zero};
#else
  constexpr uint4 zero = {0, 0, 0, 0};
  return {is_in ? *reinterpret_cast<const uint4*>(p) : zero};
#endif
}

// The registers of a key for the parts of the cache: hi, and lo of floats.
DEVICE void unpack_key(const KeyVector& v, uint4& hi, uint4& lo) {
#if CACHE_CODES
  hi = make_uint4(code_pair(v.codes.x, 0), code_pair(v.codes.x, 1), code_pair(v.codes.y, 0),
                  code_pair(v.codes.y, 1));
  lo = hi;  // not used
#elif CACHE_F32
  bf16_split(v.first.x, v.first.y, hi.x, lo.x);
  bf16_split(v.first.z, v.first.w, hi.y, lo.y);
  bf16_split(v.second.x, v.second.y, hi.z, lo.z);
  bf16_split(v.second.z, v.second.w, hi.w, lo.w);
#else
  hi = v.bits;
  lo = v.bits;  // not used
#endif
}

// 4 dims of a value row
struct ValueVector {
#if CACHE_CODES
  uint32_t codes;
#elif CACHE_F32
  float4 dims;
#else
  uint2 bits;
#endif
};

DEVICE ValueVector load_value(const cache_t* values, int key, int dim, int limit) {
  bool is_in = key < limit && is_key(key) && dim < HEAD_DIM;
  const cache_t* p = values + (size_t)(is_in ? key : 0) * HEAD_DIM + dim;
#if CACHE_CODES
  return {is_in ? *reinterpret_cast<const uint32_t*>(p) : 0u};
#elif CACHE_F32
  constexpr float4 zero = {0, 0, 0, 0};
  return {is_in ? *reinterpret_cast<const float4*>(p) : zero};
#else
  constexpr uint2 zero = {0, 0};
  return {is_in ? *reinterpret_cast<const uint2*>(p) : zero};
#endif
}

DEVICE void unpack_value(const ValueVector& v, uint2& hi, uint2& lo) {
#if CACHE_CODES
  hi = make_uint2(code_pair(v.codes, 0), code_pair(v.codes, 1));
  lo = hi;  // not used
#elif CACHE_F32
  bf16_split(v.dims.x, v.dims.y, hi.x, lo.x);
  bf16_split(v.dims.z, v.dims.w, hi.y, lo.y);
#else
  hi = v.bits;
  lo = v.bits;  // not used
#endif
}

// ---- scores

typedef float Accumulator[2][COLUMN_TILES][4];

// One step of 16 dims for 32 keys (two tiles) and all columns; k: per key the two registers of the
// step.
DEVICE void score_step(Accumulator& s, const uint32_t (&k)[4][2], const uint4 (&b)[COLUMN_TILES],
                       int step) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
      mma(s[i][j], k[2 * i][0], k[2 * i + 1][0], k[2 * i][1], k[2 * i + 1][1],
          step ? b[j].z : b[j].x, step ? b[j].w : b[j].y);
}

DEVICE void scores(Accumulator& s, const Shared& shared, const cache_t* keys, int first_key,
                   int limit) {
  // groups of 32 dims in flight: as many as registers allow
  constexpr int AHEAD = CACHE_F32 || COLUMN_TILES > 2 ? 1
                        : !CACHE_CODES                ? 3
                        : COLUMN_TILES > 1            ? 2
                                                      : (PARTS > 1 ? 1 : 3);
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, key = first_key + 4 * g;
  KeyVector loaded[AHEAD + 1][4];
#pragma unroll
  for (int d = 0; d < AHEAD; d++)
#pragma unroll
    for (int m = 0; m < 4; m++) loaded[d][m] = load_key(keys, key + m, 32 * d + 8 * t, limit);
#pragma unroll AHEAD + 1
  for (int d = 0; d < DIM_GROUPS; d++) {
#pragma unroll
    for (int m = 0; m < 4; m++)
      loaded[AHEAD][m] = load_key(keys, key + m, 32 * (d + AHEAD) + 8 * t, limit);
    uint4 hi[4], lo[4], q[PARTS][COLUMN_TILES];
#pragma unroll
    for (int m = 0; m < 4; m++) unpack_key(loaded[0][m], hi[m], lo[m]);
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        q[part][j] = shared.q[part][8 * j + g][swizzle(g, 4 * d + t)];
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t k[4][2], rest[4][2];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        k[m][0] = step ? hi[m].z : hi[m].x;
        k[m][1] = step ? hi[m].w : hi[m].y;
        rest[m][0] = step ? lo[m].z : lo[m].x;
        rest[m][1] = step ? lo[m].w : lo[m].y;
      }
      score_step(s, k, q[0], step);
      if (ACT_PARTS > 1) score_step(s, k, q[PARTS - 1], step);
      if (CACHE_F32) score_step(s, rest, q[0], step);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
      for (int m = 0; m < 4; m++) loaded[i][m] = loaded[i + 1][m];
  }
}

// ---- softmax of the block

// Of the rows of one key head, where they are codes; else 1.
struct Scales {
  const attention_args& launch;
  size_t first;  // row

  DEVICE Scales(const attention_args& launch, int key_head)
      : launch(launch), first((size_t)key_head * launch.S) {}
  DEVICE const float* keys() const { return (const float*)moved(launch).key_scales + first; }
  DEVICE const float* values() const { return (const float*)moved(launch).value_scales + first; }
};

// Accumulators -> weights in shared memory, block maxima and the warps' sums. All threads call it;
// after it, and a barrier, `p` and the sums are there. first_key: of this warp.
DEVICE void softmax(Accumulator& s, Shared& shared, const Queries& queries, int first_key,
                    const Scales& scales, int lane = threadIdx.x & 31) {
  Columns& columns = shared.columns;
  int warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, key = first_key + 4 * g;
  const float scale = 1.0f / sqrtf((float)HEAD_DIM);
  const float* key_scales = CACHE_CODES ? scales.keys() : nullptr;
#pragma unroll
  for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {  // the lane's keys 4g .. 4g + 3 of column 8j + 2t + e
      int column = 8 * j + 2 * t + e, last = queries.last_key(column);
      float largest = -INF;
#pragma unroll
      for (int m = 0; m < 4; m++) {
        float& x = s[m >> 1][j][e + 2 * (m & 1)];
        x = key + m <= last && is_key(key + m)
                ? x * scale * (CACHE_CODES ? key_scales[key + m] : 1.0f)
                : -INF;
        largest = fmaxf(largest, x);
      }
#pragma unroll
      for (int o = 4; o < 32; o <<= 1)
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, o));
      if (g == 0) columns.of_warp[warp][column] = largest;
    }
  __syncthreads();
  if (threadIdx.x < COLUMNS) {
    float largest = columns.of_warp[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, columns.of_warp[w][threadIdx.x]);
    columns.block_max(threadIdx.x) = largest;
  }
  __syncthreads();
  const float* value_scales = CACHE_CODES ? scales.values() : nullptr;
#pragma unroll
  for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * j + 2 * t + e;
      float largest = columns.block_max(column), p[4], weight[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        float x = s[m >> 1][j][e + 2 * (m & 1)];
        p[m] = x > -INF ? exp_f32(x - largest) : 0.0f;
        weight[m] = x > -INF ? p[m] * (CACHE_CODES ? value_scales[key + m] : 1.0f) : 0.0f;
      }
      float sum = (p[0] + p[1]) + (p[2] + p[3]);
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) sum = sum + __shfl_xor_sync(FULL_WARP, sum, o);
      if (g == 0) columns.of_warp[warp][column] = sum;
      uint2 hi, lo;
      bf16_split(weight[0], weight[1], hi.x, lo.x);
      bf16_split(weight[2], weight[3], hi.y, lo.y);
      int v = swizzle(column, 4 * warp + g / 2);
      reinterpret_cast<uint2*>(&shared.p[0][column][v])[g & 1] = hi;
      if (ACT_PARTS > 1) reinterpret_cast<uint2*>(&shared.p[PARTS - 1][column][v])[g & 1] = lo;
    }
}

DEVICE float block_sum_of(const Columns& columns, int column) {
  float sum = columns.of_warp[0][column];
#pragma unroll
  for (int w = 1; w < WARPS; w++) sum = sum + columns.of_warp[w][column];
  return sum;
}

// ---- weighted values

// Bit 15 of each half that is not finite, with others.
DEVICE uint32_t odd_halves(uint32_t pair) { return (pair & 0x7f807f80u) + 0x00800080u; }
// All bits of those halves.
DEVICE uint32_t odd_mask(uint32_t pair) { return (odd_halves(pair) >> 15 & 0x00010001u) * 0xffffu; }

// NaN in the dims of the columns that see a value that is not finite; o: of the tiles of columns
// from `first_tile` on. Rarely called.
template <int TILES>
DEVICE void mark_odd(float (&o)[2][TILES][4], const Queries& queries, const cache_t* values,
                     int first_key, int dim, int lane = threadIdx.x & 31, int first_tile = 0) {
  int t = lane & 3, first[4];  // odd key of each dim
  int end = min(first_key + BLOCK_KEYS, queries.end());
#pragma unroll
  for (int d = 0; d < 4; d++) first[d] = queries.end();  // none: no column sees that key
#pragma unroll 1
  for (int key = end - 1; key >= first_key; key--) {
    uint2 hi, lo;
    unpack_value(load_value(values, key, dim, end), hi, lo);
    uint32_t x = odd_halves(hi.x), y = odd_halves(hi.y);
    if (x & 0x8000u) first[0] = key;
    if (x >> 31) first[1] = key;
    if (y & 0x8000u) first[2] = key;
    if (y >> 31) first[3] = key;
  }
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int last = queries.last_key(8 * (first_tile + j) + 2 * t + e);
#pragma unroll
      for (int d = 0; d < 4; d++)
        if (first[d] <= last) o[d >> 1][j][e + 2 * (d & 1)] = __int_as_float(0x7fffffff);
    }
}

// Adds keys [first_key, limit) of a block to o. is_mixed: returns what odd_halves finds;
// is_clean: takes 0 for those.
DEVICE uint32_t weigh_block(Accumulator& o, const Shared& shared, const cache_t* values,
                            int first_key, int limit, int dim_group, bool is_mixed, bool is_clean) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, dim = 32 * dim_group + 4 * g;
  uint32_t odd = 0;
  ValueVector next[8];
#pragma unroll
  for (int i = 0; i < 8; i++) next[i] = load_value(values, first_key + 8 * t + i, dim, limit);
#pragma unroll 2
  for (int group = 0; group < BLOCK_KEYS / 32; group++) {
    ValueVector loaded[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      loaded[i] = next[i];
      if (group + 1 < BLOCK_KEYS / 32)
        next[i] = load_value(values, first_key + 32 * (group + 1) + 8 * t + i, dim, limit);
    }
    uint2 hi[8], lo[8];
#pragma unroll
    for (int i = 0; i < 8; i++) unpack_value(loaded[i], hi[i], lo[i]);
    if (is_mixed) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        odd |= odd_halves(hi[i].x) | odd_halves(hi[i].y);
        if (!is_clean) continue;
        uint2 keep = {~odd_mask(hi[i].x), ~odd_mask(hi[i].y)};
        hi[i] = {hi[i].x & keep.x, hi[i].y & keep.y};
        lo[i] = {lo[i].x & keep.x, lo[i].y & keep.y};
      }
    }
    uint4 p[PARTS][COLUMN_TILES];
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        p[part][j] = shared.p[part][8 * j + g][swizzle(g, 4 * group + t)];
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      // dims 4g + 2i (rows 0..7 of the tile) and 4g + 2i + 1 (rows 8..15)
      for (int i = 0; i < 2; i++) {
        auto pick = [&](const uint2(&v)[8], int pair, uint32_t halves) {
          const uint2 &first = v[4 * step + 2 * pair], &second = v[4 * step + 2 * pair + 1];
          return __byte_perm(i ? first.y : first.x, i ? second.y : second.x, halves);
        };
        auto add = [&](const uint2(&v)[8], const uint4(&b)[COLUMN_TILES]) {
          uint32_t a0 = pick(v, 0, 0x5410), a1 = pick(v, 0, 0x7632), a2 = pick(v, 1, 0x5410),
                   a3 = pick(v, 1, 0x7632);
#pragma unroll
          for (int j = 0; j < COLUMN_TILES; j++)
            mma(o[i][j], a0, a1, a2, a3, step ? b[j].z : b[j].x, step ? b[j].w : b[j].y);
        };
        add(hi, p[0]);
        if (ACT_PARTS > 1) add(hi, p[PARTS - 1]);
        if (CACHE_F32) add(lo, p[0]);
      }
  }
  return odd & 0x80008000u;
}

// o[i][j][e + 2h]: dim 32 * dim_group + 4g + 2i + h of column 8j + 2t + e; 0 before.
//
// Columns share the values, so one that is not finite cannot be kept from those that must not see
// it. Where some see a key and some do not, such values are looked for; if there are any, all is
// done again without them, and the columns that see them are marked.
DEVICE void weigh_values(Accumulator& o, const Shared& shared, const cache_t* values, int first_key,
                         const Queries& queries, int dim_group) {
  int limit = CACHE_CODES ? queries.limit() : queries.end();
  if (CACHE_CODES || BLOCK_ROWS == 1) {  // codes are finite; all columns see the same keys
    weigh_block(o, shared, values, first_key, limit, dim_group, false, false);
    return;
  }
  bool is_mixed = min(first_key + BLOCK_KEYS, limit) > queries.common();
  int dim = 32 * dim_group + 4 * ((threadIdx.x & 31) >> 2);
#pragma unroll 1
  for (bool is_clean = false;; is_clean = true) {
    uint32_t odd = weigh_block(o, shared, values, first_key, limit, dim_group, is_mixed, is_clean);
    if (!is_mixed) return;
    if (is_clean) {
      mark_odd(o, queries, values, first_key, dim);
      return;
    }
    if (!__any_sync(FULL_WARP, odd != 0)) return;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[i][j][e] = 0.0f;
  }
}

// ---- merging blocks, and the result

struct Factors {
  // the new maximum; what multiplies the sums so far; what multiplies the block's
  float max, before, block;
};

DEVICE Factors merge_factors(float max_before, float block_max) {
  float largest = fmaxf(max_before, block_max);
  return {largest, exp_f32(max_before - largest), exp_f32(block_max - largest)};
}

DEVICE float merge(float sum, float block, float factor_before, float factor_block) {
  return fmaf(sum, factor_before, block * factor_block);
}

// The result of one dim; o and sum are 0 where no key was seen. `gate` is that dim's, and not read
// unless GATED.
DEVICE float finished(float o, float sum, const float* gate) {
  float y = o / (sum > 0.0f ? sum : 1.0f);
#if GATED
  y = y * sigmoid(*gate);
#endif
  return y;
}

// The gates of a query, a float per dim.
DEVICE const float* gates_of(const attention_args& a, int row, int head) {
  return a.u + (size_t)row * a.U + (2 * head + 1) * HEAD_DIM;
}
