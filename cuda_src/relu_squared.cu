// relu_squared.cu - the activation of an MLP without a gate.
//
// Contract: y = max(u, 0)^2 for valid rows; a NaN stays one.
// Shapes:   u [T, I] float, y [T, I] activations.
// Order:    one product per output.
// Launch:   grid (I / 1024, T), four columns per thread.
#include "flashrt.cuh"

DEVICE float relu_squared_of(float u) { return u < 0.0f ? 0.0f : u * u; }

KERNEL(256) relu_squared(ARGS relu_squared_args launch) {
  OPEN_RUN(relu_squared);
  begin();
  int t = blockIdx.y, c = 4 * (blockIdx.x * 256 + threadIdx.x);
  if (t >= a.cursor[CURSOR_ROWS] || c >= a.I) return;
  const float* u = a.u + (size_t)t * a.I + c;
  act_t* y = (act_t*)a.y + (size_t)t * a.I + c;
  if (a.I % 4 == 0) {
    float4 v = *reinterpret_cast<const float4*>(u);
    store_act4(y, relu_squared_of(v.x), relu_squared_of(v.y), relu_squared_of(v.z),
               relu_squared_of(v.w));
  } else {
    for (int i = 0; i < 4 && c + i < a.I; i++) y[i] = to_act(relu_squared_of(u[i]));
  }
}
