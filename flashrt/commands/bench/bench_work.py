"""How much a model asks of a machine, counted from its tapes.

IS: bytes of weights that a token streams, and multiply-adds of a prefill. IS NOT: measurement.
Called by: bench.
"""

from __future__ import annotations

from flashrt.core.backend import Backend
from flashrt.core.region import Role
from flashrt.models import Model
from flashrt.ops import table as ops


def streamed_bytes(model: Model, backend: Backend) -> int:
    """Bytes of weights that one decoded token reads, as they are stored.

    A table that is only gathered from counts for nothing; a tied head is read in whole.
    """
    read = {
        view.region
        for launch in model.record("decode", 1).launches
        if launch.op is not ops.EMBED
        for view in launch.operands
        if view.region.role is Role.WEIGHT
    }
    return sum(backend.storage(region).nbytes for region in read)


def prefill_flop(model: Model, n_tokens: int) -> int:
    """FLOP of a prefill from position 0: matrix products, delta rule and attention; two per
    multiply-add. Norms, gates, convolution and the softmax are left out: they are under a percent.
    """
    per_token, per_key = 0, 0
    for launch in model.record("prefill", 1).launches:
        dims = launch.dims
        if launch.op is ops.LINEAR:
            per_token += 2 * dims["N"] * dims["K"]
        elif launch.op is ops.DELTA_RULE:  # per state element: k.S, the update, q.S
            per_token += 6 * dims["Hv"] * dims["dk"] * dims["dv"]
        elif launch.op is ops.ATTENTION:  # per key and query element: q.k, p.v
            per_key += 4 * dims["Nq"] * dims["D"]
    return per_token * n_tokens + per_key * n_tokens * (n_tokens + 1) // 2
