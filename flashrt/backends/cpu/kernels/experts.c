/* experts_in, experts_out: products with the weights of the experts that rows picked.
 *
 * Order: of a product that of op_linear, of a row's sum that of its picks, one fma each from 0. Which
 * rows share an expert, and which thread has them, changes no bit.
 *
 * Picks are grouped by expert, a thread claims panels of an expert, gathers the rows that picked it,
 * packs them for itself, and reads each panel once for all of them; where they are more than
 * MOST_ROWS, once for so many. With one row there is nothing to group: picks are the groups.
 * Products of experts_out meet in `products`, and are added up after a barrier.
 * Scratch: packed rows of each thread; with less, fewer rows go together.
 */
#include "fmath.h"
#include "gathered.h"

enum {
  MOST_ROWS = 60,       /* that are packed together: whole tiles of every kernel */
  SUMS = 8192,          /* of a block of rows and columns; two of them fit L2 with what is packed */
  MOST_CLAIM = 1 << 20, /* bytes of weights of a claim, as in linear.c */
  LEAST_CLAIM = 128 << 10,
  LEAST_PANELS = 4 /* of a claim of many rows: packing them again must not show */
};

/* Picks by expert. */
typedef struct {
  const int32_t *picks;
  int n_picks, per_row; /* of valid rows; of one of them */
  int n_groups;
  const int32_t (*groups)[2]; /* NULL: each pick is one. Else an expert, and its first member */
  const int32_t *members;     /* picks, those of a group by ascending rows */
} grouping;

typedef struct {
  int expert, n;
  const int32_t *members;
} group;

/* By thread 0, others wait. `groups` and `members` are the launch's workspace. */
static grouping group_picks(const int32_t *picks, int n_rows, int per_row, int n_experts,
                            int32_t *workspace, int32_t *members, int tid, int nt) {
  grouping g = {.picks = picks, .n_picks = n_rows * per_row, .per_row = per_row};
  if (n_rows == 1) {
    g.n_groups = per_row;
    return g;
  }
  int32_t (*groups)[2] = (void *)workspace;
  if (tid == 0) {
    memset(groups, 0, sizeof *groups * (size_t)n_experts);
    for (int i = 0; i < g.n_picks; i++) groups[picks[i]][1]++;
    for (int e = 0, first = 0; e < n_experts; e++) {
      groups[e][0] = first;
      first += groups[e][1];
    }
    for (int i = 0; i < g.n_picks; i++) members[groups[picks[i]][0]++] = i;
    int n = 0; /* groups[e][0] is now where e ends */
    for (int e = 0; e < n_experts; e++) {
      int size = groups[e][1], end = groups[e][0];
      if (!size) continue;
      groups[n][0] = e;
      groups[n++][1] = end - size;
    }
    if (n < n_experts) groups[n][0] = -1;
  }
  flashrt_barrier(nt);
  while (g.n_groups < n_experts && groups[g.n_groups][0] >= 0) g.n_groups++;
  g.groups = (const void *)groups;
  g.members = members;
  return g;
}

static group group_at(const grouping *g, int i, int32_t *only) {
  if (!g->groups) {
    *only = i;
    return (group){g->picks[i], 1, only};
  }
  int first = g->groups[i][1], end = i + 1 < g->n_groups ? g->groups[i + 1][1] : g->n_picks;
  return (group){g->groups[i][0], end - first, g->members + first};
}

/* ---- products ---- */

/* What rows of x become before they are multiplied. */
typedef struct {
  void (*pack)(gathered *x, void *room);
  void (*multiply)(const gathered *x, span panels, float *y, int64_t stride);
  int n_terms; /* see gathered */
} arithmetic;

static const arithmetic FLOATS = {flashrt_pack_floats, flashrt_multiply_floats, 0},
                        BFLOAT16 = {flashrt_pack_bfloat16, flashrt_multiply_bfloat16, 0},
                        INT8 = {flashrt_pack_integers, flashrt_multiply_integers, 1},
                        INT16 = {flashrt_pack_integers, flashrt_multiply_integers, 2};

/* What a launch multiplies with the panels of an expert, and what becomes of the sums. */
typedef struct job {
  grouping by;
  stored_matrix w;  /* of all experts */
  int64_t n_panels; /* of an expert */
  int n_parts;      /* into which they are halved: gate and up */
  const float *x;
  int per_row; /* picks that share a row of x */
  const arithmetic *in;
  char *room; /* of this thread, for n_room rows */
  int n_room;
  /* of picks x columns from `column` on; sums of each part are [pick][columns] */
  void (*take)(const struct job *job, const int32_t *picks, int n, int64_t column, int n_columns,
               const float *const *sums);
  const void *args;
} job;

/* A row that was packed alone. */
typedef struct {
  const float *row; /* NULL: none is */
  void *packed;
} lone_row;

/* Packs rows, unless the one row is there already. */
static void pack(const job *job, gathered *x, lone_row *last) {
  if (x->n == 1 && last->row == x->rows[0]) {
    x->packed = last->packed;
    return;
  }
  job->in->pack(x, job->room);
  *last = (lone_row){x->n == 1 ? x->rows[0] : NULL, x->packed};
}

/* Rows of a group, times panels [begin, end) of each part. */
static void multiply(const job *job, gathered *x, const int32_t *picks, span panels) {
  _Alignas(64) float sums[2][SUMS];
  int64_t at_once = max_of(1, SUMS / LANES / x->n), of_part = job->n_panels / job->n_parts;
  for (int64_t panel = panels.begin; panel < panels.end; panel += at_once) {
    int64_t n = min_of(at_once, panels.end - panel);
    for (int part = 0; part < job->n_parts; part++) {
      span own = {part * of_part + panel, part * of_part + panel + n};
      job->in->multiply(x, own, sums[part], n * LANES);
    }
    job->take(job, picks, x->n, panel * LANES, (int)n * LANES,
              (const float *const[]){sums[0], sums[1]});
  }
}

/* Units of a launch are panels of a part, group after group. */
static void run_units(const job *job, span units, lone_row *last) {
  int64_t of_group = job->n_panels / job->n_parts;
  for (int64_t unit = units.begin; unit < units.end;) {
    int32_t only;
    int64_t i = unit / of_group, first = unit - i * of_group;
    span panels = {first, min_of(of_group, first + units.end - unit)};
    group g = group_at(&job->by, (int)i, &only);
    gathered x = {.w = job->w, .N = job->n_panels * LANES, .n_terms = job->in->n_terms};
    x.w.base += g.expert * job->n_panels * x.w.panel_nbytes;
    int n_passes = (int)ceil_div(g.n, max_of(1, job->n_room));
    for (int pass = 0; pass < n_passes; pass++) {
      span of_pass = share(g.n, pass, n_passes);
      const float *rows[MOST_ROWS];
      x.n = (int)(of_pass.end - of_pass.begin);
      for (int m = 0; m < x.n; m++)
        rows[m] = job->x + g.members[of_pass.begin + m] / job->per_row * x.w.K;
      x.rows = rows;
      pack(job, &x, last);
      multiply(job, &x, g.members + of_pass.begin, panels);
    }
    unit += panels.end - panels.begin;
  }
}

/* Weights that stream for long enough go to threads in pieces, by claims; others in equal parts. */
static void run(job *job, int n_rows, int tid, int nt) {
  int64_t room = packed_nbytes(job->w.K);
  char *scratch = NULL;
  for (job->n_room = (int)min_of(n_rows, MOST_ROWS); job->n_room > 0; job->n_room /= 2) {
    if ((scratch = flashrt_scratch(nt * job->n_room * room))) break;
  }
  job->room = scratch ? scratch + tid * job->n_room * room : NULL;
  lone_row last = {0};
  int64_t n_units = job->by.n_groups * job->n_panels / job->n_parts;
  int64_t nbytes = job->w.panel_nbytes * job->n_parts;
  int is_few = job->by.n_picks < 4 * job->by.n_groups;
  if (is_few && n_units * nbytes < (int64_t)nt * MOST_CLAIM) {
    run_units(job, share(n_units, tid, nt), &last);
    return;
  }
  claim c = {.n = n_units, .nt = nt};
  c.most = is_few ? max_of(1, MOST_CLAIM / nbytes) : job->n_panels;
  c.least = is_few ? max_of(1, LEAST_CLAIM / nbytes) : LEAST_PANELS;
  while (flashrt_claim(&c)) run_units(job, c.mine, &last);
}

/* ---- ops ---- */

static void take_gated(const job *job, const int32_t *picks, int n, int64_t column, int n_columns,
                       const float *const *sums) {
  const experts_in_args *a = job->args;
  for (int m = 0; m < n; m++) {
    const float *gate = sums[0] + m * n_columns, *up = sums[1] + m * n_columns;
    float *h = (float *)a->h + (int64_t)picks[m] * a->I + column;
    for (int i = 0; i < n_columns; i += VL)
      v_store(h + i, v_silu(v_load(gate + i)) * v_load(up + i));
  }
}

static void take_products(const job *job, const int32_t *picks, int n, int64_t column,
                          int n_columns, const float *const *sums) {
  const experts_out_args *a = job->args;
  for (int m = 0; m < n; m++)
    memcpy(a->products + (int64_t)picks[m] * a->H + column, sums[0] + m * n_columns,
           (size_t)n_columns * sizeof(float));
}

static void experts_in(const experts_in_args *a, const arithmetic *in, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (rows < 1) return;
  job job = {.by = group_picks(a->picks, rows, a->P, a->E, a->groups, a->members, tid, nt),
             .w = STORED(a, w, a->H),
             .n_panels = 2 * a->I / LANES,
             .n_parts = 2,
             .x = a->x,
             .per_row = a->P,
             .in = in,
             .take = take_gated,
             .args = a};
  run(&job, rows, tid, nt);
}

/* y of valid rows, the products being there. */
static void add_up(const experts_out_args *a, int rows, int tid, int nt) {
  enum { COLUMNS = 256 };
  int64_t of_row = ceil_div(a->H, COLUMNS);
  span blocks = share(rows * of_row, tid, nt);
  for (int64_t i = blocks.begin; i < blocks.end; i++) {
    int64_t t = i / of_row, begin = i % of_row * COLUMNS, end = min_of(begin + COLUMNS, a->H);
    const float *products = a->products + t * a->P * a->H, *gates = a->gates + t * a->P;
    for (int64_t n = begin; n < end; n += VL) {
      vf sum = {0};
      for (int64_t j = 0; j < a->P; j++)
        sum = v_fma(v_set(gates[j]), v_load(products + j * a->H + n), sum);
      v_store(a->y + t * a->H + n, sum);
    }
  }
}

static void experts_out(const experts_out_args *a, const arithmetic *in, int tid, int nt) {
  int rows = rows_of(a->cursor, a->T);
  if (rows < 1) return;
  job job = {.by = group_picks(a->picks, rows, a->P, a->E, a->groups, a->members, tid, nt),
             .w = STORED(a, w, a->I),
             .n_panels = a->H / LANES,
             .n_parts = 1,
             .x = a->h,
             .per_row = 1,
             .in = in,
             .take = take_products,
             .args = a};
  run(&job, rows, tid, nt);
  flashrt_barrier(nt);
  add_up(a, rows, tid, nt);
}

#define EXPERTS(name, in)                                                 \
  void op_experts_in##name(const experts_in_args *a, int tid, int nt) {   \
    experts_in(a, &in, tid, nt);                                          \
  }                                                                       \
  void op_experts_out##name(const experts_out_args *a, int tid, int nt) { \
    experts_out(a, &in, tid, nt);                                         \
  }
EXPERTS(, FLOATS)
EXPERTS(_bfloat16, BFLOAT16)
EXPERTS(_int8, INT8)
EXPERTS(_int16, INT16)
