/* relu_squared: y = max(u, 0)^2, between the two matrices of an MLP without a gate.
 *
 * IS: columns split over threads; one product per output. A NaN stays one. IS NOT: anything with a
 * sum.
 */
#include "common.h"

void op_relu_squared(const relu_squared_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span columns = share(a->I, tid, nt);
  for (int64_t t = 0; t < rows; t++) {
    const float *u = a->u + t * a->I;
    float *y = (float *)a->y + t * a->I;
    for (int64_t i = columns.begin; i < columns.end; i++) y[i] = u[i] < 0 ? 0.0f : u[i] * u[i];
  }
}
