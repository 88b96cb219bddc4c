"""Verbs of an engine on actions: observe, act, tick, plan; a graph replay each.

IS: what a robot policy's engine does to a lane. IS NOT: checks of what comes in (numbers), what a
plan stands on (prefix), nor a control loop with a clock, deadlines or files; see robot/.

A lane's whole control state is its fixed band: cursor, memory, previous action, queue, and the
chunk in the making. An interrupt falls between two replays: the cursor on the device says where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashrt.base.checks import as_integer, shown
from flashrt.base.errors import (
    CapsuleError,
    CheckpointError,
    ObservationError,
    PoolFull,
    SessionError,
)
from flashrt.base.float_mode import DefaultFloatMode
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.file import CapsuleHeader
from flashrt.capsule.lineage import Lane
from flashrt.capsule.turn import in_turn
from flashrt.core.backend import Backend, Bytes
from flashrt.core.planner import Slot
from flashrt.core.runs import MAX_RUNS, Run
from flashrt.engine import cursors
from flashrt.engine.admission import check_action_state
from flashrt.engine.cursors import KnownCursors
from flashrt.engine.engine import Engine, PoolDefault
from flashrt.engine.numbers import (
    Action,
    Given,
    checked_action,
    checked_rows,
    checked_vector,
    checked_vectors,
    packed,
)
from flashrt.engine.packed import Packed, packed_parts, unpacked
from flashrt.engine.prefix import Prefixes
from flashrt.models.actions import (
    ACT_EACH,
    ACT_PHASE,
    OBSERVE,
    OBSERVE_EACH,
    PLAN,
    PLAN_BEGIN,
    PLAN_BEGIN_EACH,
    PLAN_EACH,
    PLAN_STEP,
    PLAN_STEP_EACH,
    SHARED,
    TICK,
    TICK_EACH,
    ActionModel,
)
from flashrt.models.prefix import PrefixModel
from flashrt.ops.cursor import (
    CURSOR_WORDS,
    NO_OBSERVATION,
    REQUEST_WORDS,
    PolicyCursor,
    PolicyWord,
    RequestWord,
    seed_words,
)
from flashrt.weights.checkpoint import Checkpoint

POOL_DEFAULT = PoolDefault(fixed=256, lanes=4)  # most policies have no rows
# Graphs that touch less run on the calling thread, a millisecond at most: two threads were a third
# faster when both were awake, and ten times slower when one was not.
CPU_ALONE_NBYTES = 32 << 20
STATISTICS = "stats."  # begins the names of weights that scale observations and actions
_T = TypeVar("_T")


def check_statistics(policy: ActionModel, found: Mapping[str, Action]) -> None:
    """Raises CheckpointError for statistics, by region, that are not finite, or divide by 0."""
    for name, values in found.items():
        is_divisor = name in policy.positive
        if not np.isfinite(values).all() or (is_divisor and (values <= 0).any()):
            wanted = "positive" if is_divisor else "finite"
            raise CheckpointError(f"{name} is {values}; {wanted} numbers are needed")


class ActionEngine(Engine):
    """Verbs on lanes of a policy."""

    def __init__(
        self, policy: ActionModel, checkpoint: Checkpoint, backend: Backend, **options: Any
    ) -> None:
        """policy, checkpoint: as `models.policies.policy_for` has them. See Engine for the options.
        Raises CheckpointError for statistics that divide by 0.
        """
        self.policy = policy
        self.config = policy.config
        super().__init__(policy, checkpoint, backend, pool_default=POOL_DEFAULT, **options)
        plan = self.arena.plan
        self._addresses = {
            (lane.index, slot.region.name): self.arena.memory.address + slot.offset
            for lane in self.lanes
            for band in (plan.lanes[lane.index].fixed, plan.lanes[lane.index].io)
            for slot in band.slots
        }
        self._sizes = {region.name: region.size for region in self.policy.lane_regions}
        self._kept: list[tuple[Capsule, ...]] = [() for _ in self.lanes]  # see keep_boundary
        self._cursors = KnownCursors(len(self.lanes), self._read_words)
        # Of a policy without memory: the last observation of each lane, with the number of the move
        # that it was seen after. No capsule has it: a plan from elsewhere observes first.
        self._seen: list[tuple[int, Action | Packed] | None] = [None] * len(self.lanes)
        self._prefixes: Prefixes | None = None
        if isinstance(self.policy, PrefixModel):
            self._prefixes = Prefixes(
                self.policy,
                lambda lane, name: plan.lanes[lane.index].io.slot(name),
                write=self._write,
                read=self.lane_array,
                run=self._run,
                move=lambda moves: self.backend.copy(
                    moves, self.arena.memory.address, self.arena.memory.address
                ),
            )
        self._shared = frozenset(self.policy.shared_phases(len(self.lanes)))
        self._scale, self._offset = self._statistics()

    # -- verbs, a replay each --------------------------------------------------------------------

    def observation_names(self) -> tuple[str, ...]:
        """Of the parts of an observation; none where it is a vector alone."""
        return tuple(part.name for part in self.policy.parts)

    def optional_names(self) -> tuple[str, ...]:
        """Of the parts that an observation may lack, as long as it has one of them."""
        prefixes = self._prefixes
        return () if prefixes is None else tuple(c.name for c in prefixes.model.cameras)

    def pack(self, observation: Mapping[str, ArrayLike]) -> Action:
        """An observation that is given by names, as the vector float32 [observation_dim] that every
        verb takes. Raises ObservationError: for a policy that takes vectors alone, too.

        Of a policy of cameras and a task it is `Packed`, which numpy makes the vector of: ticks
        that nothing is planned from need no numbers.
        """
        if self._prefixes is not None:
            return cast(Action, packed_parts(self._prefixes.model, observation))
        return packed(self.policy.parts, observation)

    def taken(self, observation: Action) -> Action:
        """A vector that was checked, as `pack` would have it. Raises ObservationError for one that
        is no observation all the same.
        """
        if self._prefixes is None or isinstance(observation, Packed):
            return observation
        return cast(Action, unpacked(self._prefixes.model, observation))

    def observe(self, lane: Lane, observation: ArrayLike | Mapping[str, ArrayLike]) -> None:
        """An observation, float32 [observation_dim] or by names (see `pack`), into the memory; no
        action is taken.

        Raises ObservationError for another shape or dtype, or a value that is not finite, and
        changes nothing.
        """
        self.observe_trusted(lane, self._checked(observation))

    def observe_trusted(self, lane: Lane, observation: Action) -> None:
        """`observe` of a float32 array that the caller has checked: see `checked_vector`. It must
        not change before the next plan.
        """
        words = self._cursors.take(lane)
        self._bring(lane, observation)
        self._run(OBSERVE, lane)
        cursors.observed(words)
        self._cursors.keep(lane, words)

    def act(self, lane: Lane, *, hold: bool = False) -> Action:
        """The coming tick's action, float32 [action_dim], in the environment's units.

        Raises SessionError when the queue has none (`plan` first), unless `hold`: then the action
        before is repeated. Nothing is changed by a refusal.
        """
        self._need_action(lane, hold)
        words = self._cursors.take(lane)
        self._run(ACT_PHASE, lane)
        cursors.acted(words, self.config)
        self._cursors.keep(lane, words)
        return self._acted(lane)

    def tick(
        self, lane: Lane, observation: ArrayLike | Mapping[str, ArrayLike], *, hold: bool = False
    ) -> Action:
        """`observe` and `act` in one replay."""
        return self.tick_trusted(lane, self._checked(observation), hold=hold)

    def tick_trusted(self, lane: Lane, observation: Action, *, hold: bool = False) -> Action:
        """`tick` with a float32 array that the caller has checked: see `checked_vector`."""
        self._need_action(lane, hold)
        words = self._cursors.take(lane)
        self._bring(lane, observation)
        self._run(TICK, lane)
        cursors.observed(words)
        cursors.acted(words, self.config)
        self._cursors.keep(lane, words)
        return self._acted(lane)

    def plan(self, lane: Lane, committed: int = 0, *, given: Given | None = None) -> None:
        """A new chunk of actions from the last observation, in place of the queue's.

        Row j of the chunk is for tick t + j, t the tick of that observation. The first `committed`
        rows keep the action promised for their tick, bit for bit (after `act`, that of row 0 is the
        one just taken). Then `cursor.stop` = t + committed + n_action_steps, at most t +
        chunk_size. Raises SessionError when there is no fresh observation, or fewer actions were
        promised; nothing is changed then.

        given: what the plan starts from in place of noise of its own and of the queue; for policies
        that integrate rows of noise. Raises ObservationError for what does not fit.
        """
        self._begin(PLAN, lane, committed, self.config.num_inference_steps, given)

    def begin_plan(self, lane: Lane, committed: int = 0, *, given: Given | None = None) -> None:
        """`plan` in slices: begins a chunk, in place of any that is in the making."""
        self._begin(PLAN_BEGIN, lane, committed, 0, given)

    def continue_plan(self, lane: Lane) -> bool:
        """One Euler step of the chunk in the making; True when that was the last, and the queue was
        replaced. Ticks may lie between steps. Raises SessionError if none is in the making.
        """
        left = self._steps_left(lane)
        words = self._cursors.take(lane)
        self._place_suffix(lane)
        self._run(PLAN_STEP, lane, self.config.num_inference_steps - left + 1)
        cursors.stepped(words)
        self._cursors.keep(lane, words)
        return left == 1

    def checked_given(self, given: Given) -> Given:
        """What a plan is given, as float32. Raises ObservationError for what does not fit."""
        if self._prefixes is None:
            raise ObservationError("given: this policy does not integrate rows of noise")
        c, is_guided = self.config, bool(self._prefixes.model.guided(None, 0, None))
        noise, left = given.noise, given.left_over
        if left is not None and not is_guided:
            raise ObservationError(
                "left_over: real-time chunking is off: set rtc_config, enabled, in config.json"
            )
        if noise is not None:
            noise = checked_rows("noise", noise, (c.chunk_size, c.max_action_dim))
        if left is not None:
            left = checked_rows("left_over", left, (None, c.action_dim))
            if len(left) > c.chunk_size:
                raise ObservationError(f"left_over: {len(left)} rows of a chunk of {c.chunk_size}")
        for name, value in (("delay", given.delay), ("horizon", given.horizon or 0)):
            whole = as_integer(value)
            if whole is None or whole < 0:
                raise ObservationError(f"{name} is {shown(value)}, expected a whole number")
        return Given(noise, left, given.delay, given.horizon)

    # -- verbs of several lanes, a replay for all ------------------------------------------------
    # The bits are those of each lane alone. Each raises SessionError for no lane, a lane that is
    # named twice or more than `most_together`, and what its own verb raises for any of them; then
    # nothing has changed.

    @property
    def most_together(self) -> int:
        """Lanes that one replay can tick, or plan."""
        return min(len(self.lanes), MAX_RUNS)

    def tick_together(
        self, lanes: Sequence[Lane], observations: Sequence[ArrayLike], *, hold: bool = False
    ) -> list[Action]:
        """`tick` of up to `most_together` lanes in one replay, each with its own observation. The
        bits are those of each lane alone; so are the errors, before anything is changed.
        """
        checked = [
            self.taken(vector)
            for vector in checked_vectors("observation", observations, self.config.observation_dim)
        ]
        return [checked_action(a) for a in self.tick_together_trusted(lanes, checked, hold=hold)]

    def tick_together_trusted(
        self, lanes: Sequence[Lane], observations: Sequence[Action], *, hold: bool = False
    ) -> list[Action]:
        """`tick_together` with float32 arrays that the caller has checked; and it is the caller who
        looks whether an action is finite, so that one lane's overflow is not the others'.
        """
        self._check_together(lanes, observations)
        for lane in lanes:
            self._need_action(lane, hold)
        taken = [self._cursors.take(lane) for lane in lanes]
        for lane, observation in zip(lanes, observations, strict=True):
            self._bring(lane, observation)
        self._run_each(TICK_EACH, lanes)
        for lane, words in zip(lanes, taken, strict=True):
            cursors.observed(words)
            cursors.acted(words, self.config)
            self._cursors.keep(lane, words)
        return [self.action(lane) for lane in lanes]

    def observe_together_trusted(
        self, lanes: Sequence[Lane], observations: Sequence[Action]
    ) -> None:
        """`observe_trusted` of several lanes in one replay."""
        self._check_together(lanes, observations)
        taken = [self._cursors.take(lane) for lane in lanes]
        for lane, observation in zip(lanes, observations, strict=True):
            self._bring(lane, observation)
        self._run_each(OBSERVE_EACH, lanes)
        for lane, words in zip(lanes, taken, strict=True):
            cursors.observed(words)
            self._cursors.keep(lane, words)

    def act_together(self, lanes: Sequence[Lane], *, hold: bool = False) -> list[Action]:
        """`act` of several lanes in one replay. Whether an action is finite is the caller's to look
        at, as in `tick_together_trusted`.
        """
        self._check_together(lanes)
        for lane in lanes:
            self._need_action(lane, hold)
        taken = [self._cursors.take(lane) for lane in lanes]
        self._run_each(ACT_EACH, lanes)
        for lane, words in zip(lanes, taken, strict=True):
            cursors.acted(words, self.config)
            self._cursors.keep(lane, words)
        return [self.action(lane) for lane in lanes]

    def plan_together(self, lanes: Sequence[Lane], committed: int | Sequence[int] = 0) -> None:
        """`plan` of several lanes in one replay; `committed` of all, or of each."""
        self._begin_together(PLAN_EACH, lanes, committed, self.config.num_inference_steps)

    def begin_plan_together(
        self, lanes: Sequence[Lane], committed: int | Sequence[int] = 0
    ) -> None:
        """`begin_plan` of several lanes in one replay; `committed` of all, or of each."""
        self._begin_together(PLAN_BEGIN_EACH, lanes, committed, 0)

    def continue_plan_together(self, lanes: Sequence[Lane]) -> bool:
        """`continue_plan` of several lanes in one replay, whose chunks are at the same Euler step;
        SessionError if they are not.
        """
        self._check_together(lanes)
        lefts = [self._steps_left(lane) for lane in lanes]
        if len(set(lefts)) > 1:
            raise SessionError(
                f"lanes {[lane.index for lane in lanes]} together: {lefts} Euler steps are left of "
                "their chunks; those of one replay are at the same step"
            )
        taken = [self._cursors.take(lane) for lane in lanes]
        for lane in lanes:
            self._place_suffix(lane)
        self._run_each(PLAN_STEP_EACH, lanes, self.config.num_inference_steps - lefts[0] + 1)
        for lane, words in zip(lanes, taken, strict=True):
            cursors.stepped(words)
            self._cursors.keep(lane, words)
        return lefts[0] == 1

    # -- words and regions -----------------------------------------------------------------------

    def cursor(self, lane: Lane) -> PolicyCursor:
        """The lane's time. The host knows it; the device is read after a restore or an exception
        alone.
        """
        return self._cursors.record(lane)

    def reset(self, lane: Lane, seed: int = 0) -> None:
        """The empty state before tick 0; `seed` is that of the noise of chunks."""
        words = seed_words(seed)
        self.capsules.reset(lane)
        lane.overwrite()
        self._write(lane, "cursor", words, PolicyWord.SEED_LOW)
        self._write_word(lane, PolicyWord.OBSERVED, NO_OBSERVATION)
        self._cursors.clear(lane, (int(words[0]), int(words[1])))

    def set_seed(self, lane: Lane, seed: int) -> None:
        """Other noise for chunks from here on, as of a fork."""
        low_high = seed_words(seed)
        words = self._cursors.take(lane)
        self._write(lane, "cursor", low_high, PolicyWord.SEED_LOW)
        words[PolicyWord.SEED_LOW], words[PolicyWord.SEED_HIGH] = map(int, low_high)
        self._cursors.keep(lane, words)

    def cut(self, lane: Lane, stop: int = 0) -> None:
        """An interrupt: the queue has no action from tick `stop` on, no chunk is in the making, and
        none is made from what was observed so far.
        """
        whole = as_integer(stop)
        if whole is None:
            raise SessionError(f"cut: stop={shown(stop)} is not a tick's number")
        words = self._cursors.take(lane)
        changes = {
            PolicyWord.STOP: max(0, min(whole, words[PolicyWord.STOP])),
            PolicyWord.PLAN_STEPS_LEFT: 0,
            PolicyWord.OBSERVED: NO_OBSERVATION,
        }
        for word, value in changes.items():
            self._write_word(lane, word, value)
            words[word] = value
        for name in self.policy.cut_off:
            self._write(lane, name, np.zeros(self._sizes[name], np.float32))
        self._cursors.keep(lane, words)

    def action(self, lane: Lane) -> Action:
        """The action executed last, [action_dim] in the environment's units; 0 after a reset."""
        out = np.empty(self.config.action_dim, np.float32)
        self.backend.read(self._addresses[lane.index, "action"], out.view(np.uint8))
        return out

    def chunk(self, lane: Lane) -> Action:
        """All rows of the queue, [chunk_size, action_dim] in the environment's units, to within a
        rounding of what `act` will give.
        """
        queue = self.lane_array(lane, "queue").astype(np.float64)
        with DefaultFloatMode():
            return (queue * self._scale + self._offset).astype(np.float32)

    def is_last_observation_used(self, lane: Lane) -> bool:
        """Whether the lane's state depends on what it observed last: else a tick that is run again
        needs no observation.
        """
        words = self._cursors.words(lane)
        tick, is_planning = words[PolicyWord.OBSERVED], words[PolicyWord.PLAN_STEPS_LEFT]
        return (
            self.policy.has_memory
            or words[PolicyWord.CHUNK] == tick
            or bool(is_planning and words[PolicyWord.PLAN_TICK] == tick)
        )

    def override(self, lane: Lane, action: ArrayLike) -> None:
        """Something else than the last action was executed: this, [action_dim], in the
        environment's units. Raises ObservationError, as `observe` does.
        """
        executed = checked_vector("action", action, self.config.action_dim)
        limit, is_scaled = self.policy.action_limit, self._scale != 0
        with DefaultFloatMode(), np.errstate(over="ignore"):
            previous = np.zeros_like(executed)
            np.divide(executed - self._offset, self._scale, out=previous, where=is_scaled)
            np.clip(previous, -limit, limit, out=previous)
        self._write(lane, "previous", previous)
        self._write(lane, "action", executed)

    # -- capsules ---------------------------------------------------------------------------------

    def snapshot(
        self, lane: Lane, name: str | None = None, parent: Capsule | None = None
    ) -> Capsule:
        """Freeze a lane between two verbs. Raises PoolFull and changes nothing."""
        try:
            capsule = self.capsules.snapshot(lane, name, parent)
        except PoolFull:
            capsule = self.with_room(lambda: self.capsules.snapshot(lane, name, parent))
        self._cursors.freeze(lane, capsule)
        return capsule

    @in_turn
    def keep_boundary(self, lane: Lane) -> Capsule:
        """A snapshot that goes with the lane: it stays on the device, and is dropped when the lane
        is released, or is free because its owner is no more. Raises PoolFull and changes nothing.
        """
        capsule = self.snapshot(lane)
        capsule.is_pinned = True
        self._kept[lane.index] = (*self.kept_boundaries(lane), capsule)
        self.turn.keep()
        return capsule

    def kept_boundaries(self, lane: Lane) -> tuple[Capsule, ...]:
        """Those that were kept and not dropped, the oldest first."""
        return tuple([c for c in self._kept[lane.index] if not c.is_dropped])

    def check_capsule(self, capsule: Capsule) -> None:
        """Raises CapsuleError for what is no capsule, or is dropped, or another engine's."""
        if not isinstance(capsule, Capsule):
            raise CapsuleError(f"restore: {shown(capsule)} is not a capsule")
        self.capsules.check(capsule)

    def restore(self, lane: Lane, capsule: Capsule) -> None:
        """Put a lane into a capsule's state. Raises CapsuleError and changes nothing."""
        if not isinstance(capsule, Capsule):
            raise CapsuleError(f"restore: {shown(capsule)} is not a capsule")
        self.capsules.restore(lane, capsule)
        self._cursors.thaw(lane, capsule)

    def fork(self, source: Lane, target: Lane) -> None:
        """Put `target` into the present state of `source`."""
        self.capsules.fork(source, target)
        self._cursors.copy(source, target)

    def digest(self, lane: Lane) -> str:
        """32 hex digits of a lane's state; a capsule of it has the same."""
        return self.capsules.digest_lane(lane)

    # -- for the base -----------------------------------------------------------------------------

    def take_lane(self, owner: object) -> Lane:
        """See Engine."""
        lane = super().take_lane(owner)
        self._drop_kept(lane, *self.free_lanes)
        return lane

    def release(self, lane: Lane) -> None:
        """See Engine."""
        super().release(lane)
        self._drop_kept(lane)

    def with_room(self, take: Callable[[], _T]) -> _T:
        """See Engine; boundaries of lanes whose owners are no more give way, too."""
        try:
            return super().with_room(take)
        except PoolFull:
            if not self._drop_kept(*self.free_lanes):
                raise
            return super().with_room(take)

    def set_lane_array(self, lane: Lane, name: str, array: NDArray[np.generic]) -> None:
        """See Engine."""
        self._cursors.forget(lane)  # the region may be the cursor
        self._forget_prefix(lane)
        super().set_lane_array(lane, name, array)

    def poison_lane(self, lane: Lane) -> None:
        """See Engine."""
        self._cursors.forget(lane)
        self._forget_prefix(lane)
        super().poison_lane(lane)

    def admit(
        self, header: CapsuleHeader, tensors: Mapping[str, Bytes], tokens: NDArray[np.int32]
    ) -> None:
        """See Engine."""
        check_action_state(str(header.path), tensors, self.config, self.policy.finite)
        if self._prefixes is not None:
            most = self._prefixes.model.most_prefix_rows
            if header.position > most:
                raise CapsuleError(
                    f"{header.path}: {header.position} rows; an observation has {most} at most"
                )

    # -- inside -----------------------------------------------------------------------------------

    def _drop_kept(self, *lanes: Lane) -> bool:
        """Drop the boundaries that were kept of some lanes; whether there were any."""
        kept = [capsule for lane in lanes for capsule in self.kept_boundaries(lane)]
        for capsule in kept:
            capsule.drop()
        return bool(kept)

    def _run(self, phase: str, lane: Lane, rows: int = 1) -> None:
        self.replay(phase, rows, (Run(lane.index, rows),))
        self.boundary()

    def _run_each(self, phase: str, lanes: Sequence[Lane], rows: int = 1) -> None:
        if len(lanes) == 1 or (phase, rows) not in self._shared:
            for lane in lanes:  # an engine of one lane has no graphs to share, others not all
                self._run(SHARED[phase], lane, rows)
        else:
            self.replay(phase, rows, tuple(Run(lane.index, rows) for lane in lanes))
            self.boundary()

    def _check_together(self, lanes: Sequence[Lane], each: Sequence[object] | None = None) -> None:
        """`each`: what there is one of for each lane."""
        indices = [lane.index for lane in lanes]
        if not 1 <= len(set(indices)) == len(indices) <= self.most_together:
            raise SessionError(
                f"lanes {indices} together: one replay is about 1 to {self.most_together} of them, "
                "each once"
            )
        if each is not None and len(each) != len(lanes):
            raise SessionError(f"lanes {indices} together: got {len(each)} values for them")

    def _begin_together(
        self, phase: str, lanes: Sequence[Lane], committed: int | Sequence[int], steps: int
    ) -> None:
        each = committed if isinstance(committed, Sequence) else [committed] * len(lanes)
        self._check_together(lanes, each)
        rows = [self._committed(lane, n) for lane, n in zip(lanes, each, strict=True)]
        taken = [self._cursors.take(lane) for lane in lanes]
        for lane, words, n in zip(lanes, taken, rows, strict=True):
            self._ask(lane, words, n, None)
        self._run_each(phase, lanes)
        for lane, words, n in zip(lanes, taken, rows, strict=True):
            cursors.began(words, n, self.config)
            if steps:
                cursors.stepped(words, steps)
            self._cursors.keep(lane, words)

    def _begin(
        self, phase: str, lane: Lane, committed: int, steps: int, given: Given | None
    ) -> None:
        """A graph that begins a chunk and does `steps` of its Euler steps."""
        rows = self._committed(lane, committed)
        checked = None if given is None else self.checked_given(given)
        words = self._cursors.take(lane)
        self._ask(lane, words, rows, checked)
        self._run(phase, lane)
        cursors.began(words, rows, self.config)
        if steps:
            cursors.stepped(words, steps)
        self._cursors.keep(lane, words)

    def _ask(self, lane: Lane, words: list[int], committed: int, given: Given | None) -> None:
        """All that a plan begins with is on the device."""
        self._bring_last(lane)
        request = np.zeros(REQUEST_WORDS, np.int32)
        request[RequestWord.COMMITTED] = committed
        if given is not None and given.noise is not None:
            request[RequestWord.GIVEN] = 1
            self._write(lane, "given", np.ascontiguousarray(given.noise))
        self._write(lane, "request", request)
        if self._prefixes is not None and self._prefixes.model.guided(None, 0, None):
            left, delay, horizon = self._left_over(lane, words), committed, None
            if given is not None:
                left, delay, horizon = given.left_over, given.delay, given.horizon
            for name, array in self._prefixes.model.guided(left, delay, horizon).items():
                self._write(lane, name, array)

    def _left_over(self, lane: Lane, words: list[int]) -> Action | None:
        """Rows of the queue from the observed tick on, as the model has them; None where nothing
        is promised.
        """
        first = words[PolicyWord.OBSERVED] - words[PolicyWord.CHUNK]
        is_promised = words[PolicyWord.STOP] > words[PolicyWord.OBSERVED]
        if not is_promised or not 0 <= first < self.config.chunk_size:
            return None
        return np.asarray(self.lane_array(lane, "queue")[first:], np.float32)

    def _read_words(self, lane: Lane) -> list[int]:
        words = np.empty(CURSOR_WORDS, np.int32)  # another each time: threads may read two lanes
        self.backend.read(self._addresses[lane.index, "cursor"], words.view(np.uint8))
        return words.tolist()

    def _checked(self, observation: ArrayLike | Mapping[str, ArrayLike]) -> Action:
        if isinstance(observation, Packed):
            return cast(Action, observation)
        if isinstance(observation, Mapping):
            return self.pack(observation)
        return self.taken(checked_vector("observation", observation, self.config.observation_dim))

    def _bring(self, lane: Lane, observation: Action) -> None:
        """To the device, where every observation counts; else to where a plan finds it."""
        if self.policy.has_memory:
            self._bring_now(lane, observation)
        else:
            self._seen[lane.index] = (lane.record.moves, observation)

    def _bring_last(self, lane: Lane) -> None:
        """To the device, if `_bring` did not."""
        if self.policy.has_memory or (observation := self._last_seen(lane)) is None:
            return
        if self._prefixes is None:
            self._bring_now(lane, cast(Action, observation))
        else:
            self._prefixes.bring(lane, cast(Packed, observation))
            self._place_suffix(lane)

    def _place_suffix(self, lane: Lane) -> None:
        if self._prefixes is not None:
            self._prefixes.place_suffix(lane)

    def _forget_prefix(self, lane: Lane) -> None:
        if self._prefixes is not None:
            self._prefixes.forget(lane)

    def _bring_now(self, lane: Lane, observation: Action) -> None:
        for part in self.policy.inputs:
            self._write(lane, part.region, observation[part.start : part.stop])

    def _last_seen(self, lane: Lane) -> Action | Packed | None:
        seen, record = self._seen[lane.index], lane.record
        if seen is None or seen[0] != record.moves or not seen[1].size:
            return None  # of no numbers: a tick that is run again
        return seen[1]

    def _need_action(self, lane: Lane, hold: bool) -> None:
        words = self._cursors.words(lane)
        if not hold and words[PolicyWord.TICK] >= words[PolicyWord.STOP]:
            raise SessionError(
                f"lane {lane.index}: the queue has no action for tick {words[PolicyWord.TICK]}; "
                "observe and plan, or hold the action before (hold=True)"
            )

    def _committed(self, lane: Lane, committed: int) -> int:
        """How many rows a chunk is to keep, checked against the cursor."""
        c = self.cursor(lane)
        if c.observed == NO_OBSERVATION or c.observed < c.tick - 1:
            seen = "none" if c.observed == NO_OBSERVATION else f"of tick {c.observed}"
            raise SessionError(
                f"lane {lane.index}: a chunk wants the observation of tick {c.tick} or the one "
                f"before, the last is {seen}; observe first"
            )
        if not self.policy.has_memory and self._last_seen(lane) is None:
            raise SessionError(
                f"lane {lane.index}: the observation of tick {c.observed} is not here: no capsule "
                "holds it, and the lane was put elsewhere since; observe first"
            )
        promised = max(c.stop, c.tick) - c.observed  # ticks done have their action
        most = min(promised, self.config.chunk_size - 1)
        rows = as_integer(committed)
        if rows is None or not 0 <= rows <= most:
            raise SessionError(
                f"lane {lane.index}: committed={shown(committed)} is no integer in [0, {most}]: "
                f"actions are promised for ticks [{c.observed}, {c.observed + promised})"
            )
        return rows

    def _steps_left(self, lane: Lane) -> int:
        """Of the chunk in the making. Raises SessionError if there is none."""
        left = self._cursors.words(lane)[PolicyWord.PLAN_STEPS_LEFT]
        if not 1 <= left <= self.config.num_inference_steps:
            raise SessionError(f"lane {lane.index}: no chunk is in the making; begin_plan first")
        return left

    def _acted(self, lane: Lane) -> Action:
        return checked_action(self.action(lane))

    def _write(self, lane: Lane, name: str, array: NDArray[np.generic], word: int = 0) -> None:
        self.backend.write(self._addresses[lane.index, name] + 4 * word, array.view(np.uint8))

    def _write_word(self, lane: Lane, word: PolicyWord, value: int) -> None:
        self._write(lane, "cursor", np.array([value], np.int32), word)

    def _statistics(self) -> tuple[Action, Action]:
        """Scale and offset of actions, all statistics checked. Raises CheckpointError."""
        found = {
            slot.region.name: self._weight(slot)
            for slot in self.arena.weights.slots
            if slot.region.name.startswith(STATISTICS)
        }
        check_statistics(self.policy, found)
        return found["stats.action.scale"], found["stats.action.offset"]

    def _weight(self, slot: Slot) -> Action:
        """A weight vector as it is on the device."""
        out = np.empty(slot.region.size, np.float32)
        address = self.arena.weight_memory.address + slot.offset
        self.backend.read(address, out.view(np.uint8))
        return out
