"""Granite-4.0-H: layers of Mamba-2 with attention among them, each with an MLP, or experts too.

IS: the regions of a lane, and which tape a phase is. IS NOT: config fields (config), weight names
(weights) or the launches of a tape (tapes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flashrt.base.errors import PlanError
from flashrt.core.region import DType, Layout, Region, Role
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.granite.config import GraniteConfig, LayerKind, parse_config
from flashrt.models.granite.tapes import GraniteRecorder
from flashrt.models.granite.weights import weight_rules
from flashrt.models.lane import Choices, check_choices, lane_regions
from flashrt.models.model import (
    DECODE,
    PREFILL,
    SAMPLE,
    USUAL_PREFILL_ROWS,
    buckets_up_to,
    shared_tape,
    token_shared_phases,
)
from flashrt.weights.rules import Source, Stored, as_stored, in_bfloat16


class Granite:
    """One model at one context length. See `models.model.Model`."""

    name = "granitemoehybrid"

    def __init__(
        self,
        config: GraniteConfig,
        *,
        max_positions: int,
        kv_dtype: DType,
        stored: Callable[[Source], Stored] = in_bfloat16,
        prefill_rows: int = USUAL_PREFILL_ROWS,
    ) -> None:
        """`stored` says how the checkpoint has each matrix: regions of weights are as it says."""
        check_choices(max_positions, kv_dtype, prefill_rows)
        self.buckets = buckets_up_to(prefill_rows)
        self.phases: tuple[tuple[str, int], ...] = (
            *((PREFILL, rows) for rows in self.buckets),
            (DECODE, 1),
            (SAMPLE, 1),
        )
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_positions = max_positions
        # the weights of the last norm hold it, and shapes do not show it
        self.identity: Mapping[str, object] = {"logits_scaling": config.logits_scaling}
        self.weights = as_stored(weight_rules(config), stored)
        self.lane_regions: tuple[Region, ...] = _lane_regions(
            config, max_positions, kv_dtype, prefill_rows
        )
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model."""
        return token_shared_phases(lanes)

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is in neither list."""
        shared = self.shared_phases(MAX_RUNS)
        known = (*self.phases, *shared)
        if (phase, rows) not in known:
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows; phases: {known}")
        tape = shared_tape(phase, rows) if (phase, rows) in shared else Tape(phase, rows)
        GraniteRecorder(self.config, self._regions, tape).record()
        return tape


def _lane_regions(
    c: GraniteConfig, max_positions: int, kv_dtype: DType, prefill_rows: int
) -> tuple[Region, ...]:
    state = []
    if n := c.count(LayerKind.MAMBA):
        heads = (n, c.ssm_heads, c.state_dim, c.ssm_head_dim)
        window = (n, c.conv_taps - 1, c.conv_channels)
        state = [
            Region("state", heads, DType.F32, Role.FIXED, Layout.COLUMN_BLOCKS, is_digested=True),
            Region("window", window, DType.F32, Role.FIXED, is_digested=True),
        ]
    rows = (c.count(LayerKind.ATTENTION) * c.kv_heads, max_positions, c.head_dim)
    return lane_regions(c.vocab_size, c.hidden, rows, kv_dtype, state, prefill_rows)


def build(config: Mapping[str, object], chosen: Choices) -> Granite:
    """See `models.model_for`; models of this family have no draft head."""
    return Granite(
        parse_config(config, chosen.lacks_head, chosen.max_positions),
        max_positions=chosen.max_positions,
        kv_dtype=chosen.kv_dtype,
        stored=chosen.stored,
        prefill_rows=chosen.prefill_rows,
    )
