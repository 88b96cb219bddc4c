/* What dense and conv2d do with a vector of sums: rows that end inside it, and the functions that are
 * applied. Included by: those two. */
#pragma once
#include "common.h"
#include "fmath.h"

INLINE vf v_activated(vf y, int activation) {
  if (activation == ACTIVATION_SILU) return v_silu(y);
  return activation == ACTIVATION_RELU ? v_relu(y) : y;
}

/* The first `count` floats at p, at most VL; the other lanes 0. */
INLINE vf load_some(const float *p, int64_t count) {
  if (count >= VL) return v_load(p);
  float padded[VL] = {0};
  for (int64_t i = 0; i < count; i++) padded[i] = p[i];
  return v_load(padded);
}
INLINE void store_some(float *p, vf x, int64_t count) {
  if (count >= VL) v_store(p, x);
  else
    for (int64_t i = 0; i < count; i++) p[i] = x[i];
}
