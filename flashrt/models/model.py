"""The model protocol: what an engine asks of a model family.

IS: declarations (weight rules, lane regions, phases) and a recorder of tapes. IS NOT: memory, a
device, or a verb. It exists so that one engine runs every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from flashrt.core.region import Region
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.weights.rules import WeightRule

# Rows of the prefill graphs; a launch of n rows takes the smallest that holds n. An engine has them
# up to the largest of PREFILL_ROWS that it is loaded with.
BUCKETS = (1, 8, 64, 256, 1024, 2048)
PREFILL_ROWS = BUCKETS[2:]
USUAL_PREFILL_ROWS = 256

# Phases of token models.
PREFILL, DECODE, SAMPLE = "prefill", "decode", "sample"
DRAFT, DRAFT_NEXT, VERIFY, COMMIT = "draft", "draft_next", "verify", "commit"
# Replays that lanes share. Together: decode, a row each; a replay of n lanes takes the smallest
# that holds n. Step: some rows of each, so few in all that nobody waits long for another's prompt.
TOGETHER, STEP = "together", "step"
STEP_ROWS = 64
_TOGETHER_LANES = (2, 4, 8, 16)
# What one lane does alone, done for each of several: samples after a prefill, drafts, verifies.
SAMPLE_EACH, DRAFT_EACH, DRAFT_NEXT_EACH = "sample_each", "draft_each", "draft_next_each"
VERIFY_EACH, COMMIT_EACH = "verify_each", "commit_each"
VERIFY_EACH_ROWS = 32
_RUN_ROWS = {TOGETHER: 1, SAMPLE_EACH: 1, DRAFT_EACH: 1, DRAFT_NEXT_EACH: 1}


def buckets_up_to(prefill_rows: int) -> tuple[int, ...]:
    """Rows of the prefill graphs of an engine with launches of up to `prefill_rows` rows."""
    return tuple(rows for rows in BUCKETS if rows <= prefill_rows)


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

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """(phase, rows) of replays that up to so many lanes share; `record` knows them too."""
        ...

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of one phase. Raises PlanError for a pair that is in neither."""
        ...


class TokenModel(Model, Protocol):
    """A model of tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def buckets(self) -> tuple[int, ...]:
        """Rows of the prefill graphs, ascending."""
        ...


def tapes_of(model: Model, lanes: int) -> tuple[Tape, ...]:
    """All tapes of an engine with so many lanes: those of `phases`, then those that lanes share."""
    phases = (*model.phases, *model.shared_phases(lanes))
    return tuple(model.record(phase, rows) for phase, rows in phases)


def token_shared_phases(lanes: int) -> tuple[tuple[str, int], ...]:
    """See Model.shared_phases."""
    if lanes < 2:
        return ()
    decodes = ((TOGETHER, n) for n in _TOGETHER_LANES if n < 2 * lanes)
    return (*decodes, (STEP, STEP_ROWS), (SAMPLE_EACH, MAX_RUNS))


def shared_tape(phase: str, rows: int, run_rows: int = 0) -> Tape:
    """An empty tape of one that lanes share, each with at most `run_rows` rows."""
    run_rows = _RUN_ROWS.get(phase, run_rows)
    max_runs = rows if run_rows == 1 else MAX_RUNS
    return Tape(phase, rows, max_runs, run_rows, is_apart=phase == COMMIT_EACH)
