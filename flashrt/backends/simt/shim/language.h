// language.h - CUDA's keywords, built-in types and variables in host C++. Part of simt.h.
#pragma once
#define SIMT_HOST 1

#define __global__
#define __device__
#define __host__
#define __constant__ static __attribute__((section("simt_const")))
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

// All of .bss is shared memory: poisoned when a block starts. The runtime's own state must
// therefore live elsewhere.
#define __shared__ static
#define SIMT_STATE static __attribute__((section("simt_state"), unused))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

#define SIMT_VECTORS(T, name)                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(unsigned short, ushort)

// CUDA's functions of two precisions, as in C++: of a float they are in float.
#define SIMT_OF_FLOAT(name) \
  inline float name(float x) { return name##f(x); }
SIMT_OF_FLOAT(fabs)
SIMT_OF_FLOAT(sqrt)
SIMT_OF_FLOAT(exp)
SIMT_OF_FLOAT(exp2)
SIMT_OF_FLOAT(log)
SIMT_OF_FLOAT(log2)
SIMT_OF_FLOAT(sin)
SIMT_OF_FLOAT(cos)
SIMT_OF_FLOAT(tanh)
SIMT_OF_FLOAT(floor)
SIMT_OF_FLOAT(ceil)
SIMT_OF_FLOAT(rint)
SIMT_OF_FLOAT(round)
SIMT_OF_FLOAT(trunc)
inline float pow(float x, float y) { return powf(x, y); }
inline float fmin(float x, float y) { return fminf(x, y); }
inline float fmax(float x, float y) { return fmaxf(x, y); }
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }

SIMT_STATE dim3 blockDim, gridDim;
SIMT_STATE uint3 blockIdx;
#define threadIdx (simt::current->index)
constexpr int warpSize = 32;

// Where an operation was called from: default arguments are evaluated at the call.
#define SIMT_AT int line = __builtin_LINE(), const char *file = __builtin_FILE()
