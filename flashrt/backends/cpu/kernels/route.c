/* route: which experts a row goes to, and with what weight. add_gated: what an expert that every row
 * goes to adds.
 *
 * IS: a row at a time. Order: exp of all logits less the largest, summed in 16 lanes and a tree, as
 * sum_of_squares does; the gates of picks by ascending expert. IS NOT: the router's product.
 */
#include "common.h"
#include "fmath.h"

/* Whether x comes before y, which has the lower number: equals do not, and NaN comes last. */
static int is_better(float x, float y) { return x > y || (y != y && x == x); }

/* Sum of exp(x[i] - top), i in [0, n). */
static float sum_of_exp(const float *x, int n, float top) {
  float lanes[SUM_LANES] = {0};
  for (int i = 0; i < n; i += SUM_LANES) {
    for (int lane = 0; lane < SUM_LANES && i + lane < n; lane++)
      lanes[lane] += s_exp(x[i + lane] - top);
  }
  for (int half = SUM_LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

/* What experts of a row are ranked by, and what gates are made of. */
typedef struct {
  const float *logits;
  float top, all; /* the largest logit; the sum of exp of all, less that */
  int has_nan;
} router;

static router router_of(const route_args *a, const float *logits) {
  router r = {.logits = logits, .top = -INFINITY};
  for (int expert = 0; expert < a->E; expert++) {
    r.top = s_max(logits[expert], r.top);
    r.has_nan |= logits[expert] != logits[expert];
  }
  if (a->scoring == SCORING_SOFTMAX) r.all = sum_of_exp(logits, a->E, r.top);
  return r;
}

static float score_of(const route_args *a, const router *r, int expert) {
  float x = r->logits[expert];
  return a->scoring == SCORING_SOFTMAX ? s_exp(x - r->top) / r->all : s_sigmoid(x);
}

/* The P best, best first: picks[j], and what they are ranked by. */
static void pick(const route_args *a, const router *r, int32_t *picks, float *ranks) {
  int n = 0;
  for (int expert = 0; expert < a->E; expert++) {
    float rank = a->biased ? score_of(a, r, expert) + a->bias[expert] : r->logits[expert];
    if (n == a->P && !is_better(rank, ranks[n - 1])) continue;
    int at = n < a->P ? n++ : n - 1;
    for (; at > 0 && is_better(rank, ranks[at - 1]); at--) {
      ranks[at] = ranks[at - 1];
      picks[at] = picks[at - 1];
    }
    ranks[at] = rank;
    picks[at] = expert;
  }
}

static void sort(int32_t *x, int n) {
  for (int i = 1; i < n; i++) {
    int32_t moved = x[i];
    int at = i;
    for (; at > 0 && x[at - 1] > moved; at--) x[at] = x[at - 1];
    x[at] = moved;
  }
}

static void route_row(const route_args *a, const float *logits, int32_t *picks, float *gates) {
  const router r = router_of(a, logits);
  pick(a, &r, picks, gates);
  sort(picks, a->P);
  float sum = 0;
  for (int j = 0; j < a->P; j++) {
    gates[j] = score_of(a, &r, picks[j]);
    sum = sum + gates[j];
  }
  float over = a->normed ? sum + a->eps : 1.0f;
  for (int j = 0; j < a->P; j++) gates[j] = r.has_nan ? NAN : gates[j] / over * a->scale;
}

void op_route(const route_args *a, int tid, int nt) {
  span rows = share(rows_of(a->cursor, a->T), tid, nt);
  for (int64_t t = rows.begin; t < rows.end; t++)
    route_row(a, a->logits + t * a->logits_stride, a->picks + t * a->P, a->gates + t * a->P);
}

void op_add_gated(const add_gated_args *a, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  span columns = share(a->H, tid, nt);
  for (int64_t t = 0; t < rows; t++) {
    float *y = a->y + t * a->H;
    const float *x = a->x + t * a->H;
    float gate = a->gated ? s_sigmoid(a->gate[t * a->gate_stride]) : 1.0f;
    for (int64_t n = columns.begin; n < columns.end; n++) y[n] = y[n] + gate * x[n];
  }
}
