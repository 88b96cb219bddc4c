// attention_many.cu - attention for many rows: a block of queries walks over the keys.
//
// Contract, shapes and order: as attention_few.cu; `partials` is not used.
// Launch:   grid (T / BLOCK_ROWS, Nk), 256 threads; COLUMNS queries per block, 32 to 128. Running
//           maxima and sums are in shared memory, running outputs in registers.
//
// A block reads each byte of the keys and values that it sees once. They come by cp.async, in
// chunks, as one stream: the keys of a block of 256, 32 dims at a time, its values, 32 keys at a
// time, the keys of the next block. Two chunks are under way, also while the softmax is computed.
// A warp has 32 of the keys to itself, so that its lanes copy what they multiply, and wait for
// nobody; values are shared by the warps that divide the columns of the same dims.
#include "flashrt.cuh"
#include "attention.cuh"

// Warps with the same dims of values: each takes a part of the columns, in units of 32 keys that
// the others copy too.
constexpr int SHARERS = DIM_GROUPS > 4 ? 1 : DIM_GROUPS > 2 ? 2 : 4;
constexpr int DIM_WARPS = WARPS / SHARERS;
constexpr int OWN_TILES = COLUMN_TILES / SHARERS;  // of columns
static_assert(COLUMN_TILES % (2 * SHARERS) == 0, "tiles are multiplied two at a time");
// Running outputs of so many tiles are in registers, those of the others in shared memory.
constexpr int PARKED_TILES = OWN_TILES - KEPT_TILES;

// Of a chunk of a warp, so that a lane has 64 bytes (codes: 32): tiles of 16 keys by 32 dims, and
// steps of 16 keys of values.
constexpr int KEY_TILES = CACHE_F32 ? 1 : 2, VALUE_STEPS = CACHE_F32 ? 1 : 2;
constexpr int KEY_CHUNKS = DIM_GROUPS * 2 / KEY_TILES;
constexpr int UNIT_KEYS = 16 * VALUE_STEPS, UNITS = BLOCK_KEYS / UNIT_KEYS;  // of values
constexpr int KEY_DIMS = CACHE_F32 ? 4 : 8;                                  // of a vector of keys
constexpr int CHUNKS = KEY_CHUNKS + UNITS / SHARERS;                         // of a block of keys
constexpr int STAGES = 2;

// What a lane holds of a chunk.
struct LaneKeys {
#if CACHE_CODES
  uint2 v[4];
#else
  uint4 v[4];  // float: the halves of two keys
#endif
};
struct LaneValues {
  ValueVector v[4 * VALUE_STEPS];
};
static_assert(sizeof(LaneKeys) == sizeof(LaneValues));

// [vector][lane]
struct Slot {
  uint8_t bytes[32 * sizeof(LaneKeys)];
};

struct Workspace {
  Shared shared;
  Slot slots[STAGES][WARPS];
  // and behind it float4 parked[2 * PARKED_TILES][THREADS]
};

// Fills 16, 8 or 4 bytes of shared memory.
template <int BYTES>
DEVICE void copy_vector(uint8_t* to, const cache_t* from, bool is_read) {
  if constexpr (BYTES == 16) copy_async16(to, from, is_read);
  else if constexpr (BYTES == 8) copy_async8(to, from, is_read);
  else copy_async4(to, from, is_read);
}

// The stream of chunks, some ahead of what is multiplied. What nobody sees is zeros.
struct Feed {
  const cache_t *keys, *values;  // of the lane, in the block of keys of the next chunk
  int key, end;                  // the first key of this block; those from `end` on are not seen
  int chunk;                     // the next one, in the block

  DEVICE Feed(const attention_args& a, int key_head, int end)
      : key(SHIFT / BLOCK_KEYS * BLOCK_KEYS), end(end), chunk(0) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    size_t row = (size_t)key_head * a.S + key;
    keys = (const cache_t*)a.keys + (row + 32 * warp + 4 * g) * HEAD_DIM + KEY_DIMS * t;
    values = (const cache_t*)a.values + (row + UNIT_KEYS * (warp / DIM_WARPS) + 8 * t) * HEAD_DIM +
             32 * (warp % DIM_WARPS) + 4 * g;
  }

  // Copies the next chunk, if there is one, and ends the group of copies.
  DEVICE void next(Slot* stage) {
    if (key < end) {
      uint8_t* slot = stage[threadIdx.x >> 5].bytes;
      if (chunk < KEY_CHUNKS) copy_keys(slot);
      else copy_values(slot);
      if (++chunk == CHUNKS) {
        chunk = 0;
        key += BLOCK_KEYS;
        keys += BLOCK_KEYS * HEAD_DIM;
        values += BLOCK_KEYS * HEAD_DIM;
      }
    }
    copy_async_commit();
  }

  DEVICE void copy_keys(uint8_t* slot) const {
    constexpr int BYTES = KEY_DIMS * sizeof(cache_t);
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int first = key + (threadIdx.x & ~31) + 4 * g;
#if CACHE_F32
    // The lanes of a key copy what lies together, half a row of 32 dims at a time: vector
    // 4 half + t, for lane 2 half + t / 2.
    int two = chunk & 1, dim = chunk / 2 * 32 + KEY_DIMS * t;
    const cache_t* from = keys + 2 * two * HEAD_DIM + chunk / 2 * 32;
    uint8_t* to = slot + BYTES * (32 * (t & 1) + 4 * g + t / 2);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        copy_vector<BYTES>(to + BYTES * (64 * i + 2 * half), from + i * HEAD_DIM + 16 * half,
                           is_seen(first + 2 * two + i, dim + 16 * half));
#else
    const cache_t* from = keys + 32 * chunk;
#pragma unroll
    for (int i = 0; i < 4; i++)
      copy_vector<BYTES>(slot + BYTES * (32 * i + lane), from + i * HEAD_DIM,
                         is_seen(first + i, 32 * chunk + KEY_DIMS * t));
#endif
  }

  DEVICE void copy_values(uint8_t* slot) const {
    constexpr int BYTES = 4 * sizeof(cache_t);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int dims = warp % DIM_WARPS, unit = (chunk - KEY_CHUNKS) * SHARERS;
    if (DIM_WARPS > DIM_GROUPS && dims >= DIM_GROUPS) return;
    // a unit of floats is half of what 8 keys per lane are
    int row = VALUE_STEPS > 1 ? 32 * unit : 0, own = unit + warp / DIM_WARPS;
    if (VALUE_STEPS == 1) row = 32 * (own / 2) + 4 * (own & 1) - UNIT_KEYS * (warp / DIM_WARPS);
    const cache_t* from = values + row * HEAD_DIM;
    int first = key + row + UNIT_KEYS * (warp / DIM_WARPS) + 8 * t;
#pragma unroll
    for (int i = 0; i < 4 * VALUE_STEPS; i++)
      copy_vector<BYTES>(slot + BYTES * (32 * i + lane), from + i * HEAD_DIM,
                         is_seen(first + i, 32 * dims + 4 * g));
  }

  DEVICE bool is_seen(int row, int dim) const {
    return row < end && is_key(row) && (HEAD_DIM % 32 == 0 || dim < HEAD_DIM);
  }
};

// The vectors of this lane.
template <class Lane>
DEVICE Lane taken(const Slot& slot) {
  typedef decltype(Lane::v) Vectors;
  Lane own;
  constexpr int N = sizeof(Vectors) / sizeof(own.v[0]);
  auto from = reinterpret_cast<decltype(&own.v[0])>(const_cast<uint8_t*>(slot.bytes));
#pragma unroll
  for (int i = 0; i < N; i++) own.v[i] = from[32 * i + (threadIdx.x & 31)];
  return own;
}

// ---- scores

// x in a register of its own. A plain copy would be made again for each tensor instruction that
// takes it; this is one only because blocks have one dimension, which the compiler does not know.
DEVICE uint32_t held(uint32_t x) { return x ^ threadIdx.y; }

// The m-th key of a lane.
DEVICE KeyVector key_of(const LaneKeys& own, int m) {
#if CACHE_CODES
  return {own.v[m]};
#elif CACHE_F32
  auto floats = [](const uint4& v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
  };
  return {floats(own.v[2 * m]), floats(own.v[2 * m + 1])};
#else
  const uint4& v = own.v[m];
  return {make_uint4(held(v.x), held(v.y), held(v.z), held(v.w))};
#endif
}

DEVICE void staged_scores(Accumulator& s, Workspace& work, Feed& feed, int& stage) {
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) {
    copy_async_wait<STAGES - 1>();
    __syncwarp();
    LaneKeys own = taken<LaneKeys>(work.slots[stage][warp]);
    __syncwarp();
    feed.next(work.slots[stage]);
    stage ^= 1;
    uint4 hi[2 * KEY_TILES], lo[2 * KEY_TILES];
#pragma unroll
    for (int m = 0; m < 2 * KEY_TILES; m++) unpack_key(key_of(own, m), hi[m], lo[m]);
    int d = chunk * KEY_TILES / 2, tile = KEY_TILES == 1 ? chunk & 1 : 0;
    auto add = [&](int first_tile, int step, int j, const uint4(&k)[2 * KEY_TILES],
                   const uint4& q) {
#pragma unroll
      for (int i = 0; i < KEY_TILES; i++)
        mma(s[first_tile + i][j], step ? k[2 * i].z : k[2 * i].x,
            step ? k[2 * i + 1].z : k[2 * i + 1].x, step ? k[2 * i].w : k[2 * i].y,
            step ? k[2 * i + 1].w : k[2 * i + 1].y, step ? q.z : q.x, step ? q.w : q.y);
    };
    auto multiply = [&](int first_tile) {
#pragma unroll
      for (int first = 0; first < COLUMN_TILES; first += 2) {
        uint4 q[PARTS][2];
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
          for (int j = 0; j < 2; j++)
            q[part][j] = work.shared.q[part][8 * (first + j) + g][swizzle(g, 4 * d + t)];
#pragma unroll
        for (int step = 0; step < 2; step++) {
#pragma unroll
          for (int j = 0; j < 2; j++) add(first_tile, step, first + j, hi, q[0][j]);
          if (PARTS > 1)
#pragma unroll
            for (int j = 0; j < 2; j++) add(first_tile, step, first + j, hi, q[PARTS - 1][j]);
          if (CACHE_F32)
#pragma unroll
            for (int j = 0; j < 2; j++) add(first_tile, step, first + j, lo, q[0][j]);
        }
      }
    };
    // which accumulators, the compiler must know
    if (tile == 0) multiply(0);
    else multiply(2 - KEY_TILES);
  }
}

// ---- weighted values

typedef float Outputs[2][OWN_TILES][4];  // of a block of keys

// Of all blocks of keys so far.
struct Running {
  float o[2][KEPT_TILES][4];
  float4* parked;  // of this thread

  DEVICE explicit Running(Workspace& work)
      : o{}, parked(reinterpret_cast<float4*>(&work + 1) + threadIdx.x) {
#pragma unroll
    for (int k = 0; k < 2 * PARKED_TILES; k++)
      parked[k * THREADS] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  // Adds a tile of a block to its running outputs. factors: of the lane's two columns.
  DEVICE void add(const float (&block)[4], int i, int j, const float2 (&factors)[2]) {
    auto merged = [&](float sum, int e) {
      float2 f = factors[e & 1];
      return f.x < 0.0f ? sum : merge(sum, block[e], f.x, f.y);
    };
    if (j < KEPT_TILES) {
#pragma unroll
      for (int e = 0; e < 4; e++) o[i][j][e] = merged(o[i][j][e], e);
    } else {
      float4& v = parked[(2 * (j - KEPT_TILES) + i) * THREADS];
      v = make_float4(merged(v.x, 0), merged(v.y, 1), merged(v.z, 2), merged(v.w, 3));
    }
  }

  DEVICE float4 tile(int i, int j) const {
    if (j >= KEPT_TILES) return parked[(2 * (j - KEPT_TILES) + i) * THREADS];
    return make_float4(o[i][j][0], o[i][j][1], o[i][j][2], o[i][j][3]);
  }
};

// What a lane multiplies of STEPS times 16 keys: of dims 4g + 2i (rows 0..7 of the tile) and
// 4g + 2i + 1 (rows 8..15), by step.
template <int STEPS>
struct ValueOperands {
  uint32_t hi[STEPS][2][4], lo[STEPS][2][4];  // lo: of floats

  // Returns what odd_halves finds; IS_CLEAN: takes 0 for those.
  template <bool IS_CLEAN>
  DEVICE uint32_t set(const ValueVector (&values)[4 * STEPS], bool is_mixed) {
    uint2 high[4 * STEPS], low[4 * STEPS];
    uint32_t odd = 0;
#pragma unroll
    for (int k = 0; k < 4 * STEPS; k++) {
      unpack_value(values[k], high[k], low[k]);
      if (!IS_CLEAN) continue;
      uint2 keep = {~odd_mask(high[k].x), ~odd_mask(high[k].y)};
      high[k] = {high[k].x & keep.x, high[k].y & keep.y};
      low[k] = {low[k].x & keep.x, low[k].y & keep.y};
    }
    if (!CACHE_CODES && is_mixed)
#pragma unroll
      for (int k = 0; k < 4 * STEPS; k++) odd |= odd_halves(high[k].x) | odd_halves(high[k].y);
    transpose(high, hi);
    if (CACHE_F32) transpose(low, lo);
    return odd & 0x80008000u;
  }

  DEVICE static void transpose(const uint2 (&x)[4 * STEPS], uint32_t (&a)[STEPS][2][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const uint2 &first = x[4 * step + 2 * pair], &second = x[4 * step + 2 * pair + 1];
        a[step][0][2 * pair] = __byte_perm(first.x, second.x, 0x5410);
        a[step][0][2 * pair + 1] = __byte_perm(first.x, second.x, 0x7632);
        a[step][1][2 * pair] = __byte_perm(first.y, second.y, 0x5410);
        a[step][1][2 * pair + 1] = __byte_perm(first.y, second.y, 0x7632);
      }
  }
};

// Adds values to o, in the canonical order; first_step: of 16 keys, in the block.
template <int STEPS>
DEVICE void weigh(Outputs& o, const Shared& shared, const ValueOperands<STEPS>& values,
                  int first_step, int first_tile) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int v = swizzle(g, 4 * (first_step / 2) + t);
#pragma unroll
  for (int first = 0; first < OWN_TILES; first += 2) {
    uint2 p[PARTS][2][STEPS];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint4* from = &shared.p[part][8 * (first_tile + first + j) + g][v];
        if constexpr (STEPS == 1) {
          p[part][j][0] = reinterpret_cast<const uint2*>(from)[first_step & 1];
        } else {
          uint4 both = *from;
          p[part][j][0] = {both.x, both.y};
          p[part][j][1] = {both.z, both.w};
        }
      }
    auto add = [&](const uint32_t (&a)[2][4], int part, int step) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          mma(o[i][first + j], a[i][0], a[i][1], a[i][2], a[i][3], p[part][j][step].x,
              p[part][j][step].y);
    };
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      add(values.hi[step], 0, step);
      if (PARTS > 1) add(values.hi[step], PARTS - 1, step);
      if (CACHE_F32) add(values.lo[step], 0, step);
    }
  }
}

// Adds the block of values to o, as they arrive. Returns whether some may not be finite.
DEVICE bool staged_values(Outputs& o, Workspace& work, Feed& feed, int& stage, bool is_mixed,
                          int dims, int first_tile) {
  uint32_t odd = 0;
#pragma unroll 1
  for (int first = 0; first < UNITS; first += SHARERS) {
    copy_async_wait<STAGES - 1>();
    if (SHARERS > 1) __syncthreads();
    else __syncwarp();
#pragma unroll
    for (int i = 0; i < SHARERS; i++) {
      bool is_own = DIM_WARPS <= DIM_GROUPS || dims < DIM_GROUPS;
      ValueOperands<VALUE_STEPS> values;
      if (is_own)
        odd |= values.set<false>(taken<LaneValues>(work.slots[stage][DIM_WARPS * i + dims]).v,
                                 is_mixed);
      if (i == SHARERS - 1) {
        if (SHARERS > 1) __syncthreads();
        else __syncwarp();
        feed.next(work.slots[stage]);
      }
      if (is_own) weigh(o, work.shared, values, VALUE_STEPS * (first + i), first_tile);
    }
    stage ^= 1;
  }
  return __any_sync(FULL_WARP, odd != 0);
}

// The same, from memory, with 0 for values that are not finite. Rarely called.
DEVICE void weigh_finite(Outputs& o, const Shared& shared, const cache_t* values, int first_key,
                         int end, int dims, int first_tile) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int step = 0; step < BLOCK_KEYS / 16; step++) {
    int key = first_key + 32 * (step / 2) + 8 * t + 4 * (step & 1);
    ValueVector loaded[4];
#pragma unroll
    for (int k = 0; k < 4; k++) loaded[k] = load_value(values, key + k, 32 * dims + 4 * g, end);
    ValueOperands<1> operands;
    operands.set<true>(loaded, false);
    weigh(o, shared, operands, step, first_tile);
  }
}

KERNEL(256, 1) attention_rows(ARGS attention_args launch) {
  OPEN_RUN(attention);
  DYNAMIC_SHARED(Workspace, work);
  Shared& shared = work->shared;
  Columns& columns = shared.columns;
  begin();
  // the last rows have most keys: they start first
  int key_head = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2,
      t = lane & 3;
  Queries queries = {int(gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS, a.cursor[CURSOR_ROWS],
                     a.cursor[CURSOR_POSITION]};
  if (queries.first_row >= queries.rows) return;
  Feed feed(a, key_head, queries.end());
  int stage = 0, dims = warp % DIM_WARPS, first_tile = warp / DIM_WARPS * OWN_TILES,
      first_key = feed.key;
#pragma unroll
  for (int s = 0; s < STAGES; s++) feed.next(work->slots[s]);
  load_queries(shared, a, queries, key_head);
  if (threadIdx.x < COLUMNS) {
    columns.max[threadIdx.x] = -INF;
    columns.sum[threadIdx.x] = 0.0f;
  }
  __syncthreads();

  Running running(*work);
#pragma unroll 1
  for (; first_key < feed.end; first_key += BLOCK_KEYS) {
    lane = made_here(lane);  // what columns see is not kept for all of them
    {
      Accumulator s = {};
      staged_scores(s, *work, feed, stage);
      softmax(s, shared, queries, first_key + 32 * warp, Scales(launch, key_head), lane);
    }
    __syncthreads();
    if (threadIdx.x < COLUMNS) {
      int c = threadIdx.x;
      Factors f = merge_factors(columns.max[c], columns.block_max(c));
      bool is_hidden = !queries.sees(c, first_key);
      columns.factor[c] = is_hidden ? make_float2(-1.0f, 0.0f) : make_float2(f.before, f.block);
      if (!is_hidden) {
        columns.sum[c] = merge(columns.sum[c], block_sum_of(columns, c), f.before, f.block);
        columns.max[c] = f.max;
      }
    }
    Outputs block = {};
    // codes are finite; the columns of one row see the same keys
    bool is_mixed =
        !CACHE_CODES && BLOCK_ROWS > 1 && min(first_key + BLOCK_KEYS, feed.end) > queries.common();
    if (staged_values(block, *work, feed, stage, is_mixed, dims, first_tile)) {
      // Columns share the values, so one that is not finite cannot be kept from those that must
      // not see it: once more without it, and the columns that see it are marked.
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < OWN_TILES; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) block[i][j][e] = 0.0f;
      const cache_t* values =
          (const cache_t*)moved(launch).values + (size_t)key_head * a.S * HEAD_DIM;
      weigh_finite(block, shared, values, first_key, feed.end, dims, first_tile);
      mark_odd(block, queries, values, first_key, 32 * dims + 4 * g, lane, first_tile);
    }
    __syncthreads();  // factors are there, weights are no longer needed
#pragma unroll
    for (int j = 0; j < OWN_TILES; j++) {
      int column = 8 * (first_tile + j) + 2 * t;
      float2 factors[2] = {columns.factor[column], columns.factor[column + 1]};
#pragma unroll
      for (int i = 0; i < 2; i++) running.add(block[i][j], i, j, factors);
    }
  }
  copy_async_wait<0>();

  int dim = 32 * dims + 4 * g;
  if (dim >= HEAD_DIM) return;
  a = moved(launch);
#pragma unroll
  for (int j = 0; j < OWN_TILES; j++) {
    float4 first = running.tile(0, j), second = running.tile(1, j);  // of two dims each
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * (first_tile + j) + 2 * t + e, row = queries.row(column),
          head = key_head * GROUP + column % GROUP;
      if (!queries.has_query(column)) continue;
      const float* gate = gates_of(a, row, head) + dim;
      act_t* y = (act_t*)a.y + ((size_t)row * a.Nq + head) * HEAD_DIM + dim;
      float sum = columns.sum[column];
      store_act4(y, finished(e ? first.y : first.x, sum, gate),
                 finished(e ? first.w : first.z, sum, gate + 1),
                 finished(e ? second.y : second.x, sum, gate + 2),
                 finished(e ? second.w : second.z, sum, gate + 3));
    }
  }
}
