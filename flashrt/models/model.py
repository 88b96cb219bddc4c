"""The model protocol: what an engine asks of a model family.

IS: declarations (weight rules, lane regions, phases) and a recorder of tapes. IS NOT: memory, a
device, or a verb. It exists so that one engine runs every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from flashrt.core.region import Region
from flashrt.core.tape import Tape
from flashrt.weights.rules import WeightRule

# Rows of the prefill graphs; a launch of n rows takes the smallest that holds n.
BUCKETS = (1, 8, 64, 256)

# Phases of token models.
PREFILL, DECODE, SAMPLE = "prefill", "decode", "sample"
DRAFT, DRAFT_NEXT, VERIFY, COMMIT = "draft", "draft_next", "verify", "commit"


class Model(Protocol):
    """A model: config -> regions + tapes + weight rules."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, object]:
        """What of the config decides results and shows neither in the tapes nor in the regions;
        part of the fingerprint, as JSON.
        """
        ...

    @property
    def weights(self) -> tuple[WeightRule, ...]: ...
    @property
    def lane_regions(self) -> tuple[Region, ...]:
        """FIXED, ROWS and IO regions of one lane, in order."""
        ...

    @property
    def phases(self) -> tuple[tuple[str, int], ...]:
        """(phase, rows) of every tape that `record` knows."""
        ...

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of one phase. Raises PlanError for a pair that is not in `phases`."""
        ...


class TokenModel(Model, Protocol):
    """A model of tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def buckets(self) -> tuple[int, ...]:
        """Rows of the prefill graphs, ascending."""
        ...
