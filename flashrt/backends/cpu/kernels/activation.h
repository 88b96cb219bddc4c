/* The functions that dense and conv2d apply to their sums. Included by: those two. */
#pragma once
#include "common.h"
#include "fmath.h"

INLINE vf v_activated(vf y, int activation) {
  if (activation == ACTIVATION_SILU) return v_silu(y);
  return activation == ACTIVATION_RELU ? v_relu(y) : y;
}
