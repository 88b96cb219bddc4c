// row_tiles.cuh - rows of operands on their way into shared memory by cp.async: shared by the
// kernels that go through rows one after the other with a state in registers (delta_rule, ssm).
//
// IS NOT: a barrier, a commit or a wait, which are the caller's.
#pragma once

// UNIT floats, 4 or 1; zeros where they are not read
template <int UNIT>
DEVICE void copy_unit(float* to, const float* from, bool is_read) {
  if constexpr (UNIT == 4) copy_async16(to, from, is_read);
  else copy_async4(to, from, is_read);
}

// `to` [rows][WIDTH] = columns [0, WIDTH) of `from`, zeros at and beyond `limit`; by a block of
// THREADS
template <int UNIT, int THREADS, int WIDTH>
DEVICE void load_rows(float (*to)[WIDTH], const float* from, int stride, int rows, int limit) {
  for (int i = threadIdx.x; i < rows * (WIDTH / UNIT); i += THREADS) {
    int t = i / (WIDTH / UNIT), c = i % (WIDTH / UNIT) * UNIT;
    bool is_in = c < limit;
    copy_unit<UNIT>(&to[t][c], from + (size_t)t * stride + (is_in ? c : 0), is_in);
  }
}
