"""Qwen3.5 and Qwen3-Next text models: Gated DeltaNet layers with full attention among them.

IS: the regions of a lane, and which tape a phase is. IS NOT: config fields (config), weight names
(weights) or the launches of a tape (tapes, draft).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from flashrt.base.errors import PlanError
from flashrt.core.region import DType, Layout, Region, Role
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
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
from flashrt.models.qwen35 import draft as drafting
from flashrt.models.qwen35.config import Qwen35Config, parse_config
from flashrt.models.qwen35.tapes import Qwen35Recorder
from flashrt.models.qwen35.weights import weight_rules
from flashrt.models.sight import sight_regions
from flashrt.weights.rules import Source, Stored, as_stored, in_bfloat16


class Qwen35:
    """One model at one context length. See `models.model.Model`."""

    name = "qwen3_5"
    identity: ClassVar[Mapping[str, object]] = {}  # all of it is in tapes, regions and constants

    def __init__(
        self,
        config: Qwen35Config,
        *,
        max_positions: int,
        kv_dtype: DType,
        has_draft_head: bool,
        stored: Callable[[Source], Stored] = in_bfloat16,
        prefill_rows: int = USUAL_PREFILL_ROWS,
        has_images: bool = False,
    ) -> None:
        """`stored` says how the checkpoint has each matrix: regions of weights are as it says."""
        check_choices(max_positions, kv_dtype, prefill_rows)
        self.buckets = buckets_up_to(prefill_rows)
        self.config = config
        self.vocab_size = config.vocab_size
        self._has_draft_head = has_draft_head
        self.max_positions = max_positions
        self.weights = as_stored(weight_rules(config, has_draft_head), stored)
        self.lane_regions: tuple[Region, ...] = _lane_regions(
            config, max_positions, kv_dtype, prefill_rows
        )
        if has_images:
            self.lane_regions += sight_regions(config.hidden, prefill_rows)
        self.phases: tuple[tuple[str, int], ...] = (
            *((PREFILL, rows) for rows in self.buckets),
            (DECODE, 1),
            (SAMPLE, 1),
        )
        if has_draft_head:
            self.lane_regions += drafting.lane_regions(config, max_positions, kv_dtype)
            self.phases += drafting.PHASES
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model."""
        own = drafting.SHARED_PHASES if self._has_draft_head and lanes > 1 else ()
        return (*token_shared_phases(lanes), *own)

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is in neither list."""
        shared = self.shared_phases(MAX_RUNS)
        known = (*self.phases, *shared)
        if (phase, rows) not in known:
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows; phases: {known}")
        if (phase, rows) in shared:
            tape = shared_tape(phase, rows, drafting.RUN_ROWS.get(phase, 0))
        else:
            tape = Tape(phase, rows)
        if phase in drafting.RUN_ROWS:
            drafting.record(self.config, self._regions, tape)
            return tape
        Qwen35Recorder(self.config, self._regions, tape).record()
        return tape


def _lane_regions(
    c: Qwen35Config, max_positions: int, kv_dtype: DType, prefill_rows: int
) -> tuple[Region, ...]:
    state = []
    if n := c.n_linear:
        heads, window = (
            (n, c.value_heads, c.key_dim, c.value_dim),
            (n, c.conv_taps - 1, c.conv_channels),
        )
        state = [
            Region("state", heads, DType.F32, Role.FIXED, Layout.COLUMN_BLOCKS, is_digested=True),
            Region("window", window, DType.F32, Role.FIXED, is_digested=True),
        ]
    rows = (c.n_full * c.kv_heads, max_positions, c.head_dim)
    return lane_regions(c.vocab_size, c.hidden, rows, kv_dtype, state, prefill_rows)


def build(config: Mapping[str, object], chosen: Choices) -> Qwen35:
    """See `models.model_for`."""
    return Qwen35(
        parse_config(
            config,
            chosen.lacks_head,
            chosen.has_draft_head,
            chosen.max_positions,
            has_images=chosen.has_images,
        ),
        max_positions=chosen.max_positions,
        kv_dtype=chosen.kv_dtype,
        has_draft_head=chosen.has_draft_head,
        stored=chosen.stored,
        prefill_rows=chosen.prefill_rows,
        has_images=chosen.has_images,
    )
