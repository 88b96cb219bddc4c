/* delta_rule, delta_verify: the gated delta rule, row after row, state in float32.
 *
 * Order, per value head and column, chains over i = 0 .. dk - 1 ascending:
 *   kv = chain fma(k_i, S_i, kv) from +0        the decay is applied to the sum, which saves a
 *   product per element
 *   delta = beta * fma(-decay, kv, v)
 *   S_i = fma(k_i, delta, decay * S_i)          o = chain fma(q_i, S_i, o) from +0
 * One pass over the state per row: while S_i is in a register it also feeds the kv chain of the
 * next row. The chains are the same for one row and for many.
 *
 * A unit of work is (value head, 32 columns): [dk][32] floats, 16 KB at dk = 128, in L1 through
 * all rows.
 */
#include "strip.h"

/* What one row brings to a head. */
typedef struct {
  const float *q, *k, *v;
  float decay, beta;
} head_row;

static head_row head_row_at(const delta_rule_args *a, int64_t row, int64_t head) {
  const float *y = a->y + row * a->C;
  int64_t key_head = head / (a->Hv / a->key_heads), key_cols = (int64_t)a->key_heads * a->dk;
  const float *q = y + key_head * a->dk;
  const float *v = y + 2 * key_cols + head * a->dv;
  return (head_row){q, q + key_cols, v, a->decay[row * a->Hv + head], a->beta[row * a->Hv + head]};
}

static strip dot_state(const float *S, const float *k, int dk) {
  strip kv = {{{0}}};
  for (int i = 0; i < dk; i++) {
    UNROLL
    for (int j = 0; j < STRIP_VECTORS; j++)
      kv.v[j] = v_fma(v_set(k[i]), v_load(S + i * LANES + j * VL), kv.v[j]);
  }
  return kv;
}

/* Updates the state by one row; returns its o, and in kv the sums of the next row, if any. */
INLINE strip update_state(float *S, int dk, head_row row, const float *k_next, strip delta,
                          strip *kv, const int has_next) {
  strip o = {{{0}}}, next = {{{0}}};
  vf decay = v_set(row.decay);
  for (int i = 0; i < dk; i++) {
    vf k = v_set(row.k[i]), q = v_set(row.q[i]), k_after = v_set(has_next ? k_next[i] : 0);
    UNROLL
    for (int j = 0; j < STRIP_VECTORS; j++) {
      float *p = S + i * LANES + j * VL;
      vf s = v_fma(k, delta.v[j], decay * v_load(p));
      v_store(p, s);
      o.v[j] = v_fma(q, s, o.v[j]);
      if (has_next) next.v[j] = v_fma(k_after, s, next.v[j]);
    }
  }
  *kv = next;
  return o;
}

/* All rows of one strip of columns of one head, S its state; col is its first column. */
static void run_strip(const delta_rule_args *a, float *S, int64_t head, int col, int n_rows) {
  int n_cols = (int)min_of(STRIP, a->dv - col), dk = a->dk;
  head_row row = head_row_at(a, 0, head);
  strip kv = dot_state(S, row.k, dk);
  for (int64_t t = 0; t < n_rows; t++) {
    strip delta = load_columns(row.v + col, n_cols), o;
    for (int j = 0; j < STRIP_VECTORS; j++) {
      delta.v[j] = v_set(row.beta) * v_fma(v_set(-row.decay), kv.v[j], delta.v[j]);
    }
    if (t + 1 < n_rows) {
      head_row next = head_row_at(a, t + 1, head);
      o = update_state(S, dk, row, next.k, delta, &kv, 1);
      store_columns(a->o + (t * a->Hv + head) * a->dv + col, n_cols, o);
      row = next;
    } else {
      o = update_state(S, dk, row, NULL, delta, &kv, 0);
      store_columns(a->o + (t * a->Hv + head) * a->dv + col, n_cols, o);
    }
  }
}

/* `copy`, if not NULL, holds one block of state [dk][32]: rows then change that instead of the
 * state. */
static void run_blocks(const delta_rule_args *a, float *copy, int tid, int nt) {
  int n_rows = rows_of(a->cursor, a->T);
  int64_t blocks = ceil_div(a->dv, LANES);
  if (n_rows <= 0) return;
  span mine = share(a->Hv * blocks, tid, nt);
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    int64_t head = unit / blocks;
    int first = (int)(unit % blocks) * LANES, end = (int)min_of(first + LANES, a->dv);
    float *S = a->state + state_index(head, 0, first, a->dk, a->dv);
    if (copy) S = memcpy(copy, S, (size_t)a->dk * LANES * sizeof(float));
    for (int col = first; col < end; col += STRIP)
      run_strip(a, S + (col - first), head, col, n_rows);
  }
}

void op_delta_rule(const delta_rule_args *a, int tid, int nt) { run_blocks(a, NULL, tid, nt); }

void op_delta_verify(const delta_verify_args *v, int tid, int nt) {
  float copy[(int64_t)v->dk * LANES];
  delta_rule_args a = {.y = v->y,
                       .decay = v->decay,
                       .beta = v->beta,
                       .state = (float *)v->state,
                       .cursor = v->cursor,
                       .o = v->o,
                       .T = v->T,
                       .C = v->C,
                       .Hv = v->Hv,
                       .dk = v->dk,
                       .dv = v->dv,
                       .key_heads = v->key_heads};
  run_blocks(&a, copy, tid, nt); /* so that the state is only read */
}
