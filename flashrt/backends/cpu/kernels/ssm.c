/* ssm: the recurrence of Mamba-2, row after row, state in float32.
 *
 * Order, per head and column, i = 0 .. dk - 1 ascending:
 *   S_i = fma(B_i, t x, decay * S_i)
 *   o = fma(d, x, even + odd), a chain fma(C_i, S_i, .) from +0 over even i, and one over odd i
 * The same for one row and for many.
 *
 * A unit of work is (head, 32 columns): [dk][32] floats, 16 KB at dk = 128, in L1 through all rows.
 */
#include "fmath.h"
#include "strip.h"

/* What one row brings to a head. */
typedef struct {
  const float *x, *b, *c;
  float decay, time;
} head_row;

static head_row head_row_at(const ssm_args *a, int64_t row, int64_t head) {
  const float *y = a->y + row * a->C;
  int64_t inner = (int64_t)a->Hv * a->dv, states = (int64_t)a->groups * a->dk;
  const float *b = y + inner + head / (a->Hv / a->groups) * a->dk;
  float time = s_softplus(a->dt[row * a->dt_stride + head] + a->dt_bias[head]);
  time = time < a->dt_min ? a->dt_min : time > a->dt_max ? a->dt_max : time;
  float decay = s_exp(-(s_exp(a->a_log[head]) * time));
  return (head_row){y + head * a->dv, b, b + states, decay, time};
}

/* S_i += ..., and its share of o */
INLINE void step(float *S, int i, head_row row, vf decay, strip input, strip *o) {
  vf b = v_set(row.b[i]), c = v_set(row.c[i]);
  UNROLL
  for (int j = 0; j < STRIP_VECTORS; j++) {
    float *p = S + i * LANES + j * VL;
    vf s = v_fma(b, input.v[j], decay * v_load(p));
    v_store(p, s);
    o->v[j] = v_fma(c, s, o->v[j]);
  }
}

/* Updates the state by one row; returns its o, less the share of x. */
static strip update_state(float *S, int dk, head_row row, strip input) {
  strip even = {{{0}}}, odd = {{{0}}};
  vf decay = v_set(row.decay);
  int i = 0;
  for (; i + 2 <= dk; i += 2) {
    step(S, i, row, decay, input, &even);
    step(S, i + 1, row, decay, input, &odd);
  }
  if (i < dk) step(S, i, row, decay, input, &even);
  for (int j = 0; j < STRIP_VECTORS; j++) even.v[j] = even.v[j] + odd.v[j];
  return even;
}

/* All rows of one strip of columns of one head, S its state; col is its first column. */
static void run_strip(const ssm_args *a, float *S, int64_t head, int col, int n_rows) {
  int n_cols = (int)min_of(STRIP, a->dv - col);
  for (int64_t t = 0; t < n_rows; t++) {
    head_row row = head_row_at(a, t, head);
    strip x = load_columns(row.x + col, n_cols), input = x;
    for (int j = 0; j < STRIP_VECTORS; j++) input.v[j] = v_set(row.time) * x.v[j];
    strip o = update_state(S, a->dk, row, input);
    for (int j = 0; j < STRIP_VECTORS; j++) o.v[j] = v_fma(v_set(a->d[head]), x.v[j], o.v[j]);
    store_columns(a->o + (t * a->Hv + head) * a->dv + col, n_cols, o);
  }
}

void op_ssm(const ssm_args *a, int tid, int nt) {
  int n_rows = rows_of(a->cursor, a->T);
  int64_t blocks = ceil_div(a->dv, LANES);
  if (n_rows <= 0) return;
  span mine = share(a->Hv * blocks, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int64_t head = unit / blocks;
    int first = (int)(unit % blocks) * LANES, end = (int)min_of(first + LANES, a->dv);
    float *S = a->state + state_index(head, 0, first, a->dk, a->dv);
    for (int col = first; col < end; col += STRIP)
      run_strip(a, S + (col - first), head, col, n_rows);
  }
}
