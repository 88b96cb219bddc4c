"""How many rows the largest launch of a prompt has: the rule, where nobody says it.

IS: `prefill_rows`, a pure function of a model and a backend. IS NOT: the buckets (models.model) or
their use (tokens). It exists because larger launches read the weights less often and fill a large
device better, and cost scratch in proportion to their rows.
"""

from __future__ import annotations

from flashrt.core.backend import Backend
from flashrt.core.planner import plan_arena, plan_band
from flashrt.models.model import PREFILL, PREFILL_ROWS, USUAL_PREFILL_ROWS, TokenModel

# Scratch may take so much of what weights take, for launches of more than the usual rows.
SCRATCH_SHARE = 1 / 8


def prefill_rows(model: TokenModel, backend: Backend, max_positions: int) -> int:
    """The most of PREFILL_ROWS that the backend gains from, that a lane holds, and whose scratch is
    at most SCRATCH_SHARE of the weights; USUAL_PREFILL_ROWS where none beyond them is.

    `model`: of at least the usual rows. Its scratch grows in proportion to rows.
    """
    if min(backend.most_rows, max_positions) <= USUAL_PREFILL_ROWS:
        return USUAL_PREFILL_ROWS
    tape = model.record(PREFILL, USUAL_PREFILL_ROWS)
    usual = plan_arena(model.lane_regions, (tape,), backend.storage, lanes=1, pool_nbytes=0)
    weights = plan_band([rule.region for rule in model.weights], backend.storage)
    by_scratch = SCRATCH_SHARE * weights.nbytes / usual.scratch.nbytes * USUAL_PREFILL_ROWS
    most = min(backend.most_rows, max_positions, by_scratch)
    return max([USUAL_PREFILL_ROWS, *(n for n in PREFILL_ROWS if n <= most)])
