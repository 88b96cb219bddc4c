// simt.h - runs raw CUDA C++ kernels on the CPU, a fiber per CUDA thread: for verification, not for
// speed.
//
// IS: the CUDA language as far as kernels use it, and a scheduler that is stricter than a GPU. The
// stub that build.py generates includes this, then the kernel file inside an anonymous namespace,
// then SIMT_EXPORT(kernel) per kernel.
// IS NOT: a model of time, of caches, or of the bits of tensor cores (mma here is 16 products in
// fp32, then their sum to the accumulator).
//
// One OS thread per loaded library: all shared memory is static, and blocks run one after the
// other, threads in turn (seed 0) or in a random order (any other seed). What it catches: missing
// and divergent barriers, exits before a barrier, partial warp operations, reads of shared memory
// never written (it is NaN), cp.async not waited for, writes past dynamic shared memory; with
// SIMT_RACE also races that no schedule would show (race.h).
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
// C's functions: <cmath>, or <math.h> as C++ has it, takes a fifth of the time to compile a kernel.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

#include "language.h"

#include "fiber.h"

#include "race.h"

#include "intrinsics.h"

#include "tensor.h"
