"""The cursors of a policy's lanes as the host knows them: no verb reads them from the device.

IS: a copy of each lane's words, moved on by the rules by which kernels move theirs. IS NOT: the
truth; that is on the device. Where the rules do not reach (a capsule from a file, an exception in
the middle of a verb), the copy is void, and the next question reads the device once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.models.actions import ActionConfig
from flashrt.ops.cursor import CURSOR_WORDS, NO_OBSERVATION, PolicyCursor, PolicyWord, read_cursor

Words = list[int]


class KnownCursors:
    """A copy per lane, void once the lane was put elsewhere; where there is none, the device is
    asked.

    A verb that changes words takes them, replays, moves them on, and keeps them. After an exception
    in between nobody knows how far the device came: then there is none. Each entry is swapped as a
    whole, with the number of moves that it is for.
    """

    def __init__(self, n_lanes: int, read: Callable[[Lane], Words]) -> None:
        self._read = read
        self._known: list[tuple[int, Words] | None] = [None] * n_lanes  # lane.moves, its words
        # Of an entry above, when the words were asked for by name.
        self._records: list[tuple[object, PolicyCursor] | None] = [None] * n_lanes
        self._frozen: weakref.WeakKeyDictionary[Capsule, Words] = weakref.WeakKeyDictionary()

    def words(self, lane: Lane) -> Words:
        """The words of a lane. Not to be changed."""
        return self._entry(lane)[1]

    def record(self, lane: Lane) -> PolicyCursor:
        """The words of a lane by name."""
        entry, record, at = self._known[lane.index], lane.record, self._records[lane.index]
        if entry is None or entry[0] != record.moves or record.is_moving:
            entry = self._entry(lane)
        if at is None or at[0] is not entry:
            at = self._records[lane.index] = (entry, read_cursor(entry[1]))
        return at[1]

    def take(self, lane: Lane) -> Words:
        """The words, to be changed and kept."""
        words = self._entry(lane)[1]
        self._known[lane.index] = None
        return words

    def keep(self, lane: Lane, words: Words) -> None:
        """The device's words are these now."""
        self._known[lane.index] = (lane.record.moves, words)

    def forget(self, lane: Lane) -> None:
        """Something writes to the lane that the rules below do not describe."""
        self._known[lane.index] = None

    def copy(self, source: Lane, target: Lane) -> None:
        """The target was put where the source is."""
        entry = self._known[source.index]
        if entry is not None and entry[0] == source.record.moves:
            self.keep(target, list(entry[1]))

    def freeze(self, lane: Lane, capsule: Capsule) -> None:
        """The capsule was taken of the lane: its words do not change any more."""
        entry = self._known[lane.index]
        if entry is not None and entry[0] == lane.record.moves:
            self._frozen[capsule] = list(entry[1])

    def thaw(self, lane: Lane, capsule: Capsule) -> None:
        """The lane was put into the capsule's state."""
        words = self._frozen.get(capsule)
        if words is not None:
            self.keep(lane, list(words))

    def clear(self, lane: Lane, seed: tuple[int, int]) -> None:
        """The lane is empty, with this seed: its low and its high word."""
        words = [0] * CURSOR_WORDS
        words[PolicyWord.OBSERVED] = NO_OBSERVATION
        words[PolicyWord.SEED_LOW], words[PolicyWord.SEED_HIGH] = seed
        self.keep(lane, words)

    def _entry(self, lane: Lane) -> tuple[int, Words]:
        entry, record = self._known[lane.index], lane.record
        if entry is None or entry[0] != record.moves or record.is_moving:
            entry = self._known[lane.index] = (record.moves, self._read(lane))
        return entry


# -- what kernels do to the words; see cuda_src/policy.cu -----------------------------------------


def observed(words: Words) -> None:
    """After op `observe`."""
    words[PolicyWord.OBSERVED] = words[PolicyWord.TICK]


def acted(words: Words, config: ActionConfig) -> None:
    """After op `take_action`."""
    tick, stop = words[PolicyWord.TICK], words[PolicyWord.STOP]
    row = tick - words[PolicyWord.CHUNK]
    if not (tick < stop and 0 <= row < config.chunk_size):
        words[PolicyWord.HELD] += 1
    words[PolicyWord.TICK] = tick + 1


def began(words: Words, committed: int, config: ActionConfig) -> None:
    """After op `flow_begin`; all of the `committed` rows were promised."""
    tick = words[PolicyWord.OBSERVED]
    words[PolicyWord.PLAN_TICK] = tick
    words[PolicyWord.PLAN_STOP] = tick + min(committed + config.n_action_steps, config.chunk_size)
    words[PolicyWord.PLAN_STEPS_LEFT] = config.num_inference_steps


def stepped(words: Words, steps: int = 1) -> None:
    """After op `flow_step`, `steps` times; after the last of all, after `flow_end` too."""
    words[PolicyWord.PLAN_STEPS_LEFT] -= steps
    if words[PolicyWord.PLAN_STEPS_LEFT] == 0:
        words[PolicyWord.CHUNK] = words[PolicyWord.PLAN_TICK]
        words[PolicyWord.STOP] = words[PolicyWord.PLAN_STOP]
