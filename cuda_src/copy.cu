// copy.cu - one launch for a whole copy list.
//
// Contract: for each of n descriptors (core.copylist COPY_FORMAT, absolute addresses): `height`
//           rows of `width` bytes from src to dst, each side with its own pitch. Ranges do not
//           overlap: any order will do.
// Launch:   grid-stride over the 4 KB pieces of all copies; a warp per piece, 16 bytes per lane
//           where both sides are aligned, 4 where both lie on words (rows of token ids or of scales
//           do at any position), bytes elsewhere. All loads of a batch are under way at once.
#include "flashrt.cuh"

struct copy_batch_args {
  const uint64_t* table;  // [n][6]: src, dst, width, height, src_pitch, dst_pitch
  int32_t n;
};

constexpr uint64_t PIECE_BYTES = 4096;

// The whole units of n bytes, BATCH per lane at a time; how many bytes that were.
template <typename Unit, int BATCH>
DEVICE int copy_units(char* to, const char* from, int n, int lane) {
  Unit* dst = (Unit*)to;
  const Unit* src = (const Unit*)from;
  int n_units = n / (int)sizeof(Unit);
  for (int first = lane; first < n_units; first += 32 * BATCH) {
    Unit v[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + 32 * i < n_units) v[i] = src[first + 32 * i];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + 32 * i < n_units) dst[first + 32 * i] = v[i];
  }
  return n_units * (int)sizeof(Unit);
}

KERNEL(256) copy_batch(ARGS copy_batch_args a) {
  begin();
  int lane = threadIdx.x & 31;
  // pieces are numbered through all copies; this warp takes those congruent to its number: `first`
  // is the next one, counted from the start of the copy at hand
  uint32_t n_warps = gridDim.x * 8, first = blockIdx.x * 8 + (threadIdx.x >> 5);
  for (int i = 0; i < a.n; i++) {
    const uint64_t* d = a.table + 6 * i;
    uint64_t src = d[0], dst = d[1], width = d[2], src_pitch = d[4], dst_pitch = d[5];
    uint32_t per_row = (uint32_t)((width + PIECE_BYTES - 1) / PIECE_BYTES),
             n_pieces = per_row * (uint32_t)d[3];
    uint32_t p = first;
    for (; p < n_pieces; p += n_warps) {
      uint64_t row = p / per_row, at = p % per_row * PIECE_BYTES, n = min(width - at, PIECE_BYTES);
      char* to = (char*)(dst + row * dst_pitch + at);
      const char* from = (const char*)(src + row * src_pitch + at);
      uint64_t offsets = (uint64_t)to | (uint64_t)from;
      int length = (int)n, done = 0;
      if ((offsets & 15) == 0) done = copy_units<uint4, 8>(to, from, length, lane);
      if ((offsets & 3) == 0)
        done += copy_units<uint32_t, 16>(to + done, from + done, length - done, lane);
      copy_units<uint8_t, 16>(to + done, from + done, length - done, lane);
    }
    first = p - n_pieces;
  }
}
