"""Dense decoders: Llama, Mistral, Qwen2, Qwen3, SmolLM3; every layer attention and MLP.

IS: the regions of a lane, and which tape a phase is. IS NOT: config fields (config), weight names
(weights) or the launches of a tape (tapes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from flashrt.base.errors import PlanError
from flashrt.core.region import DType, Region
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.dense.config import DenseConfig, parse_config
from flashrt.models.dense.tapes import DenseRecorder
from flashrt.models.dense.weights import weight_rules
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


class Dense:
    """One model at one context length. See `models.model.Model`."""

    identity: ClassVar[Mapping[str, object]] = {}  # all of it is in tapes, regions and constants

    def __init__(
        self,
        config: DenseConfig,
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
        self.name = config.model_type
        self.vocab_size = config.vocab_size
        self.max_positions = max_positions
        self.weights = as_stored(weight_rules(config), stored)
        rows = (config.n_layers * config.kv_heads, max_positions, config.head_dim)
        self.lane_regions: tuple[Region, ...] = lane_regions(
            config.vocab_size, config.hidden, rows, kv_dtype, prefill_rows=prefill_rows
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
        DenseRecorder(self.config, self._regions, tape).record()
        return tape


def build(config: Mapping[str, object], chosen: Choices) -> Dense:
    """See `models.model_for`; models of this family have no draft head."""
    return Dense(
        parse_config(config, chosen.lacks_head, chosen.max_positions),
        max_positions=chosen.max_positions,
        kv_dtype=chosen.kv_dtype,
        stored=chosen.stored,
        prefill_rows=chosen.prefill_rows,
    )
